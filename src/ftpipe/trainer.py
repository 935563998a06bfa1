"""Trainers of transformers and TRL, fed in our order, exact in tokens on any number of ranks."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from ftpipe import modeling, sharding
from ftpipe.choices import Precision, Strategy

if TYPE_CHECKING:
    from ftpipe.config import LaunchConfig
    from ftpipe.sequences import Order

SHARDS = "shards"  # in a checkpoint: what FSDP2's ranks hold


class Ordered(Trainer):
    """A Trainer whose rows come in an order that the seed and the epoch alone decide.

    Also where several ranks resume in a later epoch: accelerate passes the epoch only to a sampler that
    it finds.

    Where ranks share out weights, gradients or optimiser states, a checkpoint holds the shards alone, and
    ``save_model`` writes what is whole.

    Attributes:
        tokens_seen: so far by all ranks, without padding; whoever computes the loss counts them.
    """

    def __init__(self, order: Order, launch: LaunchConfig, **options: Any) -> None:
        self._order = order
        self._launch = launch
        self.strategy = training_strategy(launch)
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
        return self.strategy is not Strategy.ddp

    @property
    def compute(self) -> torch.dtype | None:
        """Return the dtype that products are computed in; None: that of the weights."""
        precision = self._launch.precision
        return None if precision is Precision.fp32 else modeling.TORCH[precision]

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.shares_out:  # else it goes there in shards
            super()._move_model_to_device(model, device)  # type: ignore[no-untyped-call]

    def _prepare_for_training(self, *given: Any, **options: Any) -> Any:
        if self.strategy is Strategy.fsdp:
            sharding.fully_shard(self.model, self._launch.sharding, self.compute)
            # the Trainer then leaves a model alone that brings its own placement and reduction
            self.is_distributed_loading_by_transformers = True
        prepared = super()._prepare_for_training(*given, **options)  # type: ignore[no-untyped-call]
        found = sharding.found(self.model_wrapped)
        assert self.args.world_size == 1 or found is self.strategy, f"{found}, not {self.strategy}"
        return prepared

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Share out the gradients of each micro-batch: to keep them would take memory for all of them."""
        return nullcontext()

    def compute_loss_context_manager(self) -> ExitStack:
        """Compute in the run's precision whatever is called: a reference, or a model without its wrapper."""
        stack = super().compute_loss_context_manager()
        if self.compute is not None:
            stack.enter_context(torch.autocast(self.args.device.type, self.compute))
        return stack

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained as one would load it, from the first rank."""
        if not self.shares_out:
            super().save_model(output_dir, _internal_call)  # type: ignore[no-untyped-call]
        elif not _internal_call:
            state = sharding.whole(self.model)
            if self.args.should_save:
                self._save(output_dir, state)  # type: ignore[no-untyped-call]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[no-untyped-call]
        if self.strategy is Strategy.fsdp:
            Path(output_dir, OPTIMIZER_NAME).unlink(missing_ok=True)
            sharding.save(Path(output_dir) / SHARDS, self.model, self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.strategy is not Strategy.fsdp:  # its shards are read when the model is in shards
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[no-untyped-call]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.strategy is Strategy.fsdp:
            sharding.load(Path(checkpoint) / SHARDS, self.model, self.optimizer)
            held = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(held)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[no-untyped-call]


def training_strategy(launch: LaunchConfig) -> Strategy:
    """Return how this process shares out its training: alone it shares out nothing."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return Strategy.ddp if alone else launch.strategy


class DemonstrationTrainer(Ordered, SFTTrainer):
    """TRL's trainer of demonstrations. It departs from TRL in two points besides the order.

    1. The loss of a step is the mean over its tokens for every architecture. transformers averages
       micro-batches for those that say their own loss takes no count (Gemma 3n, remote code).
    2. Tokens seen are those of rows, without padding.
    """

    def __init__(self, order: Order, launch: LaunchConfig, **options: Any) -> None:
        super().__init__(order, launch, **options)
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
