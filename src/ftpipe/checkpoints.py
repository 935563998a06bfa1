"""Checkpoints of a training that may be killed: which one is whole, and what is left at the end.

Ranks that share out a training each write their part. When all have, the first rank seals the checkpoint
with the digest of each file. What has no seal was interrupted, and is passed over; what has one, and is
not as it says, was damaged since, and is passed over with a warning.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ftpipe.artifacts import damage, digest, sync, write_atomic
from ftpipe.choices import Strategy
from ftpipe.errors import ConfigError
from ftpipe.logs import say

CHECKPOINTS = "checkpoints"
SEAL = "whole.json"  # in each checkpoint, written last: its files, its writers, tokens seen
UNLOGGED = "unlogged-{}.json"  # in each checkpoint, of each rank: sums since the last line of metrics
ASKED = "asked"  # in a checkpoint that was not due, made by a training that was asked to stop
BEFORE = "before.json"  # what was measured before the first step, for a run that is resumed


def seal(checkpoint: Path, **stated: Any) -> None:
    """Say that a checkpoint is whole, once it is on the disk.

    Call on the first rank, when all have written.

    Args:
        stated: of it, as JSON takes it: for a Trainer's ``tokens``, ``strategy`` and ``ranks``.
    """
    written = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    for path in (*written, *(path for path in checkpoint.rglob("*") if path.is_dir())):
        sync(path)
    files = {path.relative_to(checkpoint).as_posix(): digest(path) for path in written}
    write_atomic(checkpoint / SEAL, json.dumps({**stated, "files": files}, indent=1) + "\n")
    sync(checkpoint)
    sync(checkpoint.parent)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None. Reads every byte of it.

    A damaged one is passed over with a warning: what is lost is what came after the one before.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if not (checkpoint / SEAL).is_file():
            continue
        wrong = damaged(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"WARNING: {checkpoint} is damaged ({wrong}); the one before is taken, if there is one")
    return None


def damaged(checkpoint: Path) -> str | None:
    """Return what is wrong with a sealed checkpoint, or None."""
    try:
        files: dict[str, str] = _stated(checkpoint)["files"]
    except (ValueError, KeyError, TypeError):
        return f"{SEAL} cannot be read"
    return next(damage(checkpoint, files), None)


def last_checkpoint(folder: Path, strategy: Strategy, ranks: int) -> Path | None:
    """Return the newest whole checkpoint, or None.

    A Trainer resumes from weights alone without a word, with a fresh optimiser; that is no resume.

    Raises:
        ConfigError: if this training is shared out in a way that cannot go on from it.
    """
    found = newest_whole(folder)
    if found is not None:
        stated = _stated(found)
        _check_layout(found, Strategy(stated["strategy"]), stated["ranks"], strategy, ranks)
    return found


def _check_layout(
    checkpoint: Path, wrote: Strategy, writers: int, strategy: Strategy, ranks: int
) -> None:
    """Refuse a checkpoint whose parts this training cannot read.

    Plain checkpoints and FSDP2's shards serve any number of ranks. ZeRO's are one flat piece for each
    rank that wrote them; DeepSpeed's ds_to_universal would cut them anew, which is not done here.
    """
    any_ranks = (Strategy.ddp, Strategy.fsdp)
    if wrote is strategy and (wrote in any_ranks or writers == ranks):
        return
    by = "1 rank" if writers == 1 else f"{writers} ranks"
    so = f"launch.strategy={wrote}" + ("" if wrote in any_ranks else f", with {writers} ranks in all")
    if writers == 1:
        so = "launch.processes=1, or launch.strategy=ddp with more"
    raise ConfigError(
        f"{checkpoint} was written with launch.strategy={wrote} by {by}, and this run would go on with "
        f"launch.strategy={strategy} by {ranks}; set {so}, or delete {checkpoint.parent} to begin anew."
    )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def tokens_seen(checkpoint: Path) -> int:
    return int(_stated(checkpoint)["tokens"])


def _stated(checkpoint: Path) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads((checkpoint / SEAL).read_text())
    return stated


def read_unlogged(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """Return what a rank had summed since its last line of metrics, if it is there."""
    file = checkpoint / UNLOGGED.format(rank)
    if not file.is_file():
        return None
    summed: dict[str, Any] = json.loads(file.read_text())
    return summed


def drop_torn(folder: Path, last: Path | None) -> None:
    """Remove checkpoints that a kill left in pieces or that are damaged: they count among those kept.

    Args:
        last: what the training goes on from; what is newer is not whole.
    """
    for checkpoint in folder.glob("checkpoint-*"):
        newer = last is None or step_of(checkpoint) > step_of(last)
        if newer or not (checkpoint / SEAL).is_file():
            remove(checkpoint)


def keep_newest(folder: Path, keep: int | None) -> None:
    """Remove all checkpoints but the newest so many; None: none."""
    if keep is not None:
        for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of)[:-keep]:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. Its seal goes first: one that is half removed is no damaged one."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def write_unlogged(checkpoint: Path, rank: int, summed: dict[str, Any], due: bool) -> None:
    """Write what a rank has summed since its last line of metrics; call before ``seal``.

    Args:
        due: a run which nothing interrupts has this checkpoint, too.
    """
    write_atomic(checkpoint / UNLOGGED.format(rank), json.dumps(summed, default=float))
    if not due:
        (checkpoint / ASKED).touch()


def drop_asked(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints that a run which nothing interrupts would not have, except one."""
    for mark in folder.glob(f"checkpoint-*/{ASKED}"):
        if mark.parent != but:
            remove(mark.parent)


def read_before(out: Path) -> dict[str, Any] | None:
    """Return what was measured before the first step of the run that is continued, if it is there."""
    if not (out / BEFORE).is_file():
        return None
    measured: dict[str, Any] = json.loads((out / BEFORE).read_text())
    return measured


def write_before(out: Path, measured: dict[str, Any]) -> None:
    write_atomic(out / BEFORE, json.dumps(measured))


def tidy(out: Path) -> None:
    """Leave safetensors and text: shards, optimiser states and pickles served only a resume."""
    for folder in out.rglob(CHECKPOINTS):
        drop_asked(folder)
    for path in out.rglob("*"):
        left = path.suffix in (".bin", ".pt", ".pth") or path.match(UNLOGGED.format("*"))
        if left or path.name == BEFORE:
            path.unlink()
    for folder in out.rglob(CHECKPOINTS):
        (folder / "README.md").unlink(missing_ok=True)
        for checkpoint in folder.iterdir():
            if not list(checkpoint.glob("*.safetensors")):
                shutil.rmtree(checkpoint)
            else:
                (checkpoint / SEAL).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
