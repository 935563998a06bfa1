"""An artifact is whole or not there: what a crash, a second process and damage leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftpipe import artifacts
from ftpipe.artifacts import building, find, open_artifact, place, publish
from ftpipe.errors import BusyError, UserError

FILES = {"model.safetensors": b"\x00weights" * 999, "a/b/c.json": b"{}", "empty": b""}
MANIFEST = {"kind": "policy", "stage": "sft", "metrics": {"loss": 1.5}}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make(root: Path, print_: str = "0123456789abcdef") -> artifacts.Artifact:
    with building(root, "sft", print_) as partial:
        fill(partial)
        return publish(partial, {**MANIFEST, "fingerprint": print_})


def independent(folder: Path) -> dict[str, str]:
    """Return every file's SHA-256, with os.walk and hashlib alone."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base) / name
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# --- fingerprints and digests ---


def test_a_fingerprint_is_of_the_content_not_of_its_order() -> None:
    one = {"a": 1, "b": {"c": [1, 2], "d": "é"}}
    two = {"b": {"d": "é", "c": [1, 2]}, "a": 1}
    # canonical JSON by hand: keys sorted, no spaces, UTF-8
    text = '{"a":1,"b":{"c":[1,2],"d":"é"}}'
    assert artifacts.fingerprint(one) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert artifacts.fingerprint(two) == artifacts.fingerprint(one)


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}, {}])
def test_another_content_has_another_fingerprint(other: dict[str, object]) -> None:
    assert artifacts.fingerprint(other) != artifacts.fingerprint({"a": 1})


def test_the_order_of_a_list_counts() -> None:
    assert artifacts.fingerprint({"a": [1, 2]}) != artifacts.fingerprint({"a": [2, 1]})


# --- publishing ---


def test_the_manifest_lists_the_digest_of_every_file(tmp_path: Path) -> None:
    made = make(tmp_path)
    want = independent(made.path)
    assert want.pop("manifest.json")
    assert set(want) == set(FILES)
    assert json.loads((made.path / "manifest.json").read_bytes())["files"] == want


def test_a_published_artifact_is_found_and_reads_back(tmp_path: Path) -> None:
    assert find(tmp_path, "sft", "0123456789abcdef") is None
    made = make(tmp_path)
    assert made.path == place(tmp_path, "sft", "0123456789abcdef")
    assert made.path == tmp_path / "artifacts" / "sft-0123456789abcdef"
    assert find(tmp_path, "sft", "0123456789abcdef") == made
    assert find(tmp_path, "sft", "0123456789abcdee") is None
    assert find(tmp_path, "dpo", "0123456789abcdef") is None
    assert (made.kind, made.stage, made.fingerprint) == ("policy", "sft", "0123456789abcdef")
    assert made.metrics == {"loss": 1.5}


def test_nothing_but_the_artifact_and_its_lock_is_left(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert sorted(path.name for path in made.path.parent.iterdir()) == [
        made.path.name,
        f"{made.path.name}.lock",
    ]
    assert sorted(independent(made.path)) == sorted([*FILES, "manifest.json"])
    # who built it, and on which machine, is said while it is built
    assert made.path.with_name(f"{made.path.name}.lock").read_bytes() == b""


def test_a_scratch_folder_is_no_artifact(tmp_path: Path) -> None:
    with building(tmp_path, "sft", "ab") as partial:
        fill(partial)
        assert partial.name == "sft-ab.partial"
        assert find(tmp_path, "sft", "ab") is None


def test_a_failed_build_keeps_its_scratch_for_the_next(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), building(tmp_path, "sft", "ab") as partial:
        (partial / "checkpoint").write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert find(tmp_path, "sft", "ab") is None
    with building(tmp_path, "sft", "ab") as partial:
        assert (partial / "checkpoint").read_text(encoding="utf-8") == "half"
        artifacts.discard(partial)
        assert not partial.exists()


def test_a_manifest_of_an_earlier_attempt_is_written_anew(tmp_path: Path) -> None:
    # killed between the manifest and the rename; then a file changed
    with building(tmp_path, "sft", "ab") as partial:
        fill(partial)
        (partial / "manifest.json").write_text('{"files": {"old": "x"}}', encoding="utf-8")
        made = publish(partial, {**MANIFEST, "fingerprint": "ab"})
    want = independent(made.path)
    del want["manifest.json"]
    assert made.manifest["files"] == want


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b'{"kind": "policy"}', b"\xff\xfe"],
)
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    made = make(tmp_path)
    (made.path / "manifest.json").write_bytes(damage)
    with pytest.raises(UserError) as refused:
        open_artifact(made.path)
    said = str(refused.value)
    assert said.startswith(f"{made.path}/manifest.json is damaged (")
    assert said.endswith("); delete the folder to build it again.")


def test_a_folder_that_lost_its_manifest_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    # else the rename would fail after hours of training
    made = make(tmp_path)
    (made.path / "manifest.json").unlink()
    assert find(tmp_path, "sft", "0123456789abcdef") is None
    with pytest.raises(UserError) as refused:
        make(tmp_path)
    assert (
        str(refused.value) == f"{made.path} has no manifest.json; delete the folder to build it again."
    )


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    artifacts.write_atomic(file, "old")
    artifacts.write_atomic(file, "é")
    assert file.read_bytes() == "é".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# --- folders that cannot be written ---


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "outputs"
    with pytest.raises(UserError) as refused, building(root, "sft", "ab"):
        raise AssertionError("there is no folder to build in")
    assert str(refused.value) == (
        f"output={root} cannot be written (Not a directory); choose another folder with output=PATH."
    )


def test_a_folder_below_proc_cannot_be_written() -> None:
    root = Path("/proc/outputs")
    if not root.parent.is_dir():
        pytest.skip("no /proc on this system")
    with (
        pytest.raises(UserError, match=r"^output=/proc/outputs cannot be written \("),
        building(root, "sft", "ab"),
    ):
        raise AssertionError("there is no folder to build in")


def test_a_read_only_folder_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only to root")
    tmp_path.chmod(0o500)
    with (
        pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"),
        building(tmp_path / "outputs", "sft", "ab"),
    ):
        raise AssertionError("there is no folder to build in")


# --- crashes ---

PUBLISH = """
import os, signal, sys
from pathlib import Path
from ftpipe.artifacts import building, publish

def make(root, print_):
    with building(root, "sft", print_) as partial:
        for name, size in (("a.safetensors", 300_000), ("b/c.json", 10)):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(os.urandom(size))
        (partial / ".done").touch()
        manifest = {"kind": "policy", "stage": "sft", "fingerprint": print_, "metrics": {}}
        publish(partial, manifest, drop=".done")
"""

# Each child dies at its n-th step (open, mkdir, rename, ...), until one lives to the end.
DIE_AT_EVERY_STEP = """
for death in range(1, 1000):
    child = os.fork()
    if child == 0:
        steps = 0
        def step(event, _):
            global steps
            if event.split(".")[0] in ("open", "os", "fcntl", "shutil"):
                steps += 1
                if steps == death:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(step)
        make(Path(sys.argv[1]) / f"{death:03}", "ab")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(death)
"""

FOR_EVER = """
import itertools
print("started", flush=True)
for number in itertools.count():
    make(Path(sys.argv[1]), f"{number:016x}")
"""


def finished(folder: Path) -> list[Path]:
    """Return what looks like an artifact: a folder of that name, or one with a manifest found."""
    return [path for path in folder.iterdir() if path.is_dir() and path.suffix != ".partial"]


def check_whole(path: Path, drop: str = "") -> None:
    want = independent(path)
    del want["manifest.json"]
    want.pop(drop, None)
    assert open_artifact(path).manifest["files"] == want
    assert set(want) == {"a.safetensors", "b/c.json"}


def test_killed_at_any_step_an_artifact_is_whole_or_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUBLISH + DIE_AT_EVERY_STEP, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = int(done.stdout)
    assert last > 10
    seen = []
    for root in sorted(tmp_path.iterdir()):
        there = finished(root / "artifacts") if (root / "artifacts").is_dir() else []
        seen.append(bool(there))
        assert (find(root, "sft", "ab") is not None) == bool(there)
        for path in there:
            check_whole(path)
        if there:
            continue
        left = root / "artifacts" / "sft-ab.partial"
        if (left / "manifest.json").is_file():  # the word that it is complete goes after the manifest
            check_whole(left, drop=".done")
        # whatever the crash left, the next attempt makes it whole
        with building(root, "sft", "ab") as partial:
            (partial / "b").mkdir(exist_ok=True)
            for name in ("a.safetensors", "b/c.json"):
                (partial / name).write_bytes(b"new")
            publish(partial, {**MANIFEST, "fingerprint": "ab"}, drop=".done")
        (path,) = finished(root / "artifacts")
        new = hashlib.sha256(b"new").hexdigest()
        assert open_artifact(path).manifest["files"] == {"a.safetensors": new, "b/c.json": new}
    # first it is never there, from one step on it always is
    assert seen == sorted(seen)
    assert not seen[0] and seen[-1]


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_every_artifact_is_whole(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-c", PUBLISH + FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.05, 0.5))
        process.kill()
    for path in finished(tmp_path / "artifacts"):
        check_whole(path)
        assert find(tmp_path, *path.name.split("-")) is not None


# --- two processes ---

HOLD = """
import sys, time
from pathlib import Path
from ftpipe.artifacts import building
with building(Path(sys.argv[1]), "sft", "ab"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that is building the artifact, as this one did before."""
    with building(tmp_path, "sft", "ab"):
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_builds(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    with pytest.raises(BusyError) as refused, building(tmp_path, "sft", "ab"):
        raise AssertionError("two processes build one artifact")
    said = str(refused.value)
    assert said.startswith(
        f"sft-ab is being built by process {holder.pid} on {os.uname().nodename} since "
    )
    assert said.endswith("; wait for it, or end that process.")
    # and is told so again: asking does not blur who it is
    with pytest.raises(BusyError, match=f"process {holder.pid} "), building(tmp_path, "sft", "ab"):
        raise AssertionError("two processes build one artifact")


def test_another_artifact_can_be_built_at_the_same_time(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    assert make(tmp_path, "cd").path.is_dir()


def test_a_killed_builder_holds_nothing(tmp_path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert make(tmp_path, "ab").path.is_dir()


def test_a_lock_is_given_back_when_the_build_ends(tmp_path: Path) -> None:
    make(tmp_path, "ab")
    with building(tmp_path, "sft", "ab") as partial:
        artifacts.discard(partial)
