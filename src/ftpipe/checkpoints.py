"""Checkpoints of a training that may be killed: which one is whole, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ftpipe.artifacts import write_atomic

CHECKPOINTS = "checkpoints"
TOKENS = "tokens.json"  # in each checkpoint: how many tokens were seen
UNLOGGED = "unlogged-{}.json"  # in each checkpoint, of each rank: sums since the last line of metrics
ASKED = "asked"  # in a checkpoint that was not due, made by a training that was asked to stop
BEFORE = "before.json"  # what was measured before the first step, for a run that is resumed


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None.

    A Trainer resumes from weights alone without a word, with a fresh optimiser; that is no resume.
    """
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def tokens_seen(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / TOKENS).read_text())["tokens"])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # the last file to be written
    except (OSError, json.JSONDecodeError):
        return False
    states = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", TOKENS)
    return all(list(checkpoint.glob(name)) for name in states)


def read_unlogged(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """Return what a rank had summed since its last line of metrics, if it is there."""
    file = checkpoint / UNLOGGED.format(rank)
    if not file.is_file():
        return None
    summed: dict[str, Any] = json.loads(file.read_text())
    return summed


def drop_asked(folder: Path) -> None:
    """Remove the checkpoints that a run which nothing interrupts would not have."""
    for mark in folder.glob(f"checkpoint-*/{ASKED}"):
        shutil.rmtree(mark.parent)


def read_before(out: Path) -> dict[str, Any] | None:
    """Return what was measured before the first step of the run that is continued, if it is there."""
    if not (out / BEFORE).is_file():
        return None
    measured: dict[str, Any] = json.loads((out / BEFORE).read_text())
    return measured


def write_before(out: Path, measured: dict[str, Any]) -> None:
    write_atomic(out / BEFORE, json.dumps(measured))


def tidy(out: Path) -> None:
    """Leave safetensors and text: optimiser states and pickles served only a resume."""
    for folder in out.rglob(CHECKPOINTS):
        drop_asked(folder)
    for path in out.rglob("*"):
        left = path.suffix in (".bin", ".pt", ".pth") or path.match(UNLOGGED.format("*"))
        if left or path.name == BEFORE:
            path.unlink()
    for folder in out.rglob(CHECKPOINTS):
        (folder / "README.md").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
