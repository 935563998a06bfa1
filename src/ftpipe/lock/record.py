"""What a recipe is pinned to: commits and digests of its inputs, versions of its packages.

``ftpipe lock recipe=NAME`` writes ``NAME.lock`` beside the recipe; ``hold`` holds its runs to it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ftpipe import pins, provenance
from ftpipe.artifacts import digest, write_atomic
from ftpipe.errors import LockError, UserError
from ftpipe.origins import Layer
from ftpipe.pipeline import Step

SUFFIX = ".lock"  # not .yaml: it is no recipe
DECIDE = ("model", "adapter", "data", "evolve", "evaluate")  # groups; the others say where a run runs

Inputs = dict[str, dict[str, str]]  # owner, such as data.sources.rows -> part, or "" -> pin


@dataclass(frozen=True)
class Lock:
    """What a recipe is pinned to.

    Attributes:
        files: SHA-256 of those that it is composed of and that decide a result.
        inputs: pins by owner (``data.sources.rows``) and part (a file of a folder, or "").
        python: major and minor version.
        packages: version of each package that decides results.
    """

    recipe: str
    files: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, str]]
    python: str
    packages: Mapping[str, str]


def of(recipe: str, layers: Sequence[Layer], steps: Sequence[Step]) -> Lock:
    """Return what the plan of a recipe would use now."""
    return Lock(recipe, files_of(layers), inputs_of(steps), python(), packages())


def place(recipe: str, file: Path, shipped: bool) -> Path:
    """Return the file of a lock: beside the recipe, or in ``./recipes`` where that is not the user's.

    Args:
        shipped: the recipe lies in an installed package.
    """
    beside = file.parent
    ours = not shipped and os.access(beside, os.W_OK)
    return (beside if ours else Path.cwd() / "recipes") / f"{recipe}{SUFFIX}"


def write(path: Path, lock: Lock, command: str) -> None:
    """Write a lock, sorted.

    Raises:
        UserError: if the folder cannot be written.
    """
    inputs = {owner: parts.get("", dict(parts)) for owner, parts in lock.inputs.items()}
    text = "".join(
        yaml.safe_dump({name: value}, sort_keys=True, width=200)
        for name, value in (
            ("recipe", lock.recipe),
            ("inputs", inputs),
            ("files", dict(lock.files)),
            ("python", lock.python),
            ("packages", dict(lock.packages)),
        )
    )
    head = f"# {command}\n# A run against anything else is refused; delete this file to lift that.\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, head + text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from None


def files_of(layers: Sequence[Layer]) -> dict[str, str]:
    """Return the SHA-256 of the files that decide a result: of the recipes, of the options of groups."""
    found = {}
    for layer in layers:
        kind, _, name = layer.origin.partition(" ")
        group = name.partition("=")[0]
        if kind == "recipe":
            found[f"recipes/{layer.file.name}"] = digest(layer.file)
        elif group in DECIDE:
            found[f"conf/{group}/{layer.file.name}"] = digest(layer.file)
    return found


def inputs_of(steps: Sequence[Step]) -> Inputs:
    """Return the pins of outside input in a plan, by owner and part; a single pin has no part.

    What code or configuration make is left out: the byte tokenizer, random weights, prompts.
    """
    found: Inputs = {}
    for step in steps:
        for name, value in step.facts["pins"].items():
            place = _place(name, value)
            if place is not None:
                owner, part = place
                found.setdefault(owner, {})[part] = value
    return found


def _place(name: str, value: str) -> tuple[str, str] | None:
    """Return the owner and the part of a pin; None of what is not to be pinned."""
    match name.split("/"):
        case ["data", "decontaminate", _, *rest]:
            return f"data.decontaminate.{'/'.join(rest)}", ""
        case ["data", _, *rest]:
            return f"data.sources.{'/'.join(rest)}", ""
        case ["seeds", "rows"]:
            return "evolve.seeds", ""
        case ["evaluation" | "benchmarks", *rest]:
            return _evaluated(rest)
        case ["model", "hub" | "gguf"]:
            return "model.path", ""
        case ["model", file] if file != "random":
            return "model.path", file
        case ["tokenizer", "tokenizer", *file] if value != pins.BYTES:
            return "model.tokenizer", "/".join(file)
    return None


def _evaluated(name: Sequence[str]) -> tuple[str, str] | None:
    """Return the owner and the part of a pin of the stage evaluate."""
    match name:
        case ["prompts" | "answers" as kind, one]:
            return f"evaluate.{kind}.{one}", ""
        case ["reward_model"]:
            return "evaluate.judge.reward_model", ""
        case ["mmlu"]:
            return "evaluate.mmlu.path", ""
        case ["harness", task, *split]:
            return f"evaluate.harness.tasks.{task}", "/".join(split)
    return None


def python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def packages() -> dict[str, str]:
    """Return the versions that decide results; a build for another device is the same version."""
    versions = provenance.packages()
    return {name: provenance.public(version) for name, version in versions.items() if name != "wandb"}


def find(recipe: str, file: Path) -> Lock | None:
    """Return the lock of a recipe: one in ``./recipes``, else the one beside it.

    Raises:
        LockError: if it is damaged.
    """
    for folder in (Path.cwd() / "recipes", file.parent):
        path = folder / f"{recipe}{SUFFIX}"
        if path.is_file():
            return read(path)
    return None


def read(path: Path) -> Lock:
    """Read a lock.

    Raises:
        LockError: if it is damaged.
    """
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        inputs = {
            str(owner): {str(part): str(pin) for part, pin in value.items()}
            if isinstance(value, dict)
            else {"": str(value)}
            for owner, value in held["inputs"].items()
        }
        files, packages = dict(held["files"]), dict(held["packages"])
        return Lock(str(held["recipe"]), files, inputs, str(held["python"]), packages)
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise LockError(
            f"{path} is damaged; `ftpipe lock recipe={path.name.removesuffix(SUFFIX)}` writes it anew."
        ) from None
