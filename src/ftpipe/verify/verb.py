"""The words of ``ftpipe verify``: which run or recipe, how much of it, what this machine asks for."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftpipe import stopping
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, unknown
from ftpipe.resolve import resolved
from ftpipe.runs import find
from ftpipe.runs.unpack import unpack
from ftpipe.verify import reference
from ftpipe.verify.compare import Recorded, Verification
from ftpipe.verify.findings import Report

FLAGS, VALUES = ("--full", "--json", "--write"), ("--steps", "--stage", "--scratch")
RECIPE, OUTPUT = "recipe=", "output="
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)  # not ./a=b
# What a machine may ask for, without it being another run; the last two lie elsewhere on another one.
OWN = ("launch.", "export.converter=", "export.quantizer=")


@dataclass(frozen=True)
class Asked:
    """What the words say.

    Attributes:
        run: a run's folder, the beginning of its name in ``output``, or an archive of one; None: the
            recipe is made, and compared with what it ships.
        write: ship what the recipe does here.
        steps: of each training; None: those on record from its beginning.
        scratch: where stages are made again and stay; None: a folder that is removed.
        overrides: ``launch.processes=1`` and the like.
    """

    run: Path | None
    output: Path
    recipe: str
    write: bool
    steps: int | None
    stages: tuple[str, ...]
    scratch: Path | None
    full: bool
    as_json: bool
    overrides: tuple[str, ...]


def parse(words: Sequence[str]) -> Asked:
    """Read the words after ``verify``.

    Raises:
        ConfigError: for an unknown option, a value that cannot be, or no run.
    """
    plain, values = _options(words)
    recipes = [word.removeprefix(RECIPE) for word in plain if word.startswith(RECIPE)]
    outputs = [word.removeprefix(OUTPUT) for word in plain if word.startswith(OUTPUT)]
    others = [
        word for word in plain if OVERRIDE.fullmatch(word) and not word.startswith((RECIPE, OUTPUT))
    ]
    overrides = [_checked(word) for word in others]
    runs = [word for word in plain if not OVERRIDE.fullmatch(word)]
    if len(runs) + len(recipes) != 1:
        raise ConfigError(
            f"verify takes one run or recipe, but got {len(runs) + len(recipes)}; give the folder of a "
            "run, an archive of one, or recipe=NAME."
        )
    _check_recipe(recipes, values)
    full, steps = "--full" in values, values["--steps"][-1:]
    for given in steps:
        if not (given.isdecimal() and int(given) >= 1):
            raise ConfigError(f"--steps={given} is no number of steps; give 1 or more.")
        if full:
            raise ConfigError("--full makes all steps again; leave --steps out.")
    scratch = next((Path(folder) for folder in values["--scratch"]), None)
    if scratch is not None and scratch.is_dir() and any(scratch.iterdir()):
        raise ConfigError(f"--scratch={scratch} is not empty; give a folder of its own.")
    return Asked(
        run=Path(runs[0]) if runs else None,
        output=Path(outputs[-1] if outputs else RunConfig.output),
        recipe=recipes[0] if recipes else "",
        write="--write" in values,
        steps=int(steps[0]) if steps else None,
        stages=tuple(values["--stage"]),
        scratch=scratch,
        full=full,
        as_json="--json" in values,
        overrides=tuple(overrides),
    )


def _check_recipe(recipes: Sequence[str], values: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that only a run has, or only a recipe."""
    if not recipes and "--write" in values:
        raise ConfigError("--write ships the trace of a recipe; give recipe=NAME with it.")
    for name in ("--full", "--steps", "--stage"):
        if recipes and values.get(name):
            raise ConfigError(f"{name} is for a run; a recipe is made as a whole.")


def _options(words: Sequence[str]) -> tuple[list[str], defaultdict[str, list[str]]]:
    """Return the words that are no options, and the values of each option; a flag has the value ''."""
    plain, values = [], defaultdict(list)
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if not word.startswith("-"):
            plain.append(word)
        elif name in FLAGS and not given:
            values[name].append("")
        elif name in VALUES:
            values[name].append(value if given else next(rest, ""))
            if not values[name][-1]:
                raise ConfigError(f"{name} needs a value.")
        else:
            raise ConfigError(unknown("option", word, (*FLAGS, *VALUES)))
    return plain, values


def _checked(word: str) -> str:
    if not word.startswith(OWN):
        raise ConfigError(
            f"{word.partition('=')[0]} is the run's own, and another value makes another run; verify "
            "takes keys of launch, such as launch.processes=1, export.converter and export.quantizer."
        )
    return word


def main(words: Sequence[str]) -> int:
    """Verify a run or a recipe; print the report, return 0 where all is equal and 1 where not.

    Raises:
        UserError: if there is no such run, or its record is damaged.
        StageFailed: if a recipe cannot be made here.
    """
    asked = parse(words)
    stopping.forget()
    with tempfile.TemporaryDirectory(prefix="ftpipe-verify-") as folder:
        scratch = asked.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        report = _run(asked, scratch) if asked.run else _recipe(asked, scratch)
    if report is None:
        return 0
    if asked.as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print("\n".join([f"{asked.run or RECIPE + asked.recipe}:", *report.lines()]))
    return 0 if report.equal else 1


def _run(asked: Asked, scratch: Path) -> Report:
    assert asked.run is not None
    if asked.run.is_file():
        folder = unpack(asked.run, scratch / "archive")
    else:
        folder = find.run(str(asked.run), asked.output).folder
    recorded = Recorded.of(folder, asked.overrides)
    verification = Verification(recorded, scratch, asked.steps, asked.full, asked.stages)
    for doing in verification:
        _say(doing)
    return verification.report


def _recipe(asked: Asked, scratch: Path) -> Report | None:
    """Make a recipe and compare it with the trace it ships, or ship one."""
    run, *_ = resolved([f"{RECIPE}{asked.recipe}", *asked.overrides])  # of its first seed
    shipped = None if asked.write else reference.read(run.file)
    fresh = reference.Fresh(run.cfg, scratch)
    for doing in fresh:
        _say(doing)
    if shipped is None:
        print(f"written: {reference.write(run.file, fresh)}")
        return None
    return reference.compare(shipped, fresh, scratch)


def _say(doing: str) -> None:
    print(f"verify: {doing}", file=sys.stderr, flush=True)
