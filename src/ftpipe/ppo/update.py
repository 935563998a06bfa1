"""The updates on a rollout: passes over minibatches, each one step of the optimiser.

A minibatch may come in micro-batches and on several ranks: every part is divided by the weight of the
whole (``losses.normalised``), and gradients are summed, so neither changes what is computed.

Shapes: B answers of the rollout, T tokens of the longest one of a micro-batch, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftpipe import sharding
from ftpipe.choices import Precision
from ftpipe.errors import HealthError
from ftpipe.ppo import kl, losses
from ftpipe.ppo.generation import SHUFFLED
from ftpipe.ppo.layout import (
    Batch,
    answer_logits,
    chosen_logps,
    lay,
    measured_entropies,
    state_values,
)
from ftpipe.ppo.roles import Role, Roles, body_of
from ftpipe.sequences import dealt

if TYPE_CHECKING:
    from ftpipe.ppo.experience import Experience
    from ftpipe.ppo_config import PpoConfig

# Mean difference of log-probs, nats a token, between a rollout and the first minibatch after it, where
# nothing has changed yet: rounding in one layout and the other. Another policy is far beyond.
SAME = {Precision.fp32: 1e-3, Precision.bf16: 0.05}

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Ranks:
    """This rank among all."""

    rank: int = 0
    world: int = 1
    shards: bool = False  # of weights: every pass gathers them, so all ranks make as many

    def most(self, own: int) -> int:
        """Return the most passes that a rank has to make, where all must make as many; else its own."""
        if not self.shards:
            return own
        everyone: list[int] = gather_object([own])
        return max(everyone)

    def sum(self, values: Sequence[Tensor]) -> None:
        """Add up tensors over the ranks, in place, in one message for each dtype."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(value.dtype for value in values):  # in one order on every rank
            same = [value for value in values if value.dtype is dtype]
            flat = torch.cat([value.reshape(-1) for value in same])
            dist.all_reduce(flat)
            for value, part in zip(same, flat.split([v.numel() for v in same]), strict=True):
                value.copy_(part.view_as(value))


@dataclass
class Updater:
    """What the updates of every rollout have in common.

    Attributes:
        ptx: adds gradients of the loss on demonstrations for one minibatch, given the number of the
            update, and returns its part of that loss; None without.
        pad: what fills rows up.
    """

    roles: Roles
    optimizer: torch.optim.Optimizer
    ppo: PpoConfig
    seed: int
    micro_batch: int
    precision: Precision
    autocast: Autocast
    ranks: Ranks
    pad: int
    ptx: Callable[[int], Tensor] | None = None

    def update(self, found: Experience, rollout: int, updates: int) -> dict[str, float]:
        """Take the steps of one rollout; return what they showed, mean over minibatches.

        Args:
            rollout: its number, from 0.
            updates: steps of the optimiser before it.

        Raises:
            HealthError: if the ratio of the first minibatch is not 1, or a gradient is not finite.
        """
        shown: list[dict[str, float]] = []
        sums: dict[str, float] = {}
        self.roles.train(True)
        for chosen in self._minibatches(len(found.answers), rollout):
            sums = self._gradients(found, chosen)
            if not shown:
                self._check_first(sums)
            if self.ppo.target_kl is not None and sums["approx_kl"] > self.ppo.target_kl:
                self.optimizer.zero_grad()
                break
            if self.ptx is not None:
                part = self.ptx(updates + len(shown))
                self.ranks.sum([part])
                sums["ptx_loss"] = part.item()
            sums |= self._step(rollout)
            shown.append(sums)
        self.roles.train(False)
        return {**_means(shown or [sums]), "updates": len(shown)}

    def _minibatches(self, count: int, rollout: int) -> Iterator[np.ndarray]:
        """Yield the places of each minibatch's answers, pass after pass, in the seed's orders."""
        for epoch in range(self.ppo.ppo_epochs):
            order = np.random.default_rng((self.seed, rollout, epoch, SHUFFLED)).permutation(count)
            yield from np.array_split(order, self.ppo.minibatches)

    def _gradients(self, found: Experience, chosen: np.ndarray) -> dict[str, float]:
        """Add up the gradients of a minibatch on this rank; return its measures over all ranks."""
        mine = sorted(chosen[self.ranks.rank :: self.ranks.world].tolist())
        lengths = [len(found.answers[at].prompt) + len(found.answers[at].tokens) for at in mine]
        dealt_out = dealt(lengths, 0, 1, self.micro_batch)
        pieces = [self._piece(found, [mine[at] for at in some]) for some in dealt_out]
        idle = self.ranks.most(len(pieces)) - len(pieces)
        if idle:  # passes that others make: the same, and nothing learned from it
            spare = pieces[0] if pieces else self._piece(found, [int(chosen[0])])
            pieces += idle * [replace(spare, learned_BT=torch.zeros_like(spare.learned_BT))]
        device, how = self.roles.device, self.ppo.weighting
        total = losses.weight(found.learned_BT[torch.from_numpy(chosen)], how).to(device)
        sums: dict[str, Tensor] = {}
        with self.roles.acting(Role.policy) as model:
            for piece in pieces:
                _add(sums, self._policy(model, piece, total, found.kl_weight))
        if self.roles.head is not None:
            with self.roles.acting(Role.value) as model:
                for piece in pieces:
                    _add(sums, self._value(model, piece, total))
        names = sorted(MEASURES if self.roles.head is not None else POLICY_MEASURES)
        whole = torch.stack(
            [sums.get(name, torch.zeros((), device=device)).detach().float() for name in names]
        )
        self.ranks.sum([whole])
        return dict(zip(names, whole.tolist(), strict=True))

    def _piece(self, found: Experience, rows: list[int]) -> Piece:
        batch = lay([found.answers[at] for at in rows], self.pad, self.roles.device)
        at, until = torch.tensor(rows), batch.longest

        def of(whole_BT: Tensor) -> Tensor:
            return whole_BT[at, :until].to(self.roles.device)

        return Piece(
            batch=batch,
            learned_BT=of(found.learned_BT),
            logps_BT=of(found.logps_BT),
            ref_logps_BT=of(found.ref_logps_BT),
            values_BT=of(found.values_BT),
            advantages_BT=of(found.advantages_BT),
            returns_BT=of(found.returns_BT),
        )

    def _policy(
        self, model: torch.nn.Module, piece: Piece, total: Tensor, kl_weight: float
    ) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch's policy loss; return its parts of the measures."""
        mask_BT, how = piece.learned_BT, self.ppo.weighting
        with self.autocast():
            logits_BTV = answer_logits(model, piece.batch, self.ppo.temperature)
        logps_BT = chosen_logps(logits_BTV, piece.batch)
        entropies_BT = (
            losses.entropies(logits_BTV) if self.ppo.entropy_weight else measured_entropies(logits_BTV)
        )
        # The clipped surrogate (Schulman et al. 2017, eq. 7), less the entropy bonus (eq. 9)
        ratios_BT = losses.ratios(logps_BT, piece.logps_BT, mask_BT)
        losses_BT = losses.policy_losses(ratios_BT, piece.advantages_BT, self.ppo.clip)
        loss = losses.normalised(losses_BT, mask_BT, how, total)
        entropy = losses.normalised(entropies_BT, mask_BT, how, total)
        whole = loss - self.ppo.entropy_weight * entropy
        if kl_weight:  # GRPO's KL from the reference, by k3 (Shao et al. 2024, eq. 4)
            from_reference_BT = kl.k3(torch.where(mask_BT, logps_BT - piece.ref_logps_BT, 0.0))
            whole = whole + kl_weight * losses.normalised(from_reference_BT, mask_BT, how, total)
        whole.backward()
        apart_BT = (piece.logps_BT - logps_BT).detach()
        clipped_BT = losses.policy_clipped(ratios_BT, piece.advantages_BT, self.ppo.clip)
        return {
            "policy_loss": loss,
            "entropy_now": entropy,
            "approx_kl": losses.normalised(kl.k3(apart_BT), mask_BT, how, total),
            "ratio": losses.normalised(ratios_BT, mask_BT, how, total),
            "ratio_off": losses.normalised(apart_BT.abs(), mask_BT, how, total),
            "clip_fraction": losses.normalised(clipped_BT.float(), mask_BT, how, total),
        }

    def _value(self, model: torch.nn.Module, piece: Piece, total: Tensor) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch's value loss; return its parts of the measures."""
        mask_BT, how = piece.learned_BT, self.ppo.weighting
        with self.autocast():
            values_BT = state_values(body_of(model), self.roles.value_head, piece.batch)
        clip = math.inf if self.ppo.value_clip is None else self.ppo.value_clip
        losses_BT = losses.value_losses(values_BT, piece.values_BT, piece.returns_BT, clip)
        loss = losses.normalised(losses_BT, mask_BT, how, total)
        (self.ppo.value_weight * loss).backward()
        clipped_BT = losses.value_clipped(values_BT, piece.values_BT, piece.returns_BT, clip)
        return {
            "value_loss": loss,
            "value_clip_fraction": losses.normalised(clipped_BT.float(), mask_BT, how, total),
        }

    def _check_first(self, shown: dict[str, float]) -> None:
        """Refuse updates if the policy is not the one that drew the answers: something is inconsistent.

        Huang et al., "The N Implementation Details of RLHF with PPO": the ratio is 1 there.
        """
        off, most = shown["ratio_off"], SAME[self.precision]
        if not off <= most:
            raise HealthError(
                f"the ratio of the first minibatch is not 1: log-probs differ by {off:.3g} nats a token "
                f"from the rollout's (at most {most:g} is rounding); the weights are spoilt, or the "
                "model is not the same in training and evaluation."
            )

    def _step(self, rollout: int) -> dict[str, float]:
        """Sum gradients over the ranks, clip those of each role by itself, take the step."""
        norms = {}
        for role in (Role.policy, Role.value):
            weights = list(self.roles.trained(role).values())
            if not weights:
                continue
            for weight in weights:
                if weight.grad is None:  # a rank without an answer in this minibatch
                    weight.grad = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            # FSDP2 has added up those of its shards in the backward pass
            self.ranks.sum([one for one in gradients if not isinstance(one, DTensor)])
            most = self.ppo.max_grad_norm or math.inf
            if self.ranks.shards:
                norm = sharding.clip(weights, most)
            else:
                norm = torch.nn.utils.clip_grad_norm_(weights, most).item()
            if not math.isfinite(norm):
                raise HealthError(
                    f"the gradient of the {role} is {norm} in rollout {rollout + 1}; lower "
                    "ppo.learning_rate, or clip scores with ppo.score_clip."
                )
            norms[f"{role}_grad_norm"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms


POLICY_MEASURES = ("policy_loss", "entropy_now", "approx_kl", "ratio", "ratio_off", "clip_fraction")
MEASURES = (*POLICY_MEASURES, "value_loss", "value_clip_fraction")


@dataclass(frozen=True)
class Piece:
    """A micro-batch of a rollout."""

    batch: Batch
    learned_BT: Tensor
    logps_BT: Tensor
    ref_logps_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        sums[name] = sums.get(name, 0) + part.detach()


def _means(shown: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over minibatches; the ratio's distance from 1 is the first one's."""
    means = {name: sum(one[name] for one in shown) / len(shown) for name in shown[0]}
    return {**means, "ratio_off": shown[0]["ratio_off"]}
