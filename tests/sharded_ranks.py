"""What the ranks of a test run: several stages one after the other, for one start of the processes.

``python sharded_ranks.py JOB.json ...``, started as ``ftpipe.worker`` is. ``JOB.json:2`` ends a stage
when step (or rollout) 2 and its checkpoint are done, and leaves on disk what a kill would.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ftpipe import worker
from ftpipe.ppo.trainer import PpoTrainer
from ftpipe.trainer import Ordered


class End(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self._step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


class Held(TrainerCallback):
    """Counts the bytes of weights and optimiser states that this rank holds after the last step."""

    def __init__(self, trainer: Ordered) -> None:
        self._trainer = trainer

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        wrapped: Any = self._trainer.optimizer
        stepper: Any = wrapped.optimizer  # torch's, or DeepSpeed's around it
        copies = getattr(stepper, "single_partition_of_fp32_groups", None)
        copies = copies or getattr(stepper, "fp32_partitioned_groups_flat", [])
        moments = getattr(stepper, "optimizer", stepper).state.values()
        tensors = [value for one in moments for value in one.values() if torch.is_tensor(value)]
        held = {
            "weights": sum(map(bytes_of, self._trainer._net.parameters())),
            "optimizer": sum(map(bytes_of, [*copies, *tensors])),
        }
        out = Path(str(self._trainer.args.output_dir)).parent
        (out / f"held-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(held))


def bytes_of(tensor: torch.Tensor) -> int:
    part: Any = getattr(tensor, "ds_tensor", tensor)
    part = part.to_local() if isinstance(part.data, DTensor) else part
    return int(part.numel() * part.element_size())


def main(words: list[str]) -> int:
    begin, rollout = Ordered.__init__, PpoTrainer._rollout
    for word in words:
        job, _, end = word.partition(":")

        def ending(self: Ordered, *given: object, end: str = end, **options: object) -> None:
            begin(self, *given, **options)  # type: ignore[arg-type]
            self.add_callback(Held(self))
            if end:
                self.add_callback(End(int(end)))

        def ending_rollout(self: PpoTrainer, number: int, end: str = end) -> dict[str, float]:
            if end == str(number):
                raise KeyboardInterrupt
            return rollout(self, number)

        Ordered.__init__ = ending  # type: ignore[method-assign]
        PpoTrainer._rollout = ending_rollout  # type: ignore[method-assign, assignment]
        code = worker.main([job])
        if code != (130 if end else 0):
            return code or 1
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
