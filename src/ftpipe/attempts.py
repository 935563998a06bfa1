"""Who made an artifact that was interrupted and continued: what each attempt had that the last had not.

Plain checkpoints serve any number of ranks, and any version of a package that reads them, so attempts at
one stage may differ. Each says what it has when it begins; the manifest tells what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftpipe.artifacts import sync, write_atomic
from ftpipe.checkpoints import SEAL

FILE = "attempts.jsonl"  # in the scratch folder
PARTS = ("packages", "source")  # of provenance, told value by value
SPLIT = ("micro_batch_size", "strategy")  # of launch

Facts = dict[str, Any]


def facts(record: Mapping[str, Any], launch: Mapping[str, Any], ranks: int) -> Facts:
    """Return what an attempt has, by name."""
    found: Facts = {"python": record["python"], "ranks": ranks}
    found |= {f"{part}.{name}": value for part in PARTS for name, value in record[part].items()}
    found |= {f"hardware.{name}": record["hardware"].get(name) for name in ("cpu", "gpus")}
    return found | {f"launch.{name}": launch[name] for name in SPLIT}


def begin(partial: Path, now: Facts, keeps: str) -> Facts:
    """Put an attempt on record; return what the one it goes on from had otherwise.

    Args:
        keeps: pattern of what an attempt leaves besides checkpoints; those of attempts that left nothing
            are of no account.
    """
    left = any(partial.rglob(SEAL)) or bool(keeps and any(partial.glob(keeps)))
    before = read(partial) if left else []
    lines = "".join(json.dumps(one) + "\n" for one in [*before, now])
    write_atomic(partial / FILE, lines)
    sync(partial)
    return unlike(before[-1], now) if before else {}


def unlike(before: Facts, now: Facts) -> Facts:
    """Return what is other in an earlier attempt, with the value it had; None where it had none."""
    names = dict.fromkeys([*before, *now])
    return {name: before.get(name) for name in names if before.get(name) != now.get(name)}


def read(partial: Path) -> list[Facts]:
    """Return all attempts that left something, the last one last."""
    path = partial / FILE
    if not path.is_file():
        return []
    return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def conclude(partial: Path) -> list[Facts]:
    """Return what each earlier attempt had otherwise than the last; remove the file."""
    *before, last = read(partial) or [{}]
    (partial / FILE).unlink(missing_ok=True)
    return [unlike(one, last) for one in before]
