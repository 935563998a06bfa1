"""Another's program that makes a part of the bundle: run to its end, and why it failed as a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftpipe import room
from ftpipe.orphans import end_with_parent


def failure(
    command: Sequence[str], folder: Path, given: str = "", env: Mapping[str, str] | None = None
) -> str | None:
    """Run a program that writes into ``folder``; return its last words if it fails, else None.

    It ends when this process does, so that nothing writes on behind its back.

    Args:
        given: its standard input.
        env: variables besides those of this process.

    Raises:
        NoRoom: if the disk is full.
    """
    done = subprocess.run(
        command,
        input=given,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode == 0:
        return None
    if any(words in done.stderr for words in room.SAYS):
        raise room.NoRoom(folder)
    if done.returncode < 0:
        killed = signal.Signals(-done.returncode).name
        return f"it was ended by {killed}; the system does so where memory is short"
    return (done.stderr.strip().splitlines() or ["it says no more"])[-1]
