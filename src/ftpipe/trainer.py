"""Trainers of transformers and TRL, fed in our order, exact in tokens on any number of ranks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from ftpipe import sharding

if TYPE_CHECKING:
    from ftpipe.sequences import Order


class Ordered(Trainer):
    """A Trainer whose rows come in an order that the seed and the epoch alone decide.

    Also where several ranks resume in a later epoch: accelerate passes the epoch only to a sampler that
    it finds.

    Where ranks share out weights, gradients or optimiser states, a checkpoint holds the shards alone, and
    ``save_model`` writes what is whole.

    Attributes:
        tokens_seen: so far by all ranks, without padding; whoever computes the loss counts them.
    """

    def __init__(self, order: Order, **options: Any) -> None:
        self._order = order
        self.tokens_seen = 0
        super().__init__(**options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        self._order.set_epoch(options["epoch"])
        super()._run_epoch(**options)  # type: ignore[no-untyped-call]

    @property
    def shares_out(self) -> bool:
        """Say whether ranks share out weights, gradients or optimiser states."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _prepare_for_training(self, *given: Any, **options: Any) -> Any:
        if self.is_fsdp_enabled:
            compute = torch.bfloat16 if self.args.bf16 else None
            sharding.fully_shard(self.model, self.accelerator.state.fsdp_plugin, compute)
        return super()._prepare_for_training(*given, **options)  # type: ignore[no-untyped-call]

    def compute_loss_context_manager(self) -> ExitStack:
        """Enter DeepSpeed's autocast too where the model is called without its engine."""
        stack = super().compute_loss_context_manager()
        if self.is_deepspeed_enabled:
            stated = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast")
            if stated:
                dtype = getattr(torch, stated["dtype"])
                stack.enter_context(torch.autocast(self.args.device.type, dtype))
        return stack

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained as one would load it, from the first rank."""
        if not self.shares_out:
            super().save_model(output_dir, _internal_call)  # type: ignore[no-untyped-call]
        elif not _internal_call:
            self._save(output_dir, sharding.whole(self.model))  # type: ignore[no-untyped-call]


class DemonstrationTrainer(Ordered, SFTTrainer):
    """TRL's trainer of demonstrations. It departs from TRL in two points besides the order.

    1. The loss of a step is the mean over its tokens for every architecture. transformers averages
       micro-batches for those that say their own loss takes no count (Gemma 3n, remote code).
    2. Tokens seen are those of rows, without padding.
    """

    def __init__(self, order: Order, **options: Any) -> None:
        super().__init__(order, **options)
        self.model_accepts_loss_kwargs = True

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
