"""A disk that is full, in whatever words a library says so."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# Rust's and C++'s libraries raise errors of their own, with the system's words or its number.
SAYS = ("No space left on device", "Disk quota exceeded", *(f"os error {number}" for number in FULL))
# torch.save says only that a write came short (caffe2/serialize/inline_container.cc).
SHORT = "inline_container"
LITTLE = 2**26  # bytes that are left where such a write came short for want of room


class NoRoom(Exception):
    """There is no room left; what was finished is kept, and the same command goes on from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"no room is left where {folder} lies; make some and repeat the command, which goes on from "
            "what is whole, or choose another folder with output=PATH"
        )


def is_full(error: BaseException | None, folder: Path) -> bool:
    """Say whether an error, or one that led to it, means that the disk of a folder is full."""
    while error is not None:
        said = str(error)
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(words in said for words in SAYS):
            return True
        if SHORT in said and shutil.disk_usage(folder).free < LITTLE:
            return True
        error = error.__cause__ or error.__context__
    return False
