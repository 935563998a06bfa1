"""What is printed: aligned tables for people, cut to the terminal if there is one; JSON for programs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

GAP = "  "
LEAST = 12  # characters that a shortened column keeps


def width() -> int | None:
    """Return the columns of the terminal that is printed to; None: it is none, nothing is shortened."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(rows: Sequence[Sequence[str]], indent: str = "", fit: int | None = None) -> list[str]:
    """Return rows of cells as aligned lines.

    Args:
        fit: characters of a line; the widest columns are shortened, with an ellipsis, until it fits.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if fit is not None:
        room = fit - len(indent) - len(GAP) * (len(widths) - 1)
        while sum(widths) > room and max(widths) > LEAST:
            widest = widths.index(max(widths))
            widths[widest] -= 1
    cut = [[_cut(cell, most) for cell, most in zip(row, widths, strict=True)] for row in rows]
    padded = (GAP.join(cell.ljust(most) for cell, most in zip(row, widths, strict=True)) for row in cut)
    return [f"{indent}{line}".rstrip() for line in padded]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def as_json(value: Any) -> str:
    """Return JSON, in which numbers that it has no word for (NaN, infinity) are texts."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> str:
    """Return a value of a configuration or a record as a recipe would write it, numbers in full."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain(one)}" for key, one in value.items()) + "}"
    return repr(value) if isinstance(value, float) else str(value)
