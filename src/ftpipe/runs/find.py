"""Which run, artifact or runs a person means: by folder, by the beginning of a name, by conditions."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftpipe import schema
from ftpipe.artifacts import MANIFEST
from ftpipe.errors import ConfigError, UserError, nearest
from ftpipe.runs import records
from ftpipe.runs.records import RUN, Piece, Run

SHOWN = 5  # names in a sentence
# No key begins with a dot or a slash, so a path with '=' in it can be given as ./a=b.
CONDITION = re.compile(r"(?P<key>[A-Za-z_][\w./-]*?)(?P<how><=|>=|!=|=|<|>)(?P<value>.*)", re.DOTALL)
HOW: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
STAGE_METRIC = re.compile(r"[a-z_]+/.+")


def run(word: str, output: Path) -> Run:
    """Return the run of a folder, or the one below ``output/runs`` whose name begins so.

    Raises:
        UserError: if there is none, or there are several.
    """
    found = anything(word, output)
    if isinstance(found, Piece):
        raise UserError(f"{word} is an artifact; give a run, such as one that `ftpipe runs` lists.")
    return found


def anything(word: str, output: Path) -> Run | Piece:
    """Return a run or an artifact: by its folder, or by the beginning of its name in ``output``.

    A whole name goes before a beginning, and runs go before artifacts.

    Raises:
        UserError: if there is none, or there are several.
    """
    folder = Path(word)
    if folder.is_dir():
        if (folder / RUN).is_file():
            return records.read_run(folder)
        if (folder / MANIFEST).is_file():
            return records.opened(folder if folder.name else folder.absolute())
        if not (output / "runs" / word).is_dir() and not (output / "artifacts" / word).is_dir():
            raise UserError(
                f"{word} is the folder of no run (it has no {RUN}) and of no artifact (no {MANIFEST})."
            )
    runs = sorted(
        path.parent.name for path in output.glob(f"runs/*/{RUN}") if records.is_shown(path.parent)
    )
    made = records.artifact_names(output)
    for names in (runs, made):
        found = [name for name in names if name == word]
        found = found or [name for name in names if name.startswith(word)]
        if len(found) > 1:
            raise UserError(f"{word} could be any of {listed(found)}; give more of the name.")
        if found:
            return (
                records.read_run(output / "runs" / found[0])
                if names is runs
                else records.look(output, found[0])
            )
    if not runs and not made:
        raise UserError(f"there is no run {word}: {output} holds none; say where with output=PATH.")
    raise UserError(f"there is no run {word} in {output}.{nearest(word, [*runs, *made])}")


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Condition:
    """One that a run must meet: ``recipe=tiny``, ``fingerprint=ab12``, ``sft/loss<2``, ``seed=1``."""

    key: str
    how: str
    value: str

    def holds(self, run: Run) -> bool:
        if self.key == "fingerprint":
            prints = [piece.fingerprint for piece in run.pieces.values() if piece]
            return any(print_.startswith(self.value) for print_ in prints) is (self.how == "=")
        known = facts(run)
        return self.key in known and compare(known[self.key], self.how, self.value)


def facts(run: Run) -> dict[str, Any]:
    """Return what a condition can ask of a run: its configuration, and metrics as ``stage/name``."""
    known = records.flat(run.config) | {"recipe": run.recipe}
    for stage, piece in run.made().items():
        known |= {f"{stage}/{name}": value for name, value in piece.metrics.items()}
    return known


def compare(known: Any, how: str, wanted: str) -> bool:
    """Say whether a known value stands to a word as asked; text has no order, and NaN equals nothing."""
    if how in HOW:
        try:
            return not isinstance(known, bool) and HOW[how](float(known), float(wanted))
        except (TypeError, ValueError):
            return False
    return _equal(known, wanted) is (how == "=")


def _equal(known: Any, wanted: str) -> bool:
    if known is None or isinstance(known, bool):
        return str(known).lower() == wanted.lower() or (known is None and wanted == "null")
    if isinstance(known, int | float):
        try:
            return float(known) == float(wanted)
        except ValueError:
            return False
    if isinstance(known, list | dict):
        try:
            return bool(yaml.safe_load(wanted) == known)
        except yaml.YAMLError:
            return False
    return str(known) == wanted


def conditions(words: Iterable[str]) -> list[Condition]:
    """Return the conditions that words ask for.

    Raises:
        ConfigError: for a word that is none, or that asks for an order of what has none.
    """
    found = []
    for word in words:
        match = CONDITION.fullmatch(word)
        if match is None:
            raise ConfigError(
                f"'{word}' is no condition; write recipe=NAME, fingerprint=ab12, a metric such as "
                "'sft/held_out_loss<2.0', or a value of the configuration such as seed=1."
            )
        condition = Condition(**match.groupdict())
        if condition.how in HOW and not _is_number(condition.value):
            raise ConfigError(f"{word} compares with '{condition.value}', which is no number.")
        if condition.key in ("recipe", "fingerprint") and condition.how in HOW:
            raise ConfigError(f"{word}: a {condition.key} has no order; use = or !=.")
        found.append(condition)
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def matching(runs: Sequence[Run], wanted: Sequence[Condition]) -> list[Run]:
    """Return the runs that meet all conditions.

    Raises:
        ConfigError: for a key that neither the schema nor any run has.
    """
    known = {"recipe", "fingerprint"} | {key for run in runs for key in facts(run)}
    for condition in wanted:
        key = condition.key
        if key in known or schema.field_type(key) is not None:
            continue
        if STAGE_METRIC.fullmatch(key):
            metrics = sorted(name for name in known if "/" in name)
            why = f"no run has the metric '{key}'.{nearest(key, metrics)}"
            raise ConfigError(why)
        raise ConfigError(unknown_key(key))
    return [run for run in runs if all(condition.holds(run) for condition in wanted)]


def unknown_key(key: str) -> str:
    return f"unknown key '{key}'.{nearest(key, [*schema.all_keys(), 'recipe', 'fingerprint'])}"
