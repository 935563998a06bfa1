"""What a rollout gives to learn from: answers, what each role says of them, rewards, advantages.

Shapes: B answers of the whole rollout, over all ranks; T tokens of the longest one; M members of a
reward model. A mask is True on the tokens of an answer, a prefix of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftpipe.choices import Algorithm
from ftpipe.ppo import advantages, rewards
from ftpipe.ppo.layout import Answer, padded

if TYPE_CHECKING:
    from ftpipe.ppo_config import PpoConfig


@dataclass(frozen=True)
class Judged:
    """An answer and what the roles say of its T tokens; tensors on the CPU, float32.

    Attributes:
        place: which answer of the rollout it is.
        logps_T, ref_logps_T: under policy and reference, nats.
        entropies_T: of the policy's distribution for each token, the whole vocabulary, nats.
        values_T: before each token, units of the score.
        members_M: score by each member of the reward model; None where a function gives it.
    """

    place: int
    answer: Answer
    logps_T: Tensor
    ref_logps_T: Tensor
    entropies_T: Tensor
    values_T: Tensor
    members_M: Tensor | None


@dataclass(frozen=True)
class Experience:
    """A rollout of all ranks, the same on every rank.

    Attributes:
        scores_B: of the reward model (the mean of its members) or function, as it gives them.
        disagreement_B: standard deviation of the members' scores; None with fewer than two.
        watched_B: what a function beside the reward says; None without one.
        rewards_BT: of each token: its part of the KL penalty, and the answer's score at its last.
        learned_BT: the mask of what is learned from.
        advantages_BT: by ``ppo.algorithm``; PPO's are whitened over the whole rollout.
        returns_BT: what the value function is to learn; 0 without one.
        kl_weight: of the KL divergence from the reference in the loss, units of the score per nat.
    """

    answers: tuple[Answer, ...]
    mask_BT: Tensor
    logps_BT: Tensor
    ref_logps_BT: Tensor
    entropies_BT: Tensor
    values_BT: Tensor
    scores_B: Tensor
    disagreement_B: Tensor | None
    watched_B: Tensor | None
    rewards_BT: Tensor
    learned_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    kl_weight: float

    @property
    def ended_B(self) -> Tensor:
        return torch.tensor([one.ended for one in self.answers])


def experience(
    judged: Sequence[Judged],
    given: Sequence[float] | None,
    watched: Sequence[float] | None,
    beta: float,
    ppo: PpoConfig,
    learned: bool = True,
) -> Experience:
    """Return what there is to learn from answers.

    Args:
        judged: in the order of their places.
        given: scores of a function; None where members of a reward model gave them.
        beta: weight of the KL penalty, units of the score per nat.
        learned: whether advantages are wanted; answers to held-out prompts have none.
    """
    answers = tuple(one.answer for one in judged)
    longest = max(len(one.tokens) for one in answers)
    mask_BT = padded([torch.ones(len(one.tokens), dtype=torch.bool) for one in answers], longest)
    logps_BT = padded([one.logps_T for one in judged], longest)
    ref_logps_BT = padded([one.ref_logps_T for one in judged], longest)
    values_BT = padded([one.values_T for one in judged], longest)
    disagreement_B = None
    if given is not None:
        scores_B = torch.tensor(given, dtype=torch.float32)
    else:
        members_BM = torch.stack([one.members_M for one in judged if one.members_M is not None])
        scores_B = members_BM.mean(1)
        if members_BM.shape[1] > 1:
            disagreement_B = members_BM.std(1, correction=0)

    # The score of an answer, less a penalty where it has no end (Stiennon et al. 2020 sample to an end)
    ended_B = torch.tensor([one.ended for one in answers])
    earned_B = scores_B if ppo.score_clip is None else rewards.clip_scores(scores_B, ppo.score_clip)
    earned_B = rewards.end_penalty(earned_B, ended_B, ppo.missing_eos_penalty)
    # R(x, y) = r(x, y) - beta log pi / rho, token by token (Ziegler et al. 2019, eq. 2); GRPO has the
    # penalty in its loss (Shao et al. 2024, eq. 3)
    in_loss = ppo.algorithm is Algorithm.grpo
    rewards_BT = rewards.token_rewards(
        earned_B, logps_BT, ref_logps_BT, mask_BT, 0.0 if in_loss else beta
    )
    learned_BT = mask_BT & ended_B[:, None] if ppo.mask_truncated else mask_BT
    advantages_BT = returns_BT = torch.zeros_like(rewards_BT)
    if learned:
        advantages_BT, returns_BT = _advantages(rewards_BT, values_BT, learned_BT, ppo)
    return Experience(
        answers=answers,
        mask_BT=mask_BT,
        logps_BT=logps_BT,
        ref_logps_BT=ref_logps_BT,
        entropies_BT=padded([one.entropies_T for one in judged], longest),
        values_BT=values_BT,
        scores_B=scores_B,
        disagreement_B=disagreement_B,
        watched_B=None if watched is None else torch.tensor(watched, dtype=torch.float32),
        rewards_BT=rewards_BT,
        learned_BT=learned_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT,
        kl_weight=beta if in_loss else 0.0,
    )


def _advantages(
    rewards_BT: Tensor, values_BT: Tensor, learned_BT: Tensor, ppo: PpoConfig
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of the tokens that are learned from."""
    if ppo.algorithm is not Algorithm.ppo:
        compared = {
            Algorithm.rloo: advantages.leave_one_out,
            Algorithm.grpo: advantages.group_relative,
        }[ppo.algorithm]
        whole_B = compared(rewards_BT.sum(1), ppo.answers_per_prompt)
        advantages_BT = torch.where(learned_BT, whole_B[:, None], 0.0)
        return advantages_BT, torch.zeros_like(advantages_BT)
    if ppo.whiten_rewards:
        moments_3 = advantages.moments(rewards_BT, learned_BT)
        rewards_BT = advantages.whiten_around_mean(rewards_BT, learned_BT, moments_3)
    # Generalised advantage estimation (Schulman et al. 2016), whitened over the whole rollout
    raw_BT = advantages.gae(rewards_BT, values_BT, learned_BT, ppo.gamma, ppo.lam)
    returns_BT = advantages.returns(raw_BT, values_BT, learned_BT)
    moments_3 = advantages.moments(raw_BT, learned_BT)
    return advantages.whiten(raw_BT, learned_BT, moments_3), returns_BT
