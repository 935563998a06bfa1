"""``ftpipe diff A B``: reads the words, prints what differs, in tables or as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ftpipe import printing, schema
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
    lines = [_head(side.upper(), found[side]) for side in ("a", "b")]
    lines += [f"{side.upper()}: {note}" for side in ("a", "b") for note in found[side]["notes"]]
    for name, table in TABLES.items():
        rows = found[name]["rows"]
        if rows:
            lines += ["", name, *printing.table(table(rows), indent="  ", fit=fit)]
    untold = _unrecorded({name: found[name]["not_recorded"] for name in TABLES})
    lines += ["", *untold] if untold else []
    return [*lines, "", "no difference"] if found["same"] else lines


def _head(letter: str, side: Mapping[str, Any]) -> str:
    named = side["name"] if side["kind"] == "recipe" else f"{side['kind']} {side['name']}"
    return f"{letter}  {named}"


def _unrecorded(sections: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each thing that is not told, with all the sections and stages that lack it."""
    of: dict[str, dict[str, list[str]]] = {}  # why -> section -> stages
    for name, lines in sections.items():
        for line in lines:
            stage, _, why = line.partition(": ")
            of.setdefault(why, {}).setdefault(name, []).append(stage)
    grouped: dict[tuple[str, str], list[str]] = {}
    for why, lacking in of.items():
        for name, stages in lacking.items():
            grouped.setdefault((why, ", ".join(stages)), []).append(name)
    return [
        f"not recorded: {', '.join(names)} of {stages} ({why})"
        for (why, stages), names in grouped.items()
    ]


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
        because = dict.fromkeys(_short(fact) for fact in row["because"])
        table.append([row["stage"], *prints, ", ".join(because)])
    return table


def _short(fact: str) -> str:
    """Return a fact, or that of a whole source where it is of a part of one.

    >>> _short("config data.sources.mine.format"), _short("config sft.epochs")
    ('config data.sources.mine', 'config sft.epochs')
    """
    what, _, key = fact.partition(" ")
    return f"{what} {_named(key) or key}" if key else what


def _named(key: str) -> str | None:
    """Return the key of the entry that a key is of, where the user chooses the names of entries."""
    parts = key.split(".")
    for end in range(1, len(parts) - 1):
        if schema.is_dict(".".join(parts[:end])):
            return ".".join(parts[: end + 1])
    return None


def _config(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["key", "A", "B", "decides"]]
    told = {"value": "", "content": "what lies there", "no": "nothing", "not recorded": "not recorded"}
    for key, group in _entries(rows).items():
        cells = [_cell(key, group, side) for side in (0, 1)]
        stages = dict.fromkeys(stage for row in group for stage in row["decides"])
        table.append([key, *cells, ", ".join(stages) or told[group[0]["matters"]]])
    return table


def _entries(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows by key; those of an entry, such as a source, that one side lacks are together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        entry = None if all(row["there"]) else _named(row["key"])
        found.setdefault(entry or row["key"], []).append(row)
    return found


def _cell(key: str, group: Sequence[Mapping[str, Any]], side: int) -> str:
    """Return a value with where it comes from; of an entry, the values that are not its defaults."""
    if len(group) == 1:
        (row,) = group
        origin = row["origin"][side]
        return _value(row["ab"[side]], row["there"][side]) + (f" ({origin})" if origin else "")
    if not any(row["there"][side] for row in group):
        return ABSENT
    kind = schema.field_type(key)
    defaults = vars(kind()) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else {}
    values = {row["key"].removeprefix(f"{key}."): row["ab"[side]] for row in group}
    own = {name: value for name, value in values.items() if value != defaults.get(name, {})}
    return _value(own)


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


TABLES = {
    "stages": _stages,
    "config": _config,
    "data": _by_stage,
    "environment": _by_stage,
    "code": _by_stage,
    "trace": _trace,
    "results": _results,
}
