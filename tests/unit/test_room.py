"""A full disk is known by what each library says of it, and nothing else is taken for one."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftpipe import room


def led_to(first: Exception, then: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception as error:
            raise then from error
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        # as safetensors 0.8 says it
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            True,
        ),
        (led_to(OSError(errno.ENOSPC, "x"), RuntimeError("cannot save")), True),
        (RuntimeError("CUDA out of memory"), False),
        (None, False),
    ],
)
def test_what_means_a_full_disk(error: Exception | None, full: bool, tmp_path: Path) -> None:
    assert room.is_full(error, tmp_path) is full


@pytest.mark.parametrize(("free", "full"), [(0, True), (2**40, False)])
def test_a_write_of_torch_that_came_short_is_one_where_little_is_left(
    free: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert room.is_full(error, tmp_path) is full
