"""Trains a policy on preferences: the loss of a step is the mean over all of its pairs, on any ranks.

Shapes: B pairs, N = 2B replies (or N single replies), L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftpipe import trace
from ftpipe.choices import PreferenceLoss
from ftpipe.preferences.logps import Reference, reply_logps
from ftpipe.preferences.losses import (
    Pairs,
    Unpaired,
    kto_losses,
    kto_reference_point,
    kto_rewards,
    pair_losses,
    pair_rewards,
)
from ftpipe.trainer import Ordered

if TYPE_CHECKING:
    from ftpipe.sequences import Order
    from ftpipe.training_config import DpoConfig

Batch = Mapping[str, Tensor]
REPLY_MEASURES = ("reward_wanted", "reward_unwanted")
PAIR_MEASURES = (
    *("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"),
    *("logps_accuracy", "logps_chosen", "logps_rejected"),
)
Measures = dict[str, tuple[Tensor, Tensor]]  # name -> values_B, and 1 where a value counts, else 0


class PreferenceTrainer(Ordered):
    """A Trainer of DPO, its family and KTO. It departs from TRL's DPOTrainer and KTOTrainer in these.

    1. The loss of an optimiser step is the mean over its pairs, whatever micro-batches and ranks they
       are in; TRL averages micro-batches, and the terms that are means over tokens differ then.
    2. KTO's reference point is that of the whole step, not of a micro-batch; a mismatched reply is that
       of another prompt by construction (``batches.partners``).
    3. The reference is asked before the policy, so that no activations are held meanwhile.
    4. Tokens seen are those of rows, without padding.

    Args:
        reference: computes the reference's log-probs of a batch that does not bring them; None where
            every batch does, or the loss has no reference.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, order: Order, dpo: DpoConfig, reference: Reference | None, **options: Any
    ) -> None:
        self.dpo = dpo
        self.reference = reference
        super().__init__(order, **options)
        self._sums: dict[str, Tensor] = {}  # name -> sum and rows since the last line, of this rank
        self.kl = torch.zeros(())  # KTO's reference point of the step

    def unlogged(self) -> dict[str, Any]:
        sums = {name: sum_.tolist() for name, sum_ in self._sums.items()}
        return super().unlogged() | {"sums": sums}

    def recall(self, unlogged: dict[str, Any]) -> None:
        super().recall(unlogged)
        device = self.args.device
        self._sums = {name: torch.tensor(sum_, device=device) for name, sum_ in unlogged["sums"].items()}

    def rows(self, batch: dict[str, Any]) -> list[str]:
        """Return digests of pairs, the chosen reply first, or of replies and whether one wants them."""
        replies = trace.of_batch(batch)
        if self.dpo.loss is not PreferenceLoss.kto:
            pairs = len(replies) // 2
            both = zip(replies[:pairs], replies[pairs:], strict=True)
            return [trace.of_texts(pair) for pair in both]
        others = trace.of_batch(batch, "mismatched_")
        wanted = [str(bool(one)) for one in batch["wanted"]]
        return [trace.of_texts(row) for row in zip(replies, others, wanted, strict=True)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Return how many pairs (or replies) of a step are real, over all ranks; count its tokens."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts += torch.stack([batch["real"].sum(), batch["tokens"]]).to(device)
        real, tokens = map(int, self.accelerator.reduce(counts, reduction="sum").tolist())
        self.tokens_seen += tokens
        if self.dpo.loss is PreferenceLoss.kto:
            self.kl = self.reference_point(batch_samples)
        return max(1, real)

    def reference_point(self, batches: Iterable[Any]) -> Tensor:
        """Return KTO's z0 of a step from its mismatched replies, over all ranks, in nats."""
        total = torch.zeros(2, device=self.args.device)  # log-ratios, replies
        for batch in batches:
            inputs: dict[str, Tensor] = self._prepare_inputs(batch)
            mismatched = {
                name.removeprefix("mismatched_"): value
                for name, value in inputs.items()
                if name.startswith("mismatched_")
            }
            if "ref_mismatched_logps" in inputs:
                mismatched["ref_logps"] = inputs["ref_mismatched_logps"]
            ref_N = self.reference_logps(mismatched)
            policy = self.accelerator.unwrap_model(self.model)
            with torch.no_grad(), self.compute_loss_context_manager():
                ratios_N = reply_logps(policy, mismatched) - ref_N
            total[0] += (ratios_N * inputs["real"]).sum()
            total[1] += inputs["real"].sum()
        total = self.accelerator.reduce(total, reduction="sum")
        return kto_reference_point(total[0], total[1])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss: summed, over the pairs of the step."""
        ref_N = self.reference_logps(inputs)
        logps_N = reply_logps(model, inputs)
        losses_B, measures = self.losses(inputs, logps_N, ref_N)
        real_B = inputs["real"].to(losses_B.dtype)
        for name, (sum_, rows) in weighed(measures, real_B).items():
            kept = self._sums.setdefault(name, torch.zeros(2, device=real_B.device))
            kept += torch.stack([sum_, rows])
        # ranks are averaged by whoever shares out the gradients; the count is of all of them
        return (losses_B * real_B).sum() * self.accelerator.num_processes / num_items_in_batch

    def losses(self, inputs: Batch, logps_N: Tensor, ref_N: Tensor) -> tuple[Tensor, Measures]:
        """Return losses_B and what is measured beside them."""
        if self.dpo.loss is PreferenceLoss.kto:
            replies = Unpaired(logps_N, ref_N, inputs["wanted"])
            return kto_losses(replies, self.kl.to(logps_N.device), self.dpo), of_replies(
                replies, self.dpo
            )
        pairs = as_pairs(logps_N, ref_N, inputs["reply_tokens"])
        return pair_losses(pairs, self.dpo), of_pairs(pairs, self.dpo)

    def measured(self) -> tuple[str, ...]:
        """Return the names of what ``losses`` measures."""
        return REPLY_MEASURES if self.dpo.loss is PreferenceLoss.kto else PAIR_MEASURES

    def reference_logps(self, inputs: Batch) -> Tensor:
        """Return the reference's log-probs of a batch in nats (N,): what it brings, or computed."""
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        if self.reference is None:  # a loss without one
            return torch.zeros(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        return self.reference(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was measured since the last line, over all ranks."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
            logs |= {
                name: float(sum_ / rows) for name, (sum_, rows) in zip(names, sums, strict=True) if rows
            }
            logs["tokens"] = float(self.tokens_seen)
            self._sums = {}
        super().log(logs, start_time)


def as_pairs(logps_N: Tensor, ref_N: Tensor, tokens_N: Tensor) -> Pairs:
    """Return what a batch says of its pairs: the first half are the chosen replies."""
    return Pairs(*logps_N.chunk(2), *ref_N.chunk(2), *tokens_N.chunk(2))


def of_pairs(pairs: Pairs, dpo: DpoConfig) -> Measures:
    """Return what is measured of pairs: rewards, their difference, whether they agree, log-probs."""
    chosen_B, rejected_B = pair_rewards(pairs, dpo)
    every_B = torch.ones_like(chosen_B)
    measured = {
        "reward_chosen": chosen_B,
        "reward_rejected": rejected_B,
        "reward_margin": chosen_B - rejected_B,
        "reward_accuracy": preferred(chosen_B, rejected_B),
        "logps_chosen": pairs.chosen_logps_B.detach(),
        "logps_rejected": pairs.rejected_logps_B.detach(),
        "logps_accuracy": preferred(pairs.chosen_logps_B, pairs.rejected_logps_B),
    }
    return {name: (values_B, every_B) for name, values_B in measured.items()}


def preferred(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Return 1 where the chosen one has more, 0 where it has less, 1/2 where they are equal."""
    return (torch.sign(chosen_B.detach() - rejected_B.detach()) + 1) / 2


def of_replies(replies: Unpaired, dpo: DpoConfig) -> Measures:
    """Return what is measured of single replies: the rewards of wanted and of unwanted ones."""
    rewards_B, wanted_B = kto_rewards(replies, dpo), replies.wanted_B
    return {
        "reward_wanted": (rewards_B, wanted_B.to(rewards_B.dtype)),
        "reward_unwanted": (rewards_B, (~wanted_B).to(rewards_B.dtype)),
    }


def weighed(measures: Measures, real_B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sum of each measure over the real rows that it is of, and how many they are."""
    return {
        name: ((values_B * of_B * real_B).sum(), (of_B * real_B).sum())
        for name, (values_B, of_B) in measures.items()
    }
