"""The words of ``ftpipe verify``: which run, how much of it, and what this machine asks for."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftpipe import schema
from ftpipe.errors import ConfigError, UserError, unknown
from ftpipe.verify.compare import Recorded, Verification

FLAGS, VALUES = ("--full", "--json"), ("--steps", "--stage", "--scratch")
OWN = ("launch.", "tracking.")  # what a machine may ask for, without it being another run


@dataclass(frozen=True)
class Asked:
    """What the words say.

    Attributes:
        steps: of each training; None: those on record from its beginning.
        scratch: where stages are made again and stay; None: a folder that is removed.
        overrides: ``launch.processes=1`` and the like.
    """

    run: Path
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
    overrides = [_checked(word) for word in plain if "=" in word]
    runs = [word for word in plain if "=" not in word]
    if len(runs) != 1:
        raise ConfigError(f"verify takes one run, but got {len(runs)}; give the folder of a run.")
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
        run=Path(runs[0]),
        steps=int(steps[0]) if steps else None,
        stages=tuple(values["--stage"]),
        scratch=scratch,
        full=full,
        as_json="--json" in values,
        overrides=tuple(overrides),
    )


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
    key = word.partition("=")[0]
    if not key.startswith(OWN):
        raise ConfigError(
            f"{key} decides the result, so another value makes another run; verify takes keys of "
            "launch and tracking alone, such as launch.processes=1."
        )
    return word


def main(words: Sequence[str]) -> int:
    """Verify a run; print the report and return 0 where all is equal, 1 where something differs.

    Raises:
        UserError: if there is no such run, or its record is damaged.
    """
    asked = parse(words)
    if not (asked.run / "run.yaml").is_file():
        raise UserError(f"{asked.run} holds no run.yaml; give the folder of a run.")
    cfg = schema.load(asked.run / "run.yaml", asked.overrides)
    cfg.check()
    run = Recorded.of(asked.run, cfg)
    with tempfile.TemporaryDirectory(prefix="ftpipe-verify-") as folder:
        scratch = asked.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        verification = Verification(run, scratch, asked.steps, asked.full, asked.stages)
        for doing in verification:
            print(f"verify: {doing}", file=sys.stderr, flush=True)
    report = verification.report
    if asked.as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print("\n".join([f"{asked.run}:", *report.lines()]))
    return 0 if report.equal else 1
