"""Runs and artifacts as they lie on disk, read so that a damaged one hides no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ftpipe import artifacts
from ftpipe.artifacts import MANIFEST, PARTIAL, Artifact
from ftpipe.choices import State
from ftpipe.errors import UserError

RUN, LISTED, ORIGINS = "run.yaml", "artifacts.json", "origins.json"  # the record in a run's folder
NAME = re.compile(r"[a-z_]+-[0-9a-f]+")  # of an artifact's folder: <stage>-<fingerprint>


@dataclass(frozen=True)
class Piece:
    """What lies at the place of an artifact.

    Attributes:
        name: ``<stage>-<fingerprint>``.
        path: its folder, whether it is there or not.
        artifact: None unless it is made and its manifest can be read.
        damage: a sentence about a manifest that cannot be read.
    """

    name: str
    path: Path
    state: State
    artifact: Artifact | None = None
    damage: str | None = None

    @property
    def stage(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def fingerprint(self) -> str:
        return self.name.rpartition("-")[2]

    def told(self, key: str) -> dict[str, Any]:
        """Return a group of the manifest, empty where it is not there."""
        found = self.artifact.manifest.get(key) if self.artifact else None
        return found if isinstance(found, dict) else {}

    def facts(self, key: str) -> dict[str, Any]:
        """Return a group of what decided the artifact: ``config``, ``pins`` or ``inputs``."""
        found = self.told("decided_by").get(key)
        return found if isinstance(found, dict) else {}

    @property
    def inputs(self) -> dict[str, str]:
        """The names of the artifacts that it was made from, by kind."""
        return {
            kind: name
            for kind, name in self.told("inputs").items()
            if isinstance(name, str) and NAME.fullmatch(name)
        }

    @property
    def metrics(self) -> dict[str, float]:
        return {
            name: value
            for name, value in self.told("metrics").items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def size(self) -> int:
        """Return the bytes that it takes, also where it is half made."""
        half = self.path.with_name(self.name + PARTIAL)
        return size(half if self.state in (State.building, State.begun) else self.path)


@dataclass(frozen=True)
class Run:
    """The record of a run.

    Attributes:
        config: its resolved configuration, as ``run.yaml`` has it.
        pieces: what lies at the place of each stage's artifact, by stage, in the order of the run; None
            for a stage that was never planned.
        when: when it was last started.
        damage: sentences about what cannot be read.
    """

    folder: Path
    config: Mapping[str, Any]
    pieces: Mapping[str, Piece | None]
    when: datetime
    damage: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> str:
        """The configuration's ``name``, which is that of its recipe unless it says otherwise."""
        return str(self.config.get("name", "?"))

    def made(self) -> dict[str, Piece]:
        """Return what can be read, by stage."""
        return {stage: piece for stage, piece in self.pieces.items() if piece and piece.artifact}


def root_of(folder: Path) -> Path:
    """Return the output folder that a run or an artifact lies in, wherever that was moved to."""
    return (folder if len(folder.parts) > 2 else folder.absolute()).parent.parent


def runs(output: Path) -> list[Run]:
    """Return the runs of an output folder, the newest first."""
    folders = [file.parent for file in output.glob(f"runs/*/{RUN}") if is_shown(file.parent)]
    return sorted(map(read_run, folders), key=lambda run: (run.when, run.name), reverse=True)


def is_shown(folder: Path) -> bool:
    """Whether a folder is not on its way out."""
    return not folder.name.startswith(".")


def read_run(folder: Path) -> Run:
    """Return a run's record. What cannot be read is told in its ``damage``."""
    from ftpipe import pipeline

    damage = []
    config: Any = None
    try:
        config = yaml.safe_load((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        damage.append(f"{folder / RUN} cannot be read ({first_line(error)}).")
    if not damage and not isinstance(config, dict):
        damage.append(f"{folder / RUN} holds no configuration.")
    config = config if isinstance(config, dict) else {}
    listed = pipeline.listed(folder)
    if not listed and (folder / LISTED).exists():
        damage.append(f"{folder / LISTED} is damaged; the same command writes it anew.")
    stages = config.get("stages")
    names = [*listed, *(name for name in (stages if isinstance(stages, list) else []))]
    root = root_of(folder)
    pieces = {
        str(stage): look(root, listed[stage]) if NAME.fullmatch(listed.get(stage, "")) else None
        for stage in dict.fromkeys(names)
    }
    damage += [piece.damage for piece in pieces.values() if piece and piece.damage]
    return Run(folder, config, pieces, _changed(folder / RUN), tuple(damage))


def look(root: Path, name: str) -> Piece:
    """Return what lies at the place of an artifact of this name."""
    path = root / "artifacts" / name
    if (path / MANIFEST).is_file():
        return opened(path)
    if path.with_name(name + PARTIAL).is_dir():
        return Piece(name, path, State.building if artifacts.is_held(path) else State.begun)
    return Piece(name, path, State.missing)


def opened(path: Path) -> Piece:
    """Return a folder with a manifest as a piece."""
    try:
        return Piece(path.name, path, State.made, artifacts.open_artifact(path))
    except (UserError, OSError) as error:
        return Piece(path.name, path, State.damaged, damage=first_line(error))


def agrees(piece: Piece) -> bool:
    """Whether a made artifact has the name of its manifest, and the fingerprint of what decided it."""
    if piece.artifact is None:
        return False
    of = piece.artifact
    named = piece.name == f"{of.stage}-{of.fingerprint}"
    return named and artifacts.fingerprint(piece.told("decided_by")) == of.fingerprint


def artifact_names(root: Path) -> list[str]:
    """Return the names of all artifacts of an output folder that are made, whole or damaged."""
    found = root.glob(f"artifacts/*/{MANIFEST}")
    return sorted(file.parent.name for file in found if NAME.fullmatch(file.parent.name))


def closure(root: Path, names: set[str]) -> dict[str, Piece]:
    """Return pieces by name, with all that they were made from."""
    found: dict[str, Piece] = {}
    todo = sorted(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = look(root, name)
            todo += sorted(found[name].inputs.values())
    return dict(sorted(found.items()))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder. What goes meanwhile counts nothing."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            state = file.lstat()
        except OSError:
            continue
        total += state.st_size if not file.is_dir() or file.is_symlink() else 0
    return total


def in_bytes(count: float) -> str:
    """Return a size for people, in binary units.

    >>> in_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _changed(file: Path) -> datetime:
    try:
        return datetime.fromtimestamp(file.stat().st_mtime)
    except OSError:
        return datetime.fromtimestamp(0)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of dicts by dotted key; an empty dict is a value of its own."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
