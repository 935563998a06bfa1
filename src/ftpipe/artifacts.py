"""Artifacts: folders that are made once, whole or not at all.

A stage writes into ``<stage>-<fingerprint>.partial``. When it is done the manifest is written, last,
and the folder is renamed to ``<stage>-<fingerprint>``. So an artifact exists when its manifest does.
An exclusive lock keeps two processes from building one artifact.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftpipe.errors import BusyError, UserError

MANIFEST = "manifest.json"
SCRATCH = ".tmp"  # the end of a half-written file's name
PARTIAL, LOCK = ".partial", ".lock"  # the ends of the names of a scratch folder and of a lock file
LOOKS, PAUSE = 5, 0.02  # how often and how long, in seconds, to wait for somebody who only looks


@dataclass(frozen=True)
class Artifact:
    """A finished folder: what it is, what decided it, and where it lies."""

    kind: str
    stage: str
    fingerprint: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = self.manifest["metrics"]
        return metrics


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of ``facts`` as canonical JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder`` but the manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: digest(path) for name, path in names.items() if name != MANIFEST}


def place(root: Path, stage: str, print_: str) -> Path:
    """Return where the artifact of a stage with this fingerprint lies, or would lie."""
    return root / "artifacts" / f"{stage}-{print_}"


def find(root: Path, stage: str, print_: str) -> Artifact | None:
    """Return the finished artifact, or None if there is none."""
    path = place(root, stage, print_)
    return open_artifact(path) if (path / MANIFEST).is_file() else None


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest.

    Raises:
        UserError: if the manifest is damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return Artifact(manifest["kind"], manifest["stage"], manifest["fingerprint"], path, manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST} is damaged ({error}); delete the folder to build it again."
        ) from None


def damage(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the files of a folder, one by one; reads every byte of them.

    Args:
        files: their digests by relative path, as ``digests`` had them when they were written.
    """
    for name, value in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif digest(path) != value:
            yield f"{name} is not as it was written"


@contextmanager
def building(root: Path, stage: str, print_: str) -> Iterator[Path]:
    """Hold the exclusive right to build an artifact; yield its scratch folder.

    The lock belongs to the process, so a killed builder holds nothing. The scratch folder stays
    after a crash: a later build may continue from the checkpoints in it.

    Raises:
        BusyError: naming who builds it, if another process does.
        UserError: if the output folder cannot be written, or a folder without manifest is in the way.
    """
    final = place(root, stage, print_)
    if final.is_dir() and not (final / MANIFEST).is_file():
        raise UserError(f"{final} has no {MANIFEST}; delete the folder to build it again.")
    partial = final.with_name(final.name + PARTIAL)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(final)
    except OSError as error:
        raise cannot_write(root, error) from None
    with lock:
        try:
            partial.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(root, error) from None
        try:
            yield partial
        finally:
            lock.truncate(0)  # who builds it, and on which machine, is of no account any more


@contextmanager
def locked(final: Path) -> Iterator[Path]:
    """Hold the exclusive right to what lies at an artifact's place; yield the lock file.

    The lock file stays afterwards, unless who holds it removes it.

    Raises:
        BusyError: naming who builds it, if another process does.
        OSError: if the folder cannot be written.
    """
    with _lock(final):
        yield _lock_file(final)


def is_held(final: Path) -> bool:
    """Whether a process holds an artifact's lock: looks, and is seen by a builder for an instant."""
    try:
        with _lock_file(final).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else has it, or it cannot be told
        return True
    return False


def _lock_file(final: Path) -> Path:
    return final.with_name(final.name + LOCK)


def _lock(final: Path) -> IO[str]:
    """Return an artifact's lock file, open, and locked until it is closed."""
    for look in itertools.count(1):
        file = _lock_file(final).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held it before may have removed it: then another process could lock a new file
            if not _lies_there(file, _lock_file(final)):
                file.close()
                continue
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            file.flush()
            return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
        except BaseException:
            file.close()
            raise
        if look >= LOOKS:
            raise BusyError(
                f"{final.name} is being built by {holder}; wait for it, or end that process."
            )
        time.sleep(PAUSE)
    raise AssertionError("counting has no end")


def _lies_there(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def publish(partial: Path, manifest: Mapping[str, Any], drop: str = "") -> Artifact:
    """Complete a scratch folder: digest every file, write the manifest last, rename.

    Args:
        drop: a file that says the folder is complete until it is published, and not after.
    """
    for half in partial.rglob(f".*{SCRATCH}"):  # of an attempt that was killed
        half.unlink()
    files = {name: value for name, value in digests(partial).items() if name != drop}
    whole = {**manifest, "files": files}
    for path in partial.rglob("*"):
        if path.is_file():
            sync(path)
    write_atomic(partial / MANIFEST, json.dumps(whole, indent=1, sort_keys=True) + "\n")
    if drop:
        (partial / drop).unlink(missing_ok=True)
    return complete(partial)


def complete(partial: Path) -> Artifact:
    """Put a scratch folder that is whole, and has its manifest, in its place."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    partial.rename(final)
    sync(final.parent)
    return open_artifact(final)


def clear(partial: Path) -> None:
    """Empty a scratch folder."""
    discard(partial)
    partial.mkdir()


def discard(partial: Path) -> None:
    """Remove a scratch folder that holds nothing worth continuing."""
    shutil.rmtree(partial, ignore_errors=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never half."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}{SCRATCH}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def cannot_write(root: Path, error: OSError) -> UserError:
    """Return the sentence for an output folder that cannot be written."""
    return UserError(
        f"output={root} cannot be written ({error.strerror}); choose another folder with output=PATH."
    )


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk: a power cut may follow."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
