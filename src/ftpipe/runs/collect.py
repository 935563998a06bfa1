"""``runs gc`` and ``runs remove``: what can go, and how it goes without harm to who is at work.

An artifact goes under its lock, and first by a rename: so nobody builds it meanwhile, and nobody sees
half of it. A run writes down what it refers to before it looks for it. Hence, whoever began before the
rename is seen by the look that follows it, and gets the artifact back; whoever begins later finds none,
and makes it anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpipe import artifacts, pipeline, schema
from ftpipe.artifacts import LOCK, MANIFEST, PARTIAL
from ftpipe.errors import BusyError, UserError
from ftpipe.runs import records
from ftpipe.runs.records import NAME, RUN, Run

REMOVED = ".removed"  # the end of the name of what is on its way out
PATHS = ("path", "tokenizer")  # the last words of keys that name a place


@dataclass(frozen=True)
class Garbage:
    """Something that can go.

    Attributes:
        path: a folder, or a lock file.
        place: of the artifact whose lock protects it; None where none does.
        name: by which a run could refer to it.
    """

    path: Path
    why: str
    size: int
    place: Path | None
    name: str = ""


class References:
    """What the runs of an output folder refer to: artifacts by name, inputs by digest.

    Runs that did not change since the last look are not read again.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._seen: dict[Path, tuple[object, set[str]]] = {}
        self._names: set[str] | None = None

    def names(self) -> set[str]:
        """Return what is referred to now, with all that it was made from.

        Raises:
            UserError: naming a run of which it cannot be told.
        """
        folders = [path for path in sorted(self._output.glob("runs/*")) if records.is_shown(path)]
        known = {folder: stamp for folder in folders if (stamp := _stamp(folder)) is not None}
        changed = [folder for folder in known if self._seen.get(folder, (None,))[0] != known[folder]]
        if changed or self._names is None or set(known) != set(self._seen):
            before = self._seen
            self._seen = {
                folder: (stamp, referred(folder) if folder in changed else before[folder][1])
                for folder, stamp in known.items()
            }
            named = set().union(*(names for _, names in self._seen.values()))
            inputs = {name for name in named if not NAME.fullmatch(name)}
            self._names = inputs | set(records.closure(self._output, named - inputs))
        return self._names


def _stamp(folder: Path) -> object | None:
    """Return what changes with a run's record, or None where there is no run."""
    if not (folder / RUN).is_file():
        return None
    files = (folder, folder / RUN, folder / pipeline.RECORD)
    states = [file.stat() for file in files if file.exists()]
    return [(state.st_ino, state.st_mtime_ns) for state in states]


def referred(folder: Path) -> set[str]:
    """Return what a run refers to: what is listed, what its stages were given, and what it reads.

    Raises:
        UserError: if it cannot be told.
    """
    run = records.read_run(folder)
    named = set(pipeline.listed(folder).values()) | set(_of_jobs(folder))
    planned, why = bool(named), ""
    if not (folder / pipeline.RECORD).is_file() or run.damage:
        try:
            cfg = schema.load(folder / RUN)
            cfg.output = str(records.root_of(folder))
            named |= {step.place.name for step in pipeline.plan(cfg, elsewhere=True)}
            planned = True
        except (UserError, OSError, ValueError) as error:
            why = records.first_line(error)
    if not run.config or not planned:
        raise UserError(
            f"it cannot be told what the run {folder.name} refers to, so nothing is removed: "
            f"{why or run.damage[0]} "
            f"Mend it, or drop it with `ftpipe runs remove {folder.name}`."
        )
    return named | set(_of_config(run))


def _of_jobs(folder: Path) -> Iterator[str]:
    """Yield the names of what the stages of a run were started with."""
    for file in folder.glob("*.job.json"):
        try:
            job = json.loads(file.read_text(encoding="utf-8"))
            places = [job["out"], *job["inputs"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        yield from (Path(place).name.removesuffix(PARTIAL) for place in places)


def _of_config(run: Run) -> Iterator[str]:
    """Yield the parts of every path that a run reads: one may be an artifact or an imported input."""
    for key, value in records.flat(run.config).items():
        if isinstance(value, str) and key.rpartition(".")[2] in PATHS:
            yield from Path(value).parts


def garbage(output: Path, refers: References, unfinished: bool) -> tuple[list[Garbage], list[str]]:
    """Return what can go, and lines about what stays although it is half made.

    Args:
        unfinished: also what runs have begun and could go on with.

    Raises:
        UserError: if there is no such output folder, or what a run refers to cannot be told.
    """
    if not output.is_dir():
        raise UserError(f"there is no folder {output}; say where with output=PATH.")
    named = refers.names()
    found: list[Garbage] = []
    stays: list[str] = []
    for path in sorted(output.glob("artifacts/*")):
        name = path.name.removesuffix(PARTIAL).removesuffix(LOCK).removesuffix(REMOVED)
        if NAME.fullmatch(name):
            used = name in named
            why = _why(path, path.with_name(name), used, unfinished)
            if why in STAYS:
                stays.append(f"{path} ({records.in_bytes(records.size(path))}): {why}")
            elif why is not None:
                referred_by = "" if path.suffix in (REMOVED, LOCK) else name
                found.append(Garbage(path, why, records.size(path), path.with_name(name), referred_by))
    for path in sorted(output.glob("inputs/*")):
        if path.name not in named:
            found.append(Garbage(path, "no run reads it", records.size(path), None, path.name))
    for path in sorted(output.glob(f"runs/.*{REMOVED}")):
        found.append(Garbage(path, INTERRUPTED, records.size(path), None))
    return found, stays


INTERRUPTED = "its removal was interrupted"
AT_WORK = "it is being built"
TO_GO_ON = "half made, and a run can go on from it; --unfinished removes it"
STAYS = (AT_WORK, TO_GO_ON)


def _why(path: Path, place: Path, used: bool, unfinished: bool) -> str | None:
    """Return why something in the folder of artifacts can go, or stays; None for what is in use.

    Args:
        place: of the artifact that it belongs to.
        used: a run refers to it.
        unfinished: what a run could go on from goes, too.
    """
    if path.suffix == REMOVED:
        return INTERRUPTED
    if path.suffix == LOCK:
        alone = not any(place.with_name(place.name + end).exists() for end in ("", PARTIAL))
        return "a lock of nothing" if alone and not artifacts.is_held(place) else None
    if path.suffix == PARTIAL:
        if artifacts.is_held(place):
            return AT_WORK
        return TO_GO_ON if used and not unfinished else "half made, and nobody is at it"
    if used:
        return None
    whole = (path / MANIFEST).is_file()
    return "no run refers to it" if whole else "no run refers to it, and it has no manifest"


def remove(thing: Garbage, refers: References, unfinished: bool) -> str | None:
    """Remove a thing, unless it is needed by now.

    Returns:
        why it stays, in words, or None.
    """
    try:
        if thing.place is None:
            aside, why = _out(thing, refers, unfinished)
            _delete(aside)
            return why
        with artifacts.locked(thing.place) as lock:
            aside, why = _out(thing, refers, unfinished)
            left = [thing.place.with_name(thing.place.name + end) for end in ("", PARTIAL)]
            if not any(path.exists() for path in left):
                lock.unlink(missing_ok=True)  # under the lock: see artifacts._lock
        _delete(aside)  # after it: whoever wants to build this does not wait
        return why
    except BusyError as error:
        return str(error).split(";")[0]
    except OSError as error:
        return f"{thing.path} cannot be removed ({error.strerror})"


def _delete(aside: Path | None) -> None:
    if aside is not None:
        shutil.rmtree(aside)


def _out(thing: Garbage, refers: References, unfinished: bool) -> tuple[Path | None, str | None]:
    """Take a thing out of its place; return what is to be deleted, or why it stays."""
    path = thing.path
    if path.suffix == LOCK or not path.exists():
        return None, None  # a lock goes with what it is of
    if path.suffix != REMOVED:
        asked = bool(thing.name) and not (unfinished and path.suffix == PARTIAL)
        needed = f"{path.name} is needed by a run that has begun meanwhile"
        if asked and thing.name in refers.names():
            return None, needed
        aside = path.with_name(thing.name + REMOVED)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        try:
            kept = asked and thing.name in refers.names()
        except UserError:
            kept = True
        if kept:
            aside.rename(path)
            return None, needed
        path = aside
    return path, None


def drop(run: Run) -> None:
    """Remove a run's folder; its artifacts stay until the next garbage collection.

    Raises:
        BusyError: if one of its stages is being built.
        UserError: if the folder cannot be removed.
    """
    for stage, piece in run.pieces.items():
        if piece is not None and artifacts.is_held(piece.path):
            raise BusyError(f"{run.name} is at work: its stage '{stage}' is being built; wait for it.")
    aside = run.folder.with_name(f".{run.name}{REMOVED}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        run.folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{run.folder} cannot be removed ({error.strerror}).") from None


def as_json(things: Sequence[Garbage]) -> list[Mapping[str, Any]]:
    return [{"path": str(one.path), "why": one.why, "bytes": one.size} for one in things]
