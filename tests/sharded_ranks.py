"""What the ranks of a test run: several stages one after the other, for one start of the processes.

``python sharded_ranks.py JOB.json ...``, started as ``ftpipe.worker`` is. ``JOB.json:2`` ends a stage as
soon as its checkpoint of step 2 is whole, and leaves on disk what a kill would.
"""

from __future__ import annotations

import gc
import sys

from transformers import TrainerCallback

from ftpipe import worker
from ftpipe.trainer import Ordered


class End(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self._step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def main(words: list[str]) -> int:
    begin = Ordered.__init__
    for word in words:
        job, _, end = word.partition(":")

        def ending(self: Ordered, *given: object, end: str = end, **options: object) -> None:
            begin(self, *given, **options)  # type: ignore[arg-type]
            if end:
                self.add_callback(End(int(end)))

        Ordered.__init__ = ending  # type: ignore[method-assign]
        code = worker.main([job])
        if code != (130 if end else 0):
            return code or 1
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
