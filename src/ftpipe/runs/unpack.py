"""An archive of a run, back on disk: checked member by member before anything of it is believed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ftpipe import artifacts, schema
from ftpipe.artifacts import MANIFEST, PARTIAL
from ftpipe.config import RunConfig
from ftpipe.errors import BusyError, DataError, UserError
from ftpipe.runs import records
from ftpipe.runs.archive import FORMAT, INDEX, INPUTS, NAMES
from ftpipe.runs.records import RUN

BLOCK = 1 << 20  # bytes that are in memory at a time
LARGEST = 1 << 26  # bytes of an index or a table, which are read whole
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Contents:
    """What an archive says of itself, checked.

    Attributes:
        run: the name of the run.
        sha256: of each member, by name.
    """

    run: str
    sha256: Mapping[str, str]


def unpack(archive: Path, folder: Path) -> Path:
    """Extract an archive that ``runs export`` has made, and return the folder of its run.

    Artifacts are as they were, byte for byte. In ``run.yaml``, ``output`` is the folder, and inputs that
    came with it are where they lie now; fingerprints are of contents, so they stay the same.

    Args:
        folder: is made; if it is there, it must be empty. Nothing is left in it after an error.

    Raises:
        DataError: if the archive is damaged, incomplete, of an unknown format, or holds what no archive
            of a run holds.
        UserError: if the folder is not empty or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give a new folder.")
    there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(archive) as tar:
            contents = _extract(tar, archive, folder)
        return place(folder, contents.run, folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            folder.mkdir(exist_ok=True)
        if isinstance(error, tarfile.TarError | EOFError):
            raise DataError(f"{archive} is damaged ({records.first_line(error)}).") from None
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written ({records.first_line(error)}).") from None
        raise


def _opened(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive, mode="r:", encoding=NAMES[0], errors=NAMES[1])
    except OSError as error:
        raise DataError(f"{archive} cannot be read ({records.first_line(error)}).") from None
    except tarfile.TarError:
        raise DataError(f"{archive} is no archive that `ftpipe runs export` has made.") from None


def _extract(tar: tarfile.TarFile, archive: Path, folder: Path) -> Contents:
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        _check(member, archive, folder)
        if member.name in members:
            raise DataError(f"{archive} holds {member.name} twice; it is not used.")
        members[member.name] = member
    contents = _contents(tar, archive, members)
    for name, digest in contents.sha256.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(members[name])
        assert source is not None  # it is a file
        with source, target.open("xb") as file:
            if _copied(source, file) != digest:
                raise DataError(f"{archive} is damaged: {name} is not what the index says.")
            file.flush()
            os.fsync(file.fileno())  # a manifest that outlives a power cut must not be alone
    _check_artifacts(archive, folder, contents)
    return contents


def _check(member: tarfile.TarInfo, archive: Path, folder: Path) -> None:
    """Refuse a member that could end up outside the folder, or is no plain file."""
    path = PurePosixPath(member.name)
    plain = member.isfile() and not member.issparse()
    odd = ".." in path.parts or str(path) != member.name or "\0" in member.name
    known = path.parts[0] in ("runs", "artifacts", "inputs") and len(path.parts) > 2
    if odd or not plain or not (known or member.name in (INDEX, INPUTS)):
        kinds = {"a link": member.issym() or member.islnk(), "a device": member.isdev()}
        kinds |= {"a folder": member.isdir(), "sparse": member.issparse()}
        is_one = next((f"is {kind}" for kind, so in kinds.items() if so), None)
        why = is_one or "has no place in the archive of a run"
        raise DataError(f"{archive} holds '{member.name}', which {why}; it is not used.")
    try:
        tarfile.data_filter(member, str(folder))
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: {records.first_line(error)}; it is not used.") from None


def _contents(tar: tarfile.TarFile, archive: Path, members: Mapping[str, tarfile.TarInfo]) -> Contents:
    """Read the index, and refuse an archive whose members are not those of its index."""
    if INDEX not in members:
        raise DataError(f"{archive} has no {INDEX}: it is cut off, or no archive of a run.")
    index = _table(tar, members[INDEX], archive)
    if index.get("format") != FORMAT:
        raise DataError(
            f"{archive} is of format {index.get('format')}, but this ftpipe reads format {FORMAT}; "
            "use the ftpipe that has made it."
        )
    run, sha256 = index.get("run"), index.get("sha256")
    named = isinstance(run, str) and re.fullmatch(r"[\w+-][\w.+-]*", run) is not None
    if not named or not isinstance(sha256, dict) or not all(map(_is_digest, sha256.values())):
        raise DataError(f"{archive} is damaged: its {INDEX} lacks the run or the digests.")
    for name in sorted(set(sha256) ^ (set(members) - {INDEX})):
        lacks = "lacks" if name in sha256 else "holds, besides what its index lists,"
        raise DataError(f"{archive} {lacks} {name}; it is not used.")
    for name in (f"runs/{run}/{RUN}", INPUTS):
        if name not in sha256:
            raise DataError(f"{archive} lacks {name}; it is not used.")
    return Contents(str(run), dict(sorted(sha256.items())))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _table(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> dict[str, Any]:
    source = tar.extractfile(member) if member.size <= LARGEST else None
    try:
        table = json.loads(source.read().decode(*NAMES)) if source else None
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise DataError(f"{archive} is damaged: its {member.name} cannot be read.")
    return table


def _copied(source: IO[bytes], file: IO[bytes]) -> str:
    """Copy block by block, and return the digest of what was copied."""
    seen = hashlib.sha256()
    while block := source.read(BLOCK):
        seen.update(block)
        file.write(block)
    return seen.hexdigest()


def _check_artifacts(archive: Path, folder: Path, contents: Contents) -> None:
    """Refuse an artifact whose files are not those of its manifest, or whose name is another's."""
    for path in sorted((folder / "artifacts").glob("*")):
        piece = records.opened(path)
        if piece.artifact is None:
            raise DataError(f"{archive} is damaged: {piece.damage}")
        if not records.agrees(piece):
            raise DataError(f"{archive}: {path.name} is not what its manifest says; it is not used.")
        head = f"artifacts/{path.name}/"
        found = {
            name.removeprefix(head): digest
            for name, digest in contents.sha256.items()
            if name.startswith(head) and name != head + MANIFEST
        }
        if found != piece.told("files"):
            raise DataError(f"{archive}: the files of {path.name} are not those of its manifest.")


def place(folder: Path, run: str, output: Path) -> Path:
    """Rewrite a run's ``run.yaml`` for the folder that it lies in now; return the run's folder.

    Args:
        folder: holds what was extracted, with the table of inputs.
        output: will hold, or holds, artifacts, runs and inputs.
    """
    home = folder / "runs" / run
    cfg = schema.load(home / RUN)
    cfg.output = str(output.absolute())
    table = json.loads((folder / INPUTS).read_text(encoding=NAMES[0], errors=NAMES[1]))
    for key, inside in table.items():
        inputs = isinstance(inside, str) and PurePosixPath(inside).parts[:1] == ("inputs",)
        if not inputs or ".." in inside or not (folder / inside).exists():
            raise DataError(f"{folder / INPUTS}: {key} is at {inside}, which did not come with it.")
        put(cfg, key, str(output.absolute() / inside))
    artifacts.write_atomic(home / RUN, schema.dump(cfg))
    return home


def put(cfg: RunConfig, key: str, value: str) -> None:
    """Set a value of a configuration by its dotted key.

    Raises:
        DataError: if it has no such key, or one that holds no text.
    """
    part: Any = cfg
    *groups, last = key.split(".")
    try:
        for name in groups:
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        there = last in part if isinstance(part, dict) else hasattr(part, last)
        if schema.field_type(key) not in (str, str | None) or not there:
            raise KeyError(key)
    except (KeyError, AttributeError):
        raise DataError(f"{INPUTS}: the run has no key '{key}' that names a file.") from None
    if isinstance(part, dict):
        part[last] = value
    else:
        setattr(part, last, value)


def bring_in(archive: Path, output: Path) -> Path:
    """Put an archived run among one's own, and return its folder.

    The run's record goes first, so that what follows is not collected as garbage. Artifacts that are
    made already stay as they are.

    Raises:
        DataError, UserError: as ``unpack``; if there is such a run already.
    """
    hold = output / "artifacts" / f"import-{os.getpid():x}"  # as one that is built
    scratch = hold.with_name(hold.name + PARTIAL)
    try:
        hold.parent.mkdir(parents=True, exist_ok=True)
        with artifacts.locked(hold) as lock:
            try:
                return _bring_in(archive, output, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                lock.unlink()
    except OSError as error:
        raise artifacts.cannot_write(output, error) from None


def _bring_in(archive: Path, output: Path, scratch: Path) -> Path:
    run = unpack(archive, scratch).name
    home = output / "runs" / run
    if home.exists():
        raise UserError(f"{home} is there already; remove it first with `ftpipe runs remove {run}`.")
    place(scratch, run, output)
    home.parent.mkdir(exist_ok=True)
    for made in (path for path in scratch.rglob("*") if path.is_dir()):
        artifacts.sync(made)
    (scratch / "runs" / run).rename(home)
    artifacts.sync(home.parent)
    for path in sorted(scratch.glob("inputs/*/*")):
        to = output / path.relative_to(scratch)
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists():
            path.rename(to)
    for path in sorted(scratch.glob("artifacts/*")):
        final = output / path.relative_to(scratch)
        with suppress(BusyError), artifacts.locked(final):  # whoever builds it makes the same
            if not final.exists():
                path.rename(final)
                artifacts.sync(final.parent)
    return home
