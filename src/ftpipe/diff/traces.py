"""Where two trainings part: the first step, and the first initial weight, that are not the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ftpipe.runs.records import Piece

TRACE = "trace.jsonl"  # of a trained artifact: an object for each step, numbers in full
INITIAL = "initial.json"  # of a trained artifact: name of a tensor -> digest


def rows(stage: str, one: Piece, other: Piece) -> list[dict[str, Any]]:
    """Return a row for the first step, and one for the first initial weight, that differ."""
    found = [*_first_weight(one.path / INITIAL, other.path / INITIAL)]
    found += _first_step(one.path / TRACE, other.path / TRACE)
    return [{"stage": stage, **row} for row in found]


def unrecorded(stage: str, one: Piece, other: Piece) -> list[str]:
    """Return lines about what one of two artifacts, or both, did not write down."""
    lines = []
    for name, what in ((TRACE, "steps"), (INITIAL, "initial weights")):
        files = {"A": one.path / name, "B": other.path / name}
        lacking = [side for side, file in files.items() if not file.is_file()]
        if lacking:
            lines.append(f"{stage}: {what} of {' and '.join(lacking)}")
    return lines


def _first_step(one: Path, other: Path) -> Iterator[dict[str, Any]]:
    """Yield the first line in which two traces differ: its step, and the keys that are not the same."""
    if not one.is_file() or not other.is_file():
        return
    with one.open(encoding="utf-8") as first, other.open(encoding="utf-8") as second:
        for number, (left, right) in enumerate(zip_longest(first, second), start=1):
            if left == right:
                continue
            a, b = _object(left), _object(right)
            keys = [key for key in dict.fromkeys([*a, *b]) if _other(a.get(key), b.get(key))]
            if keys:
                values = [{"key": key, "a": a.get(key), "b": b.get(key)} for key in keys]
                step = a.get("step", b.get("step", number))
                ends = "a" if left is None else "b" if right is None else None
                yield {"what": "step", "step": step, "values": values, "ended": ends}
                return


def _other(a: Any, b: Any) -> bool:
    both_nan = a != a and b != b
    return bool(a != b) and not both_nan


def _object(line: str | None) -> dict[str, Any]:
    """Return a line of a trace; one that cannot be read is a value of its own."""
    if line is None:
        return {}
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"line": line.rstrip("\n")}


def _first_weight(one: Path, other: Path) -> Iterator[dict[str, Any]]:
    """Yield the first tensor, in the order of the file, whose digests differ."""
    first, second = _digests(one), _digests(other)
    if first is None or second is None:
        return
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if a != b:
            values = [{"key": name, "a": a, "b": b}]
            yield {"what": "initial weights", "step": None, "values": values, "ended": None}
            return


def _digests(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
