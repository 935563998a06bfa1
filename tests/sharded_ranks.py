"""What the ranks of a test run: several stages one after the other, for one start of the processes.

``python sharded_ranks.py JOB.json ...``, started as ``ftpipe.worker`` is. ``JOB.json:2`` ends a stage
when step (or rollout) 2 and its checkpoint are done, and leaves on disk what a kill would.
"""

from __future__ import annotations

import gc
import sys

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


def main(words: list[str]) -> int:
    begin, rollout = Ordered.__init__, PpoTrainer._rollout
    for word in words:
        job, _, end = word.partition(":")

        def ending(self: Ordered, *given: object, end: str = end, **options: object) -> None:
            begin(self, *given, **options)  # type: ignore[arg-type]
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
