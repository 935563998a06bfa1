"""What a training takes: steps alone, not what is measured before the first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from ftpipe import training
from ftpipe.config import TrackingConfig
from ftpipe.trace import Trace


class Clocked:
    """Stands in for a Trainer: begins, takes 2 seconds by its own account, sees 100 tokens."""

    def __init__(self, folder: Path) -> None:
        self.args = TrainingArguments(output_dir=str(folder), use_cpu=True)
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
        self.state = TrainerState(log_history=[{"loss": 1.0}, {"loss": 0.5}], max_steps=2)
        self.tokens_seen = 0
        self._callbacks: list[Any] = []

    def is_world_process_zero(self) -> bool:
        return True

    def weights(self) -> dict[str, str]:
        return {}

    def add_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def train(self, resume_from_checkpoint: str | None) -> Any:
        for callback in self._callbacks:
            callback.on_train_begin(self.args, self.state, TrainerControl())
        self.tokens_seen = 100
        return SimpleNamespace(metrics={"train_runtime": 2.0})


def test_what_is_measured_before_the_first_step_is_no_part_of_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr("ftpipe.trainer_callbacks.time.monotonic", lambda: clock[0])
    trainer: Any = Clocked(tmp_path)
    trace = Trace.of(TrackingConfig(), tmp_path, rank=0)

    def measured_for_one_second() -> None:
        clock[0] += 1.0

    metrics = training.train(trainer, None, trace, measured_for_one_second)
    assert metrics["tokens_per_second"] == 100  # in the 2 s less this one
