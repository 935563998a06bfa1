"""What two sides have not in common: section by section, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftpipe.combinations import TRAIN
from ftpipe.diff import traces
from ftpipe.diff.sides import At, Side
from ftpipe.pipeline import is_pinned
from ftpipe.runs import records
from ftpipe.runs.records import Piece

Row = dict[str, Any]

# Metrics that measure the machine, not the result: no two runs have them in common.
SPEED = re.compile(r"(^|_)seconds(_|$)|per_second|_gib$")
# Files that hold times, and what the checkout looked like, which is a matter of the code.
DIFF = "uncommitted.diff"
TIMED = ("metrics.jsonl", DIFF)


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Return what differs, for ``--json``; docs/runs.md has the keys."""
    pairs, unmade = _pairs(a, b)
    trained = [pair for pair in pairs if pair[0] in TRAIN]  # these leave a trace
    untold = [line for line in unmade if line.split(":")[0] in TRAIN]
    sections: dict[str, dict[str, list[Any]]] = {
        "stages": {"rows": list(_stages(a, b)), "not_recorded": []},
        "config": {"rows": list(_config(a, b)), "not_recorded": []},
        "data": _section(a, b, lambda at: at.group("pins"), lambda at: bool(at.facts)),
        "environment": _section(a, b, lambda at: _environment(at.piece), _is_made),
        "code": _section(a, b, _code, _is_made),
        "trace": {
            "rows": [row for pair in trained for row in traces.rows(*pair)],
            "not_recorded": untold + [line for pair in trained for line in traces.unrecorded(*pair)],
        },
        "results": {"rows": [row for pair in pairs for row in _results(*pair)], "not_recorded": unmade},
    }
    return {
        "version": 1,
        "a": {"kind": a.kind, "name": a.name, "notes": list(a.notes)},
        "b": {"kind": b.kind, "name": b.name, "notes": list(b.notes)},
        "same": not any(section["rows"] for section in sections.values()),
        **sections,
    }


def _both(a: Side, b: Side) -> list[str]:
    """Return the stages of both sides, in order."""
    return list(dict.fromkeys([*a.stages, *b.stages]))


def _is_made(at: At) -> bool:
    return at.piece is not None and at.piece.artifact is not None


def _pairs(a: Side, b: Side) -> tuple[list[tuple[str, Piece, Piece]], list[str]]:
    """Return the stages that both sides have made, and lines about those that one or both have not."""
    pairs, unmade = [], []
    for stage in _both(a, b):
        ats = [side.stages[stage] for side in (a, b) if stage in side.stages]
        pieces = [at.piece for at in ats if at.piece and at.piece.artifact]
        if len(pieces) == 2:
            pairs.append((stage, pieces[0], pieces[1]))
        elif len(ats) == 2:
            unmade.append(f"{stage}: {_lack(ats, _is_made)}")
    return pairs, unmade


def _lack(ats: Sequence[At], has: Callable[[At], bool]) -> str:
    """Return which of two sides has not made a stage."""
    return f"not made in {' and '.join(side for side, at in zip('AB', ats, strict=True) if not has(at))}"


def _stages(a: Side, b: Side) -> Iterator[Row]:
    """Yield the stages whose fingerprints differ, and what of their facts is the cause."""
    for stage in _both(a, b):
        one, other = a.stages.get(stage), b.stages.get(stage)
        prints = [at.fingerprint if at else None for at in (one, other)]
        there = [at is not None for at in (one, other)]
        if prints[0] != prints[1] or there[0] != there[1]:
            because = _because(one, other) if one and other else []
            yield {"stage": stage, "a": prints[0], "b": prints[1], "there": there, "because": because}


def _because(one: At, other: At) -> list[str]:
    """Return the facts that differ: ``version``, ``seed``, ``config sft.epochs``, ``inputs dataset``."""
    if not one.facts or not other.facts:
        return []
    first, second = ({**records.flat(_facts(at))} for at in (one, other))
    return [
        key.replace(".", " ", 1)
        for key in dict.fromkeys([*first, *second])
        if (key in first, first.get(key)) != (key in second, second.get(key))
    ]


def _facts(at: At) -> dict[str, Any]:
    return {key: value for key, value in at.facts.items() if key != "stage" and value != {}}


def _config(a: Side, b: Side) -> Iterator[Row]:
    for key in dict.fromkeys([*a.config, *b.config]):
        values = [(key in side.config, side.config.get(key)) for side in (a, b)]
        if values[0] == values[1]:
            continue
        yield {
            "key": key,
            "a": a.config.get(key),
            "b": b.config.get(key),
            "there": [there for there, _ in values],
            "decides": _decides(key, a, b),
            "matters": _matters(key, a, b),
            "origin": [side.origins.get(key) for side in (a, b)],
        }


def _decides(key: str, a: Side, b: Side) -> list[str]:
    """Return the stages whose fingerprint holds the value of a key."""
    found = []
    for stage in _both(a, b):
        ats = [side.stages[stage] for side in (a, b) if stage in side.stages]
        if any(key in at.group("config") or (key == "seed" and "seed" in at.facts) for at in ats):
            found.append(stage)
    return found


def _matters(key: str, a: Side, b: Side) -> str:
    """Return whether a key's value decides, what lies there decides, or neither does, or is not told."""
    if _decides(key, a, b):
        return "value"
    if is_pinned(key):
        return "content"
    told = any(at.facts for side in (a, b) for at in side.stages.values())
    return "no" if told else "not recorded"


def _section(
    a: Side, b: Side, of: Callable[[At], Mapping[str, Any]], told: Callable[[At], bool]
) -> dict[str, list[Any]]:
    """Return the keys that differ, each once with the stages in which it does so."""
    found: dict[tuple[str, str], Row] = {}
    lacking = []
    for stage in _both(a, b):
        if stage not in a.stages or stage not in b.stages:
            continue
        one, other = a.stages[stage], b.stages[stage]
        if not told(one) or not told(other):
            lacking.append(f"{stage}: {_lack((one, other), told)}")
            continue
        first, second = of(one), of(other)
        for key in dict.fromkeys([*first, *second]):
            if first.get(key) != second.get(key):
                row: Row = {"key": key, "a": first.get(key), "b": second.get(key), "stages": []}
                found.setdefault((key, repr((row["a"], row["b"]))), row)["stages"].append(stage)
    return {"rows": list(found.values()), "not_recorded": lacking}


def _environment(piece: Piece | None) -> dict[str, Any]:
    """Return Python, packages, hardware and ranks, by dotted key."""
    record = piece.told("provenance") if piece else {}
    kept = ("python", "packages", "hardware", "world_size")
    return records.flat({key: record[key] for key in kept if key in record})


def _code(at: At) -> dict[str, Any]:
    """Return the version of the stage, the commit, and the digests of lock files and sources."""
    record = at.piece.told("provenance") if at.piece else {}
    kept = {
        name: record[name] for name in ("git", "lock", "source") if isinstance(record.get(name), dict)
    }
    # names of files hold dots of their own
    named = {f"{group}.{key}": value for group, values in kept.items() for key, value in values.items()}
    changes = at.piece.told("files").get(DIFF) if at.piece else None
    return {"version": at.facts.get("version"), **named, DIFF: changes}


def _results(stage: str, one: Piece, other: Piece) -> Iterator[Row]:
    """Yield metrics that differ; of one fingerprint, files that differ as well."""
    for name in dict.fromkeys([*one.metrics, *other.metrics]):
        a, b = one.metrics.get(name), other.metrics.get(name)
        if SPEED.search(name) or a == b or (a != a and b != b):
            continue
        difference = None if a is None or b is None else b - a
        yield {"key": f"{stage}/{name}", "a": a, "b": b, "difference": difference}
    if one.fingerprint != other.fingerprint:
        return
    first, second = one.told("files"), other.told("files")
    for name in sorted({*first, *second} - {*TIMED}):
        if first.get(name) != second.get(name):
            key = f"{stage}: {name}"
            yield {"key": key, "a": first.get(name), "b": second.get(name), "difference": None}
