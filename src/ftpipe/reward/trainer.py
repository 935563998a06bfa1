"""The trainer of a reward model: groups of ranked replies, exact in groups on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch

from ftpipe import trace
from ftpipe.reward.loss import group_losses
from ftpipe.trainer import Ordered

LOGGED = ("accuracy", "margin", "reward")  # means over the pairs since the last line


class RewardTrainer(Ordered):
    """The loss of a step is the mean over its prompts, each the mean over its pairs of replies.

    Neither the micro-batch nor the number of ranks changes it: each rank divides by the prompts of the
    whole step, and by no number of micro-batches (``loss_is_scaled_for_ga``).
    """

    loss_is_scaled_for_ga = True

    def __init__(self, order: Any, l2: float, center: float, **options: Any) -> None:
        super().__init__(order, **options)
        self._l2 = l2
        self._center = center
        self._sums = torch.zeros(1 + len(LOGGED), dtype=torch.float64, device=self.args.device)

    def unlogged(self) -> dict[str, Any]:
        return super().unlogged() | {"sums": self._sums.tolist()}

    def recall(self, unlogged: dict[str, Any]) -> None:
        super().recall(unlogged)
        self._sums = torch.tensor(unlogged["sums"], dtype=torch.float64, device=self.args.device)

    def rows(self, batch: dict[str, Any]) -> list[str]:
        """Return digests of pairs: the better reply, the worse one, their margin."""
        replies = trace.of_batch(batch)
        pairs = zip(batch["pairs_P2"].tolist(), batch["margins_P"].tolist(), strict=True)
        return [
            trace.of_texts([replies[better], replies[worse], repr(margin)])
            for (better, worse), margin in pairs
        ]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Return how many prompts of the step have a pair, over all ranks; count its tokens."""
        counts = [sum(batch[key] for batch in batch_samples) for key in ("compared", "tokens")]
        total = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum")
        compared, tokens = map(int, total.tolist())
        self.tokens_seen += tokens
        return max(1, compared)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, times the ranks that DDP averages over."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        scores_N = outputs.logits[:, 0]
        pairs_P2 = inputs["pairs_P2"]
        losses_G = group_losses(
            scores_N,
            pairs_P2,
            inputs["group_P"],
            inputs["margins_P"],
            inputs["groups"],
            self._l2,
            self._center,
        )
        with torch.no_grad():
            better_P, worse_P = scores_N.double()[pairs_P2].unbind(1)
            right_P = ((better_P - worse_P).sign() + 1) / 2  # a tie is right by half
            each = (torch.ones_like(right_P), right_P, better_P - worse_P, (better_P + worse_P) / 2)
            self._sums += torch.stack([one.sum() for one in each])
        loss = losses_G.sum() * self.accelerator.num_processes / (num_items_in_batch or 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line of losses the means over the pairs of all ranks since the last one."""
        if "loss" in logs:
            pairs, *sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            self._sums = torch.zeros_like(self._sums)
            logs |= {name: total / max(1.0, pairs) for name, total in zip(LOGGED, sums, strict=True)}
        super().log(logs, start_time)
