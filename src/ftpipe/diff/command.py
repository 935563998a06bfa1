"""``ftpipe diff A B``: reads the words, prints what differs, in tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftpipe import printing
from ftpipe.diff import compare, sides
from ftpipe.diff.sides import Compose

DIFFERENT = 1  # exit code, as of diff(1)
ABSENT = "-"


def main(words: Sequence[str], compose: Compose) -> int:
    """Print what two sides have not in common; return 0 if they are the same, else 1.

    Args:
        compose: returns the configurations of a recipe and its overrides.

    Raises:
        UserError: for words that name nothing, or not two things.
    """
    given, output, machine = sides.parse(words)
    a, b = (sides.read(one, output, compose) for one in given)
    found = compare.compare(a, b)
    print(printing.as_json(found) if machine else "\n".join(shown(found, printing.width())))
    return 0 if found["same"] else DIFFERENT


def shown(found: Mapping[str, Any], fit: int | None = None) -> list[str]:
    """Return the lines for people: a table for each section in which something differs.

    Args:
        fit: characters of a line; None: nothing is shortened.
    """
    lines = [f"{side.upper()}  {found[side]['kind']} {found[side]['name']}" for side in ("a", "b")]
    lines += [f"{side.upper()}: {note}" for side in ("a", "b") for note in found[side]["notes"]]
    tables = {
        "stages": _stages,
        "config": _config,
        "data": _by_stage,
        "environment": _by_stage,
        "code": _by_stage,
        "trace": _trace,
        "results": _results,
    }
    for name, table in tables.items():
        section = found[name]
        drawn = printing.table(table(section["rows"]), indent="  ", fit=fit) if section["rows"] else []
        drawn += _unrecorded(section["not_recorded"])
        lines += ["", name, *drawn] if drawn else []
    return [*lines, "", "no difference"] if found["same"] else lines


def _unrecorded(lines: Sequence[str]) -> list[str]:
    """Return a line for each reason, with all the stages that it holds for."""
    stages: dict[str, list[str]] = {}
    for line in lines:
        stage, _, why = line.partition(": ")
        stages.setdefault(why, []).append(stage)
    return [f"  not recorded: {', '.join(of)} ({why})" for why, of in stages.items()]


def _value(value: Any, there: bool = True) -> str:
    return printing.plain(value) if there else ABSENT


def _known(value: Any) -> str:
    """Return a recorded value, which is never null unless it is not there."""
    return ABSENT if value is None else printing.plain(value)


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the fingerprints that differ, and why: the facts that are not the same."""
    table = [["stage", "A", "B", "decided by"]]
    for row in rows:
        prints = [
            (row[side] or "not planned") if there else ABSENT
            for side, there in zip("ab", row["there"], strict=True)
        ]
        table.append([row["stage"], *prints, ", ".join(row["because"])])
    return table


def _config(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["key", "A", "B", "decides"]]
    for row in rows:
        told = {"content": "what lies there", "no": "nothing", "not recorded": "not recorded"}
        decides = ", ".join(row["decides"]) or told[row["matters"]]
        table.append(
            [
                row["key"],
                *(
                    _value(row[side], there) + (f" ({origin})" if origin else "")
                    for side, there, origin in zip("ab", row["there"], row["origin"], strict=True)
                ),
                decides,
            ]
        )
    return table


def _by_stage(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["key", "A", "B", "of"]]
    return table + [
        [row["key"], _known(row["a"]), _known(row["b"]), ", ".join(row["stages"])] for row in rows
    ]


def _trace(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["first that differs", "key", "A", "B"]]
    for row in rows:
        where = f"{row['stage']}, {row['what']}" + ("" if row["step"] is None else f" {row['step']}")
        if row["ended"]:
            where += f" ({row['ended'].upper()} has ended)"
        for value in row["values"]:
            table.append([where, value["key"], _known(value["a"]), _known(value["b"])])
            where = ""
    return table


def _results(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["result", "A", "B", "B - A"]]
    for row in rows:
        difference = "" if row["difference"] is None else f"{row['difference']:+.6g}"
        table.append([row["key"], _known(row["a"]), _known(row["b"]), difference])
    return table
