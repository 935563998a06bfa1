"""What is reported while a Trainer runs: lines for a person, metrics for the tracker."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from ftpipe.logs import on_terminal, say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ftpipe.tracking import Tracker

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
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
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
            done = state.global_step - self._first_step
            rate = done / (time.monotonic() - self._started)
            left = (state.max_steps - state.global_step) / rate if rate else 0.0
            say(
                f"step {state.global_step}/{state.max_steps}  loss {metrics['loss']:.4f}  "
                f"grad norm {metrics.get('grad_norm', 0.0):.3f}  {rate:.2f} steps/s  "
                f"{left / 60:.1f} min left"
            )


class Beginning(TrainerCallback):
    """Calls something when a Trainer has its model ready, before the first step."""

    def __init__(self, first: Callable[[], object]) -> None:
        self._first = first

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._first()


def in_words(measured: Mapping[str, float]) -> str:
    """Return the first few measures as part of a line: ``held-out loss 1.2345``."""
    return "  ".join(
        f"{name.replace('held_out', 'held-out').replace('_', ' ')} {value:.4f}"
        for name, value in itertools.islice(measured.items(), 3)
    )
