"""A stage that is asked to stop saves what it needs to go on from, and ends.

Who asks makes a file whose path is in the ranks' environment. A file reaches every node of a job, and
passes by launchers, which have ideas of their own about signals. Ranks look for it between steps.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

FILE = "FTPIPE_STOP"  # environment variable: the path of the file that asks
STEPS = "FTPIPE_STEPS"  # environment variable: steps after which a stage ends, with nothing saved
AGAIN = 75  # exit code of a stage that stopped: EX_TEMPFAIL of sysexits.h

_signalled = threading.Event()  # this rank
_told = threading.Event()  # this driver, by a signal that a stage took


class Stopped(Exception):
    """A stage has saved its state and ended because it was asked to; it says where it was."""


def asked() -> bool:
    """Say whether this rank was asked to stop."""
    file = os.environ.get(FILE)
    return _signalled.is_set() or (file is not None and Path(file).exists())


def limit() -> int | None:
    """Return after how many steps (or rollouts) a stage ends that is made again only to be compared."""
    steps = os.environ.get(STEPS)
    return None if steps is None else int(steps)


def driver_asked() -> bool:
    """Say whether this driver was asked to stop while a stage ran, which may have been done by then."""
    return _told.is_set()


def forget() -> None:
    """Let what an earlier command was asked be of no account."""
    _told.clear()


def listen() -> None:
    """Take SIGTERM for such a request, as a rank of Slurm should: preemption sends it to all of them."""
    signal.signal(signal.SIGTERM, lambda *_: _signalled.set())


@contextmanager
def passed_on(file: Path, stage: str, stops: bool) -> Iterator[None]:
    """While a stage runs, let SIGTERM and SIGUSR1 to its driver make the file that asks it to stop.

    A second SIGTERM is an interruption like Ctrl-C, and so is the first to a stage that cannot be
    continued; such a stage is not disturbed by SIGUSR1.

    Args:
        stops: whether the stage looks for the file.
    """

    def tell(text: str) -> None:
        os.write(1, f"{stage}: {text}\n".encode())  # print is not to be entered twice

    terms = 0

    def answer(number: int, _: FrameType | None) -> None:
        nonlocal terms
        terms += number == signal.SIGTERM
        _told.set()
        if number == signal.SIGTERM and (not stops or terms > 1):
            raise KeyboardInterrupt
        if stops:
            file.touch()
            tell("asked to stop; it saves and ends after this step")
        else:
            tell("asked to stop, but it cannot be continued, so it goes on")

    if threading.current_thread() is not threading.main_thread():  # only that one may be signalled
        yield
        return
    former = {number: signal.signal(number, answer) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
