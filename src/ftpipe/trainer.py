"""Trainers of transformers and TRL, fed in our order, exact in tokens on any number of ranks."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from trl import SFTTrainer

from ftpipe import checkpoints, modeling, sharding, trace
from ftpipe.artifacts import write_atomic
from ftpipe.choices import Precision, Strategy
from ftpipe.launch_settings import in_force

if TYPE_CHECKING:
    from ftpipe.config import LaunchConfig
    from ftpipe.sequences import Order
    from ftpipe.trace import Trace

SHARDS, SCHEDULE = "shards", "schedule.json"  # in a checkpoint of FSDP2


class Ordered(Trainer):
    """A Trainer whose rows come in an order that the seed and the epoch alone decide.

    Also where several ranks resume in a later epoch: accelerate passes the epoch only to a sampler that
    it finds.

    Where ranks share out weights, gradients or optimiser states, a checkpoint holds the shards alone,
    and ``save_model`` writes what is whole.

    Attributes:
        tokens_seen: so far by all ranks, without padding; whoever computes the loss counts them.
        due: a run which nothing interrupts has the next checkpoint, too.
        trace: what is on record of the steps; None: nothing.
    """

    def __init__(self, order: Order, launch: LaunchConfig, **options: Any) -> None:
        self._order = order
        self._launch = launch
        self.strategy, self._ranks = in_force(launch)
        self.tokens_seen = 0
        self.due = True
        self.trace: Trace | None = None
        self._traced: list[tuple[torch.Tensor, list[str]]] = []  # loss and rows of its micro-batches
        super().__init__(**options)
        modeling.cast_once(self._net, self.args.device.type)

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
        if self.state.global_step >= self.state.max_steps:
            # killed when all was trained: a Trainer would look only after one step more
            self._load_rng_state(options["resume_from_checkpoint"])
            self.control.should_training_stop = True
            return
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
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, *given: Any, **options: Any) -> Any:
        if self.strategy is Strategy.fsdp:
            sharding.fully_shard(self._net, self._launch.sharding, self.compute)
            # the Trainer then leaves a model alone that brings its own placement and reduction
            self.is_distributed_loading_by_transformers = True
        prepared = super()._prepare_for_training(*given, **options)  # type: ignore[no-untyped-call]
        found = sharding.found(self.model_wrapped)
        if self.args.world_size > 1 and found is not self.strategy:
            raise RuntimeError(f"launch.strategy={self.strategy} is not in force; what is: {found}")
        return prepared

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Share out the gradients of each micro-batch: to keep them takes memory for all of them."""
        return nullcontext()

    def compute_loss_context_manager(self) -> ExitStack:
        """Compute in the run's precision: a reference too, or a model without its wrapper."""
        stack = super().compute_loss_context_manager()
        if self.compute is not None:
            stack.enter_context(torch.autocast(self.args.device.type, self.compute))
        return stack

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        number = self.state.global_step + 1
        on_record = self.trace is not None and (self.trace.has(number) or number == self.state.max_steps)
        rows = self.rows(inputs) if on_record else []
        loss = super().training_step(model, inputs, num_items_in_batch)
        if on_record:
            self._traced.append((loss.detach(), rows))
        return loss

    def rows(self, batch: dict[str, Any]) -> list[str]:
        """Return a digest of each row that a batch teaches, and of what it teaches of it."""
        return trace.of_batch(batch)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *given: Any, **rest: Any) -> None:
        if self._traced:
            self._record(float(grad_norm), rest["learning_rate"])
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *given, **rest)

    def _record(self, norm: float, rate: float) -> None:
        """Put the step that was just made on record: what all ranks made of it."""
        own = torch.stack([loss for loss, _ in self._traced]).sum()
        loss = self.accelerator.reduce(own, reduction="mean")
        rows: list[str] = gather_object([row for _, rows in self._traced for row in rows])
        self._traced = []
        assert self.trace is not None
        self.trace.step(
            self.state.global_step,
            loss=loss.item(),
            grad_norm=norm,
            learning_rate=rate,
            data=trace.of_texts(sorted(rows)),
        )

    def weights(self) -> dict[str, str]:
        """Return digests of all weights: of what every rank holds, where they are shared out."""
        trained = [weight for weight in self._net.parameters() if weight.requires_grad]
        own = trace.of_weights(self._net.named_parameters(), trained)
        if not self.shares_out:
            return own
        everyone: list[dict[str, str]] = gather_object([own])
        return {
            f"rank {rank}: {name}": value
            for rank, digests in enumerate(everyone)
            for name, value in digests.items()
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained as one would load it, from the first rank."""
        if not self.shares_out:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            state = sharding.whole(self._net)
            if self.args.should_save:
                self._save(output_dir, state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, each rank its part, and seal it when all have."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # a Trainer would remove an older one before the others have written their parts
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        checkpoints.write_unlogged(folder, self.args.process_index, self.unlogged(), self.due)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if self.trace is not None:
                self.trace.keep()
            stated = {"tokens": self.tokens_seen, "strategy": self.strategy, "ranks": self._ranks}
            checkpoints.seal(folder, **stated)
            checkpoints.keep_newest(folder.parent, keep)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.strategy is not Strategy.fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_shards(Path(output_dir) / SHARDS, self._net, self._stepper)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            write_atomic(Path(output_dir) / SCHEDULE, json.dumps(self.lr_scheduler.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.strategy is not Strategy.fsdp:  # its shards are read when the model is in shards
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.strategy is not Strategy.fsdp:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharding.load_shards(Path(checkpoint) / SHARDS, self._net, self._stepper)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULE).read_text()))

    @property
    def _net(self) -> torch.nn.Module:
        assert isinstance(self.model, torch.nn.Module)
        return self.model

    @property
    def _stepper(self) -> torch.optim.Optimizer:
        """Return torch's optimiser, which accelerate wraps."""
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(found, torch.optim.Optimizer)
        return found


class DemonstrationTrainer(Ordered, SFTTrainer):
    """TRL's trainer of demonstrations. It departs from TRL in two points besides the order.

    1. The loss of a step is the mean over its tokens for every architecture. transformers averages
       micro-batches for those that say their own loss takes no count (Gemma 3n, remote code).
    2. Tokens seen are those of rows, without padding.
    """

    def __init__(self, order: Order, launch: LaunchConfig, **options: Any) -> None:
        super().__init__(order, launch, **options)
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
