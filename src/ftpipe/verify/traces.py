"""Two traces of one training: the first weight and the first step where they part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftpipe.choices import Precision
from ftpipe.trace import INITIAL, TRACE, read
from ftpipe.verify.findings import Finding, Layer

# How far a number of a step may be off on other hardware, as a share of it: sums in another order, in
# these bits, grown over the first steps. What a bug does to a loss is far beyond.
TOLERANCE = {Precision.fp32: 1e-3, Precision.bf16: 3e-2, Precision.fp16: 3e-2}
WORDS = {"data": "its rows", "learning_rate": "learning rate", "grad_norm": "gradient norm"}
CAUSES = ("data", "learning_rate", "loss")  # of a step, in this order; the rest follows from them
NONE = "no step is on record"
EXACT = ("data", "learning_rate")  # on any hardware


def initial(recorded: Path, made: Path, stage: str) -> tuple[str, list[Finding]]:
    """Return how many weights two artifacts began with, and the ones that differ.

    Args:
        recorded, made: folders that hold ``initial.json``.
    """
    one, other = (_digests(folder / INITIAL) for folder in (recorded, made))
    found = [
        Finding(Layer.weights, stage, f"{name} {_how(one.get(name), other.get(name))}")
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    return f"{len(one):,} weights", found


def _how(recorded: str | None, made: str | None) -> str:
    if recorded is None:
        return "is new here"
    return "is missing here" if made is None else f"is other ({recorded}, now {made})"


def _digests(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def steps(
    recorded: Path, made: Path, stage: str, most: int | None, tolerance: float
) -> tuple[str, list[Finding]]:
    """Return which steps were compared, and what differs in the first that does.

    Args:
        recorded, made: folders that hold ``trace.jsonl``.
        most: the last step compared; None: all on record.
        tolerance: share that a number may be off; 0: it must be the same to the last bit.
    """
    lines = {
        line["step"]: line for line in read(recorded / TRACE) if most is None or line["step"] <= most
    }
    again = {line["step"]: line for line in read(made / TRACE)}
    what = _span(list(lines))
    found: list[Finding] = []
    for step, line in lines.items():
        if step not in again:
            found.append(Finding(Layer.steps, stage, f"step {step} was not made"))
            break
        off = _line(line, again[step], step, stage, tolerance)
        found += off
        if any(not one.tolerated for one in off):
            break
    return what, found


def _span(steps: Sequence[int]) -> str:
    if not steps:
        return NONE
    return f"{len(steps):,} on record from step {min(steps)} to {max(steps)}"


def _line(
    one: Mapping[str, Any], other: Mapping[str, Any], step: int, stage: str, tolerance: float
) -> list[Finding]:
    """Return what differs in a step, its causes first."""
    names = sorted(one.keys() - {"step"}, key=lambda name: (*(name != cause for cause in CAUSES), name))
    found = []
    for name in names:
        a, b = one[name], other.get(name)
        if _same(a, b):
            continue
        off = _off(a, b)
        how = f" ({off:.1e} of it)" if off is not None else ""
        says = f"step {step}: {WORDS.get(name, name)} {a} is recorded, {b} made{how}"
        close = name not in EXACT and off is not None and off <= tolerance
        found.append(Finding(Layer.steps, stage, says, tolerated=close))
    return found


def _same(a: Any, b: Any) -> bool:
    both = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both or bool(a == b)


def _off(a: Any, b: Any) -> float | None:
    """Return the difference of two numbers as a share of the first; None for what is no number."""
    if not all(isinstance(value, int | float) for value in (a, b)):
        return None
    if not all(math.isfinite(value) for value in (a, b)):
        return math.inf
    return float(abs(a - b) / abs(a)) if a else math.inf
