"""The report of an evaluation: the table first, as Markdown, as JSON, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ftpipe.artifacts import write_atomic
from ftpipe.evaluation.scores import CONFIDENCE, Interval, Score
from ftpipe.evaluation.table import Row, Tally

MARKDOWN, JSON, PLOT = "report.md", "report.json", "report.png"
LEAST = 5  # questions of a category, else its win rate says next to nothing (report.json has it)
DASH = "-"  # there is no such number

# What each way to an interval takes for granted, in a sentence.
MEANS: Mapping[Interval, str] = {
    Interval.wilson: "Wilson's score interval of a share of independent observations",
    Interval.wilson_clustered: "Wilson's, with the effective number of observations: those of one "
    "question (or prompt) count as dependent",
    Interval.t_clustered: "a ratio of sums over clusters (conversations, questions), with Student's t",
    Interval.t_paired: "the difference on the same clusters, so what is hard for both drops out; "
    "with Student's t",
    Interval.unpaired: "the difference from both intervals as if of independent samples: too wide, "
    "since the questions are the same",
    Interval.normal: "normal, from the standard error that lm-evaluation-harness states",
    Interval.stratified: "normal, of a mean over fixed subjects, each with a sample of questions",
}


def write(
    out: Path,
    policies: Mapping[str, str | None],
    table: Sequence[Row],
    tallies: Sequence[Tally],
    notes: Sequence[str],
) -> dict[str, Path]:
    """Write ``report.md``, ``report.json`` and ``report.png``; return the pictures by name.

    Args:
        policies: in their order, each with the one that it came from.
        notes: sentences about what was measured and how.
    """
    write_atomic(out / JSON, json.dumps(plain(policies, table, tallies, notes), indent=1) + "\n")
    write_atomic(out / MARKDOWN, markdown(table, tallies, notes))
    return _plot(out, table, tallies)


def plain(
    policies: Mapping[str, str | None],
    table: Sequence[Row],
    tallies: Sequence[Tally],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return the report as JSON holds it; what is not finite is null."""
    measures: dict[str, dict[str, Any]] = {}
    for line in table:
        entry = _score(line.score) | {"before": line.before}
        if line.change is not None:
            entry["change"] = _score(line.change)
        measures.setdefault(line.score.name, {})[line.policy] = entry
    judgements = [
        asdict(tally)
        | {
            "score": None if tally.score is None else _score(tally.score),
            "categories": {name: _score(score) for name, score in tally.categories.items()},
        }
        for tally in tallies
    ]
    return {
        "confidence": CONFIDENCE,
        "policies": dict(policies),
        "measures": measures,
        "judgements": judgements,
        "notes": list(notes),
    }


def _score(score: Score) -> dict[str, Any]:
    entry = asdict(score)
    del entry["name"]
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def markdown(table: Sequence[Row], tallies: Sequence[Tally], notes: Sequence[str]) -> str:
    """Return the report for a person: the table of before and after, the judgements, what it means."""
    parts = ["# Evaluation\n"]
    if table:
        parts += [_table(MEASURED, [cells(line) for line in table])]
    if tallies:
        parts += ["## Which answer is better\n", _table(JUDGED, [judged(one) for one in tallies])]
        parts += _by_category(tallies)
    parts += ["## How to read it\n"]
    parts += ["\n".join(f"- {note}" for note in [*notes, *_means(table, tallies)]) + "\n"]
    return "\n".join(parts)


MEASURED = ("measure", "policy", "value", f"{CONFIDENCE:.0%} interval", "n", "change", "its interval")
JUDGED = (
    *("pair", "judge", "won", "tied", "lost", "win rate", f"{CONFIDENCE:.0%} interval", "questions"),
    *("same in both orders", "unreadable"),
)


def cells(line: Row) -> tuple[str, ...]:
    """Return the cells of a line of the table of before and after."""
    score, change = line.score, line.change
    moved = DASH if change is None else f"{_number(change.value, signed=True)} over {line.before}"
    return (
        f"{score.name} ({score.unit})",
        line.policy,
        _number(score.value),
        _interval(score),
        f"{score.n:,}",
        moved,
        DASH if change is None else _interval(change, signed=True),
    )


def judged(tally: Tally) -> tuple[str, ...]:
    """Return the cells of a pair under a judge."""
    score = tally.score
    return (
        f"{tally.one} over {tally.other}",
        tally.judge,
        f"{tally.wins:,}",
        f"{tally.ties:,}",
        f"{tally.losses:,}",
        DASH if score is None else _number(score.value),
        DASH if score is None else _interval(score),
        "0" if score is None else f"{score.n:,}",
        DASH if tally.agreed is None else f"{tally.agreed:.0%}",
        f"{tally.unparsable:,}",
    )


def _by_category(tallies: Sequence[Tally]) -> list[str]:
    """Return the win rates of each category, where there are several with enough questions."""
    rows = [
        (f"{tally.one} over {tally.other}", tally.judge, name, _number(score.value), _interval(score))
        for tally in tallies
        if len(tally.categories) > 1
        for name, score in tally.categories.items()
        if score.n >= LEAST
    ]
    head = ("pair", "judge", "category", "win rate", f"{CONFIDENCE:.0%} interval")
    return ["### By category\n", _table(head, rows)] if rows else []


def _means(table: Sequence[Row], tallies: Sequence[Tally]) -> list[str]:
    """Return a sentence for each kind of interval that is in the report."""
    used = [line.score.interval for line in table]
    used += [line.change.interval for line in table if line.change is not None]
    used += [tally.score.interval for tally in tallies if tally.score is not None]
    return [f"{kind}: {MEANS[kind]}." for kind in dict.fromkeys(used) if kind in MEANS]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


def _interval(score: Score, signed: bool = False) -> str:
    if score.low is None or score.high is None:
        return DASH
    return f"{_number(score.low, signed)} to {_number(score.high, signed)}"


def _number(value: float, signed: bool = False) -> str:
    """Return a number with four decimals, or fewer where it is large."""
    if not math.isfinite(value):
        return str(value)
    decimals = 4 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''},.{decimals}f}"


def _plot(out: Path, table: Sequence[Row], tallies: Sequence[Tally]) -> dict[str, Path]:
    """Draw each measure of several policies and all win rates, with their intervals."""
    measures: dict[str, list[tuple[str, Score]]] = {}
    for line in table:
        ends = (line.score.value, line.score.low or 0.0, line.score.high or 0.0)
        if all(map(math.isfinite, ends)):
            name = f"{line.score.name} ({line.score.unit})"
            measures.setdefault(name, []).append((line.policy, line.score))
    rates = [
        (f"{tally.one} over {tally.other}\n({tally.judge})", tally.score)
        for tally in tallies
        if tally.score is not None
    ]
    drawn = {name: found for name, found in measures.items() if len(found) > 1}
    drawn |= {"win rate (share)": rates} if rates else {}
    if not drawn:
        return {}
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
        for place, (name, found) in enumerate(drawn.items(), start=1):
            _bars(figure.add_subplot(rows, columns, place), name, found)
        figure.savefig(out / PLOT, dpi=120, metadata={"Software": None})
    return {PLOT.removesuffix(".png"): out / PLOT}


def _bars(axes: Axes, name: str, found: Sequence[tuple[str, Score]]) -> None:
    values = [score.value for _, score in found]
    ends = [
        (score.value, score.value)
        if score.low is None or score.high is None
        else (score.low, score.high)
        for _, score in found
    ]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    places = range(len(found))
    axes.errorbar(places, values, yerr=[below, above], fmt="o", color="tab:blue", capsize=4)
    axes.set_xticks(list(places), [label for label, _ in found])
    axes.set(title=name, xlim=(-0.5, len(found) - 0.5))
    if name.startswith("win rate"):
        axes.axhline(0.5, linestyle="--", color="0.5")
