"""Measure two things at the same time, a core each: whatever else a machine does slows both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ftpipe import provenance

T = TypeVar("T")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def at_once(sides: int) -> bool:
    """Say whether so many sides run at the same time."""
    return len(_cores()) >= sides and not provenance.gpus()


def together(sides: Sequence[Callable[[], T]], number: int) -> list[T]:
    """Return what each side measures; all run at once, each on a core of its own.

    A thread's processes inherit its core (sched_setaffinity(2)). With a GPU, which they would share, or
    fewer cores than sides, or where cores cannot be chosen, they run one after another.

    Args:
        number: of this comparison; from one to the next the sides change cores.
    """
    if not at_once(len(sides)):
        return [side() for side in sides]
    cores = _cores()

    def on_core(place: int) -> T:
        os.sched_setaffinity(0, {cores[(place + number) % len(sides)]})  # of this thread alone
        return sides[place]()

    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(on_core, range(len(sides))))
