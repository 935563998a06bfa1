"""A side of ``ftpipe diff``: a run, an artifact with all that it was made from, or a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftpipe import pipeline
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError, unknown
from ftpipe.pipeline import STAGES
from ftpipe.runs import find, records
from ftpipe.runs.records import ORIGINS, Piece, Run
from ftpipe.schema import plain

# One that begins with a dot or a slash is a path, whatever is in it.
OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.@/]*(=.*)?", re.DOTALL)
RECIPE = "recipe="

Compose = Callable[[list[str]], list[RunConfig]]


@dataclass(frozen=True)
class At:
    """A stage of a side.

    Attributes:
        facts: what decides its result, as in a manifest's ``decided_by``; empty where it is not told.
        piece: what lies on disk; None where nothing was planned.
    """

    fingerprint: str | None
    facts: Mapping[str, Any]
    piece: Piece | None

    def group(self, name: str) -> dict[str, Any]:
        found = self.facts.get(name)
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Side:
    """One of two things to compare.

    Attributes:
        kind: run, artifact or recipe.
        name: what it is called.
        config: by dotted key.
        origins: where each value of the configuration comes from, as far as that is recorded.
        notes: sentences about what could not be found out.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    stages: Mapping[str, At]
    origins: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse(words: Sequence[str]) -> tuple[list[list[str]], Path, bool]:
    """Return the words of each side, the folder where runs are looked up, and whether JSON is wanted.

    A word is a run or an artifact; ``recipe=NAME`` begins a recipe, and the overrides after it are its
    own. ``output=PATH`` ahead of both says where runs are looked up.

    Raises:
        ConfigError: for an unknown option, or unless there are two sides.
    """
    sides: list[list[str]] = []
    output = Path("outputs")
    for word in words:
        if word.startswith("-") and word != "--json":
            raise ConfigError(unknown("option", word, ["--json"]))
        if word == "--json":
            continue
        if word.startswith("output=") and not sides:
            output = Path(word.partition("=")[2]).expanduser()
        elif word.startswith(RECIPE):
            sides.append([word])
        elif "=" in word and OVERRIDE.fullmatch(word):
            if not sides or not sides[-1][0].startswith(RECIPE):
                raise ConfigError(f"{word} overrides a recipe; put it after recipe=NAME.")
            sides[-1].append(word)
        else:
            sides.append([word])
    if len(sides) != 2:
        raise ConfigError(
            f"diff compares two, but got {len(sides)}; each is a run, an artifact, or recipe=NAME with "
            "overrides after it."
        )
    return sides, output, "--json" in words


def read(words: list[str], output: Path, compose: Compose) -> Side:
    """Return what the words of a side stand for.

    Args:
        compose: returns the configurations of a recipe and its overrides.

    Raises:
        UserError: if there is no such thing.
    """
    if words[0].startswith(RECIPE):
        return _recipe(words, compose)
    found = find.anything(words[0], output)
    return _run(found) if isinstance(found, Run) else _artifact(found)


def _recipe(words: list[str], compose: Compose) -> Side:
    cfg, *_ = compose(words)  # of several seeds the first
    stages: dict[str, At] = {}
    notes: tuple[str, ...] = ()
    try:
        for step in pipeline.plan(cfg, elsewhere=True):
            piece = records.look(Path(cfg.output), step.place.name)
            stages[step.stage.name] = At(step.fingerprint, step.facts, piece)
    except UserError as error:
        stages = {name: At(None, {}, None) for name in pipeline.stage_names(cfg)}
        notes = (f"its fingerprints cannot be planned: {error}",)
    return Side("recipe", " ".join(words), records.flat(plain(cfg)), stages, notes=notes)


def _run(run: Run) -> Side:
    if not run.config:
        raise UserError(run.damage[0])
    stages = {stage: _at(piece) for stage, piece in run.pieces.items()}
    config = records.flat(run.config)
    return Side("run", str(run.folder), config, stages, _origins(run), run.damage)


def _artifact(piece: Piece) -> Side:
    if piece.damage:
        raise UserError(piece.damage)
    pieces = records.closure(records.root_of(piece.path), set(piece.inputs.values())).values()
    order = list(STAGES)
    known = sorted(
        (one for one in (piece, *pieces) if one.stage in order), key=lambda one: order.index(one.stage)
    )
    stages = {one.stage: _at(one) for one in known}
    notes = tuple(one.damage for one in known if one.damage)
    origins = {str(key): str(origin) for key, origin in piece.told("origins").items()}
    return Side("artifact", str(piece.path), records.flat(piece.told("config")), stages, origins, notes)


def _at(piece: Piece | None) -> At:
    return At(piece.fingerprint if piece else None, piece.told("decided_by") if piece else {}, piece)


def _origins(run: Run) -> dict[str, str]:
    """Return where a run's values come from: of its folder, else of one of its artifacts."""
    try:
        told = json.loads((run.folder / ORIGINS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = next((found for piece in run.made().values() if (found := piece.told("origins"))), {})
    return {str(key): str(origin) for key, origin in told.items()} if isinstance(told, dict) else {}
