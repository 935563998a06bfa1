"""Trainers of transformers and TRL, fed in our order, exact in tokens on any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer
from trl import SFTTrainer

if TYPE_CHECKING:
    import torch

    from ftpipe.sequences import Order


class Ordered(Trainer):
    """A Trainer whose rows come in an order that the seed and the epoch alone decide.

    Also where several ranks resume in a later epoch: accelerate passes the epoch only to a sampler that
    it finds.

    Attributes:
        tokens_seen: so far by all ranks, without padding; whoever computes the loss counts them.
    """

    def __init__(self, order: Order, **options: Any) -> None:
        self._order = order
        self.tokens_seen = 0
        super().__init__(**options)

    def unlogged(self) -> dict[str, Any]:
        """Return what this rank has summed since the last line of metrics, as JSON takes it.

        A Trainer leaves it out of its checkpoints, so that the first line after a resume would be a
        mean over fewer steps than that of a run which nothing interrupts.
        """
        return {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged}

    def recall(self, unlogged: dict[str, Any]) -> None:
        """Go on from what ``unlogged`` returned, once a resumed training has begun."""
        self._tr_loss.fill_(unlogged["loss"])
        self._globalstep_last_logged = unlogged["since"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        self._order.set_epoch(options["epoch"])
        super()._run_epoch(**options)  # type: ignore[no-untyped-call]


class DemonstrationTrainer(Ordered, SFTTrainer):
    """TRL's trainer of demonstrations. It departs from TRL in two points besides the order.

    1. The loss of a step is the mean over its tokens for every architecture. transformers averages
       micro-batches for those that say their own loss takes no count (Gemma 3n, remote code).
    2. Tokens seen are those of rows, without padding.
    """

    def __init__(self, order: Order, **options: Any) -> None:
        super().__init__(order, **options)
        self.model_accepts_loss_kwargs = True

    def unlogged(self) -> dict[str, Any]:
        return super().unlogged() | {"metrics": dict(self._metrics["train"])}

    def recall(self, unlogged: dict[str, Any]) -> None:
        super().recall(unlogged)
        self._metrics["train"].update(unlogged["metrics"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return TRL's loss: nats of the batch's learned tokens / learned tokens of the step."""
        tokens: torch.Tensor = inputs.pop("tokens")
        result = super().compute_loss(  # type: ignore[no-untyped-call]
            model, inputs, return_outputs, num_items_in_batch
        )
        if model.training:
            seen = self.accelerator.reduce(tokens.to(self.accelerator.device), reduction="sum")
            self.tokens_seen += int(seen)
            self._metrics["train"]["num_tokens"] = [self.tokens_seen]
        return result
