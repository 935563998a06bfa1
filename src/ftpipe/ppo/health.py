"""Whether PPO is healthy: what every rollout shows, and when it is ended.

Shapes: B answers, T tokens of the longest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftpipe.errors import HealthError
from ftpipe.ppo import kl

if TYPE_CHECKING:
    from ftpipe.ppo.experience import Experience
    from ftpipe.ppo_config import HealthConfig

GRAM = 4  # tokens of a stretch that may be repeated


def measures(found: Experience) -> dict[str, float]:
    """Return what a rollout shows, before anything is learned from it.

    - ``score``, ``score_std``: of answers, in units of the reward.
    - ``disagreement``: of an ensemble's members, mean over answers.
    - ``watched``: by the function beside the reward.
    - ``kl``, ``kl_k2``, ``kl_k3``: from the reference, nats of a whole answer, mean over answers, by the
      three estimators of ``kl.py``; the first is the one that is penalised and steered.
    - ``entropy``: of a token, nats.
    - ``length``: tokens of an answer; ``eos_rate``: share that ends; ``repeated``: see ``repeated``.
    - ``length_correlation``: Pearson's, of score with length; NaN where either is constant.
    - ``explained_variance``: 1 - var(returns - values) / var(returns), of tokens; 1: values foresee all.
    """
    mask_BT = found.mask_BT
    apart_BT = torch.where(mask_BT, found.logps_BT - found.ref_logps_BT, 0.0)
    lengths_B = mask_BT.sum(1).float()
    shown = {
        "score": found.scores_B.mean().item(),
        "score_std": found.scores_B.double().std(correction=0).item(),  # exactly 0 where all are equal
        "kl": kl.k1(apart_BT).sum(1).mean().item(),
        "kl_k2": kl.k2(apart_BT).sum(1).mean().item(),
        "kl_k3": kl.k3(apart_BT).sum(1).mean().item(),
        "entropy": found.entropies_BT[mask_BT].mean().item(),
        "length": lengths_B.mean().item(),
        "eos_rate": found.ended_B.float().mean().item(),
        "repeated": sum(repeated(one.tokens) for one in found.answers) / len(found.answers),
        "length_correlation": correlation(found.scores_B, lengths_B),
        "explained_variance": explained_variance(
            found.values_BT[found.learned_BT], found.returns_BT[found.learned_BT]
        ),
    }
    if found.disagreement_B is not None:
        shown["disagreement"] = found.disagreement_B.mean().item()
    if found.watched_B is not None:
        shown["watched"] = found.watched_B.mean().item()
    return shown


def repeated(tokens: Sequence[int]) -> float:
    """Return the share of an answer's stretches of four tokens that it had before, in [0, 1).

    seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319), section 6; 0 for fewer than four tokens.

    >>> repeated([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def correlation(one_N: Tensor, other_N: Tensor) -> float:
    """Return Pearson's correlation, NaN where either is constant."""
    a_N, b_N = one_N.double() - one_N.double().mean(), other_N.double() - other_N.double().mean()
    scale = (a_N.square().sum() * b_N.square().sum()).sqrt().item()
    return (a_N @ b_N).item() / scale if scale > 0 else math.nan


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """Return 1 - var(returns - values) / var(returns), NaN where returns are constant or there are none.

    OpenAI baselines (common/math_util.py).
    """
    if not len(returns_N):  # ppo.mask_truncated, and no answer ends
        return math.nan
    whole = returns_N.double().var(correction=0).item()
    left = (returns_N - values_N).double().var(correction=0).item()
    return 1 - left / whole if whole > 0 else math.nan


@dataclass
class Watch:
    """Counts for how many rollouts in a row something is wrong, and ends the run when it is enough.

    Attributes:
        first: entropy and EOS rate of the first rollout, which later ones are held against.
        bad: by what is wrong, rollouts in a row.
    """

    health: HealthConfig
    first: dict[str, float] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"first": self.first, "bad": self.bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.first, self.bad = dict(state["first"]), dict(state["bad"])

    def look(self, shown: Mapping[str, float]) -> None:
        """Judge a rollout.

        Raises:
            HealthError: with the cause and what to change.
        """
        for name in ("score", "kl", "entropy"):
            if not math.isfinite(shown[name]):
                raise HealthError(
                    f"the {name} of the rollout is {shown[name]}; the weights are spoilt: lower "
                    "ppo.learning_rate, or set ppo.max_grad_norm."
                )
        self.first = self.first or {name: shown[name] for name in ("entropy", "eos_rate")}
        health, first = self.health, self.first
        lowest = {
            "entropy": (health.min_entropy or 0.0) * first["entropy"],
            "eos_rate": (health.min_eos_rate or 0.0) * first["eos_rate"],
        }
        wrong = {
            "kl": health.max_kl is not None and shown["kl"] > health.max_kl,
            **{name: shown[name] < low for name, low in lowest.items()},
        }
        self.bad = {name: self.bad.get(name, 0) + 1 if is_bad else 0 for name, is_bad in wrong.items()}
        for name, times in self.bad.items():
            if times >= health.patience:
                raise HealthError(self._sentence(name, shown, lowest))

    def _sentence(self, name: str, shown: Mapping[str, float], lowest: Mapping[str, float]) -> str:
        rollouts = f"in {self.health.patience} rollouts in a row"
        if name == "kl":
            return (
                f"the policy has left its reference: the KL of an answer is {shown['kl']:.4g} nats, "
                f"above ppo.health.max_kl={self.health.max_kl:g} {rollouts}; raise ppo.beta, set "
                "ppo.kl_target, or lower ppo.learning_rate."
            )
        if name == "entropy":
            return (
                f"the policy says the same whatever it draws: the entropy of a token is "
                f"{shown['entropy']:.4g} nats, below {lowest['entropy']:.4g} (ppo.health.min_entropy="
                f"{self.health.min_entropy:g} of the first rollout's) {rollouts}; raise ppo.beta or "
                "ppo.entropy_weight, or lower ppo.learning_rate."
            )
        return (
            f"answers no longer end: {shown['eos_rate']:.2%} of them do, below {lowest['eos_rate']:.2%} "
            f"(ppo.health.min_eos_rate={self.health.min_eos_rate:g} of the first rollout's) {rollouts}; "
            "raise ppo.missing_eos_penalty or ppo.max_new_tokens."
        )
