"""What is reported while a Trainer runs: lines for a person, metrics for the tracker."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import TrainerCallback

from ftpipe import checkpoints, stopping
from ftpipe.logs import on_terminal, say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ftpipe.tracking import Tracker
    from ftpipe.trainer import Ordered

# TRL's names where they are not ours
NAMES = {"mean_token_accuracy": "token_accuracy", "num_tokens": "tokens"}


class Measure(Protocol):
    """Something that is measured on held-out rows, on every rank at once."""

    def measure(self) -> dict[str, float]: ...


class Report(TrainerCallback):
    """Passes metrics to the tracker, measures held-out rows, and prints a line each time.

    Args:
        every: steps between measures; 0: none on the way.
    """

    def __init__(self, tracker: Tracker | None, held_out: Measure | None, every: int) -> None:
        self._tracker = tracker
        self._held_out = held_out
        self._every = every
        self._started: float | None = None
        self._first_step = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._started is None:  # what is measured before the first step is none of its time
            self._started = time.monotonic()
            self._first_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss is always on record
        if self._held_out is None or not self._every or state.global_step % self._every:
            return
        measured = self._held_out.measure()
        if self._tracker is not None:
            self._tracker.log(state.global_step, measured)
        say(f"step {state.global_step}/{state.max_steps}  {in_words(measured)}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        metrics = {NAMES.get(key, key): float(value) for key, value in (logs or {}).items()}
        if "loss" not in metrics:  # the summary at the end, which the stage makes itself
            return
        if self._tracker is not None:
            self._tracker.log(state.global_step, metrics)
        if not on_terminal():  # a terminal has the bar
            assert self._started is not None
            done = state.global_step - self._first_step
            rate = done / (time.monotonic() - self._started)
            left = (state.max_steps - state.global_step) / rate if rate else 0.0
            say(
                f"step {state.global_step}/{state.max_steps}  loss {metrics['loss']:.4f}  "
                f"grad norm {metrics.get('grad_norm', 0.0):.3f}  {rate:.2f} steps/s  "
                f"{left / 60:.1f} min left"
            )


class Beginning(TrainerCallback):
    """Calls something when a Trainer has its model ready, before the first step.

    Attributes:
        seconds: that it took, which are none of training.
    """

    def __init__(self, first: Callable[[], object]) -> None:
        self._first = first
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        started = time.monotonic()
        self._first()
        self.seconds = time.monotonic() - started


class Continuity(TrainerCallback):
    """Lets a training stop where it is asked to, and go on as if nothing had happened.

    All ranks end after the same step: one that was asked is enough. The checkpoint that is made then is
    one too many: it goes with the next, which takes no older one's place on its account.

    Args:
        checkpoint: what the training goes on from.

    Attributes:
        stopped: whether it was asked to.
    """

    def __init__(self, trainer: Ordered, checkpoint: Path | None) -> None:
        self._trainer = trainer
        self._checkpoint = checkpoint
        self._extra = checkpoint is not None and (checkpoint / checkpoints.ASKED).is_file()
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._checkpoint is None:
            return
        unlogged = checkpoints.read_unlogged(self._checkpoint, args.process_index)
        if unlogged is not None:
            self._trainer.recall(unlogged)
        self._keep(args, int(self._extra))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == stopping.limit():
            self.stopped = control.should_training_stop = True
        if not self._all_asked() or state.global_step >= state.max_steps:
            return
        self.stopped = control.should_training_stop = True
        if not control.should_save:
            control.should_save, self._trainer.due = True, False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        made = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._trainer.is_world_process_zero():
            checkpoints.drop_asked(made.parent, but=made)
        self._keep(args, -int(self._extra))
        self._extra = False

    def _all_asked(self) -> bool:
        accelerator = self._trainer.accelerator
        asked = torch.tensor(float(stopping.asked()), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum") > 0)

    @staticmethod
    def _keep(args: TrainingArguments, more: int) -> None:
        if args.save_total_limit is not None:
            args.save_total_limit += more


def in_words(measured: Mapping[str, float]) -> str:
    """Return the first few measures as part of a line: ``held-out loss 1.2345``."""
    return "  ".join(
        f"{name.replace('held_out', 'held-out').replace('_', ' ')} {value:.4f}"
        for name, value in itertools.islice(measured.items(), 3)
    )
