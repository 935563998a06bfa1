"""``runs export``: a run as one file that another machine can look into, prove, and rebuild.

An uncompressed tar: weights hardly shrink, a reader gets at the index without reading the rest, and the
same run gives the same bytes. Members are in the order of their names, without times, owners or rights;
the index comes last, for the digests are taken while the bytes go by.

    runs/<run>/run.yaml, artifacts.json, origins.json    the record
    artifacts/<stage>-<fingerprint>/...                  what the run refers to, and their inputs
    inputs/<sha256>/<name>                               local files that are pinned by digest
    inputs.json                                          key of the configuration -> path above
    archive.json                                         format, ftpipe's version, sha256 of each member
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftpipe import __version__, schema
from ftpipe.artifacts import MANIFEST, SCRATCH
from ftpipe.choices import Init, State
from ftpipe.config import RunConfig
from ftpipe.errors import DataError, UserError
from ftpipe.logs import progress
from ftpipe.pins import BYTES, MEMORY, PINS, TEXT_FILES, WEIGHTS, Digests, local_data, local_model
from ftpipe.runs import records
from ftpipe.runs.lineage import key_of
from ftpipe.runs.records import LISTED, ORIGINS, RUN, Piece, Run
from ftpipe.samples import PREFIX

FORMAT = 1  # of the archive; another one is refused
INDEX, INPUTS = "archive.json", "inputs.json"
MODE = 0o644
NAMES = ("utf-8", "surrogateescape")  # of files, which may be any bytes


@dataclass(frozen=True)
class Member:
    """A file of an archive: where it lies, and the digest that it has to have, if one is known."""

    source: Path | bytes
    digest: str | None = None


def export(run: Run, to: Path, with_inputs: bool = True) -> int:
    """Write a run with all that it refers to as one archive; return its bytes.

    Raises:
        UserError: if something of the run is missing or damaged, an input is no longer what it was, or
            the archive cannot be written or is there already.
    """
    if to.exists():
        raise UserError(f"{to} is there already; choose another name with --to FILE.")
    members = members_of(run, with_inputs)
    room, needed = shutil.disk_usage(_existing(to)).free, sum(map(_size, members.values()))
    if needed > room:
        raise UserError(
            f"{to} would take {records.in_bytes(needed)}, but there are {records.in_bytes(room)} left; "
            "choose another place with --to FILE."
        )
    try:
        with _scratch(to) as file:
            _write(file, members, run.name)
        return to.stat().st_size
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{to} cannot be written ({where}{records.first_line(error)}).") from None


def _existing(to: Path) -> Path:
    folder = to.absolute().parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; make it first.")
    return folder


def members_of(run: Run, with_inputs: bool) -> dict[str, Member]:
    """Return the files of a run's archive by name, all but the index.

    Raises:
        UserError: if something of the run is missing or damaged, or an input is not what it was.
    """
    if run.damage:
        raise UserError(run.damage[0])
    pieces = _pieces(run)
    members = {
        f"runs/{run.name}/{name}": Member(run.folder / name)
        for name in (RUN, LISTED, ORIGINS)
        if (run.folder / name).is_file()
    }
    for piece in pieces.values():
        members |= _files(piece)
    table: dict[str, str] = {}
    if with_inputs:
        cfg = schema.load(run.folder / RUN)
        digests = Digests(records.root_of(run.folder) / "artifacts" / MEMORY)  # as a plan has it
        _check_pins(cfg, pieces, digests)
        for key, place in outside_files(cfg, pieces).items():
            table[key], files = _input(key, place, digests)
            members |= files
    members[INPUTS] = Member(_json(table))
    return dict(sorted(members.items()))


def _pieces(run: Run) -> dict[str, Piece]:
    """Return all that a run refers to by name, each of them whole."""
    wanted = {piece.name for piece in run.pieces.values() if piece}
    pieces = records.closure(records.root_of(run.folder), wanted)
    lacking = [name for name, piece in pieces.items() if piece.state is not State.made]
    if lacking or not wanted:
        lack = f"there is no {', '.join(lacking)}" if lacking else "none of its stages is made"
        raise UserError(f"{run.name} is not whole: {lack}; make it first.")
    return pieces


def _files(piece: Piece) -> dict[str, Member]:
    """Return the files of an artifact as its manifest lists them."""
    stated = {str(name): str(digest) for name, digest in piece.told("files").items()}
    there = {path.relative_to(piece.path).as_posix() for path in piece.path.rglob("*") if path.is_file()}
    for name in sorted({*stated, MANIFEST} ^ there):
        what = "is not listed in" if name in there else "is missing, but listed in"
        raise UserError(f"{piece.path / name} {what} its manifest; the artifact is damaged.")
    if not records.agrees(piece):
        raise UserError(f"{piece.path} is not what its manifest says; the artifact is damaged.")
    whole: dict[str, str | None] = {**stated, MANIFEST: None}
    return {
        f"artifacts/{piece.name}/{name}": Member(piece.path / name, digest)
        for name, digest in whole.items()
    }


def _check_pins(cfg: RunConfig, pieces: Mapping[str, Piece], digests: Digests) -> None:
    """Refuse inputs that are not what the run's artifacts were made from."""
    now: dict[str, Mapping[str, str]] = {}
    for piece in pieces.values():
        for name, stated in piece.facts("pins").items():
            group, _, rest = name.partition("/")
            if group == "quantizer":  # versions of an environment: no input that an archive takes
                continue
            try:
                now[group] = now.get(group) or PINS[group](cfg, digests)
            except UserError as error:
                raise _gone(str(error)) from None
            if now[group].get(rest) != stated:
                raise _gone(f"{key_of(name)} is not what {piece.name} was made from.")


def _gone(why: str) -> DataError:
    return DataError(f"{why} Bring the input back, or leave inputs out with --without-inputs.")


def outside_files(cfg: RunConfig, pieces: Mapping[str, Piece]) -> dict[str, Path]:
    """Return the local files and folders that a run read, by the key that names them."""
    groups = {name.partition("/")[0] for piece in pieces.values() for name in piece.facts("pins")}
    read: dict[str, str | None] = {}
    found: dict[str, Path] = {}
    if "data" in groups:
        read |= {f"data.sources.{name}.path": one.path for name, one in cfg.data.sources.items()}
        read |= {
            f"data.decontaminate.{name}.path": one.path for name, one in cfg.data.decontaminate.items()
        }
    if "seeds" in groups:
        read["evolve.seeds.path"] = cfg.evolve.seeds.path
    read |= _evaluated(cfg, groups)
    judge = cfg.evaluate.judge
    if "evaluation" in groups and judge.reward_model is not None:
        found["evaluate.judge.reward_model"] = Path(judge.reward_model)
    for key, named in read.items():
        place = None if named is None or named.startswith(PREFIX) else local_data(named)
        if place is not None:
            found[key] = place
    if groups & {"model", "tokenizer"}:
        model = cfg.model
        base = local_model(model) if model.init is Init.pretrained else None
        if base is not None:
            found["model.path"] = base
        if model.tokenizer not in (None, BYTES) and Path(model.tokenizer).is_dir():
            found["model.tokenizer"] = Path(model.tokenizer)
    return found


def _evaluated(cfg: RunConfig, groups: Collection[str]) -> dict[str, str | None]:
    """Return the paths of what the stage evaluate reads, by the keys that name them."""
    evaluate = cfg.evaluate
    read: dict[str, str | None] = {}
    if "evaluation" in groups:
        read |= {f"evaluate.prompts.{name}.path": one.path for name, one in evaluate.prompts.items()}
        read |= {f"evaluate.answers.{name}.path": one.path for name, one in evaluate.answers.items()}
    if "benchmarks" in groups:
        read["evaluate.mmlu.path"] = evaluate.mmlu.path
        for name, task in evaluate.harness.tasks.items():
            key = f"evaluate.harness.tasks.{name}.files"
            read |= {f"{key}.{split}": file for split, file in task.files.items()}
    return read


def _input(key: str, place: Path, digests: Digests) -> tuple[str, dict[str, Member]]:
    """Return where an input lies in the archive, and its files; of a folder, what it is read for."""
    if place.is_file():
        digest = digests.of(place)
        inside = f"inputs/{digest}/{place.name}"
        return inside, {inside: Member(place, digest)}
    if key.startswith(("data.", "evaluate.mmlu.", "evaluate.harness.")):  # a folder of questions
        paths = {*place.rglob("*.csv")}
    else:
        paths = {path for pattern in WEIGHTS for path in place.glob(pattern)}
        paths |= {path for pattern in TEXT_FILES for path in place.rglob(pattern)}
    files = {path.relative_to(place).as_posix(): path for path in sorted(paths) if path.is_file()}
    found = {name: digests.of(path) for name, path in files.items()}
    inside = f"inputs/{hashlib.sha256(_json(found)).hexdigest()}/{place.resolve().name}"
    return inside, {f"{inside}/{name}": Member(files[name], digest) for name, digest in found.items()}


def _write(file: IO[bytes], members: Mapping[str, Member], run: str) -> None:
    stated: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, member in progress(members.items(), "files"):
            stated[name] = _add(tar, name, member)
        index = {"format": FORMAT, "ftpipe": __version__, "run": run, "sha256": stated}
        _add(tar, INDEX, Member(_json(index)))


def _add(tar: tarfile.TarFile, name: str, member: Member) -> str:
    """Write a file into an archive, block by block, and return the digest of what was written."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = _size(member), MODE
    with _source(member) as source:
        read = Digesting(source)
        tar.addfile(info, read)
        digest = read.digest()
        longer = source.read(1) != b""
    if longer or (member.digest is not None and digest != member.digest):
        raise UserError(f"{member.source!s} is not what its digest says; it was changed or is damaged.")
    return digest


class Digesting:
    """A file that is read once, by somebody else, and whose digest is wanted."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._hash = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._source.read(size)
        self._hash.update(block)
        return block

    def digest(self) -> str:
        return self._hash.hexdigest()


def _source(member: Member) -> IO[bytes]:
    return io.BytesIO(member.source) if isinstance(member.source, bytes) else member.source.open("rb")


def _size(member: Member) -> int:
    return len(member.source) if isinstance(member.source, bytes) else member.source.stat().st_size


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(*NAMES)


@contextmanager
def _scratch(to: Path) -> Iterator[IO[bytes]]:
    """Yield a file that has its name only when it is whole."""
    scratch = to.with_name(f".{to.name}.{os.getpid()}{SCRATCH}")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(to)
    finally:
        scratch.unlink(missing_ok=True)
