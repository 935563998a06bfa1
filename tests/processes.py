"""Processes of a run that a test kills: found by what they run and where."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for the moment to kill a driver at, which it must live to see."""
    for _ in range(12000):
        if holds():
            return
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("it took more than two minutes")


def kill_workers() -> None:
    """Kill the ranks that work in this folder, without warning: only then is a journal's line torn."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            here = (entry / "cwd").resolve(strict=True) == Path.cwd().resolve()
        except OSError:
            continue
        if here and b"ftpipe.worker" in words and int(entry.name) != os.getpid():
            os.kill(int(entry.name), signal.SIGKILL)
