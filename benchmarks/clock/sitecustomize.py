"""What the steps of a training take, told from inside; for both sides of a comparison in the same way.

Python runs this file in every process that has its folder on PYTHONPATH. Where the command line has
what FTPIPE_CLOCK_FOR says, the seconds from a Trainer's first step to its end, and those that the
processor worked for this process, are written to FTPIPE_CLOCK. Before its first step a side waits for
the other one (FTPIPE_CLOCK_OTHER): both compute at once, and neither has the machine for itself.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 600  # seconds that a side waits for the other


def worked() -> float:
    """Return the seconds that the processor spent on this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def meet(own: Path, other: str | None) -> None:
    Path(f"{own}.ready").touch()
    until = time.monotonic() + PATIENCE
    while other and not Path(f"{other}.ready").exists() and time.monotonic() < until:
        time.sleep(0.05)


def watch(own: Path, other: str | None) -> None:
    """Let every Trainer of this process tell what it took."""
    from transformers import Trainer

    step, train = Trainer.training_step, Trainer.train
    begun: list[tuple[float, float]] = []

    def first(self: Any, *given: Any, **options: Any) -> Any:
        if not begun:
            meet(own, other)
            begun.append((time.monotonic(), worked()))
        return step(self, *given, **options)

    def whole(self: Any, *given: Any, **options: Any) -> Any:
        result = train(self, *given, **options)
        since, before = begun[0]
        told = {"seconds": time.monotonic() - since, "cpu_seconds": worked() - before}
        own.write_text(json.dumps(told))
        return result

    Trainer.training_step, Trainer.train = first, whole  # type: ignore[method-assign, assignment]


if any(os.environ.get("FTPIPE_CLOCK_FOR", "\0") in word for word in sys.orig_argv):
    watch(Path(os.environ["FTPIPE_CLOCK"]), os.environ.get("FTPIPE_CLOCK_OTHER"))
