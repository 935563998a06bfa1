"""Real processes: the same bytes twice, killed and continued, two ranks, two drivers at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ftpipe import artifacts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

TINY = ("recipe=tiny", "sft.samples=0", "sft.max_steps=12", "launch.threads=1")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ftpipe.cli", *words]


def ftpipe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder, as a user would."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=400)


def policy(folder: Path) -> Path:
    (found,) = (folder / "outputs/artifacts").glob("sft-*/manifest.json")
    return found.parent


def weights(folder: Path) -> bytes:
    return (policy(folder) / "adapter_model.safetensors").read_bytes()


def prepared(whole: Path, folder: Path, stage: str = "sft") -> Path:
    """Return a folder with all that a run needs but what its last stage makes."""
    shutil.copytree(whole / "outputs", folder / "outputs")
    for done in folder.glob(f"outputs/artifacts/{stage}-*"):
        shutil.rmtree(done) if done.is_dir() else done.unlink()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("whole")
    done = ftpipe(folder, "sft", *TINY, "sft.save_every=2")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_same_command_in_another_folder_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    assert ftpipe(tmp_path, "sft", *TINY, "sft.save_every=2").returncode == 0
    arrow, safe = "prepare-*/*/*.arrow", "safetensors"
    for pattern in (f"sft-*/adapter_model.{safe}", arrow, f"model-*/model.{safe}"):
        ours, theirs = (
            {
                path.relative_to(root): path.read_bytes()
                for path in root.glob(f"outputs/artifacts/{pattern}")
            }
            for root in (tmp_path, whole)
        )
        assert ours == theirs and ours


def test_a_second_run_does_nothing(whole: Path) -> None:
    before = policy(whole).stat().st_mtime_ns
    again = ftpipe(whole, "sft", *TINY, "sft.save_every=2")
    assert again.returncode == 0
    assert "nothing ran" in again.stdout
    assert policy(whole).stat().st_mtime_ns == before


def test_killed_after_a_checkpoint_it_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    words = ("sft", *TINY, "sft.save_every=2")
    prepared(whole, tmp_path)
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_for(tmp_path, "outputs/artifacts/sft-*.partial/checkpoints/checkpoint-*/whole.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_gone(tmp_path)
    assert not list(tmp_path.glob("outputs/artifacts/sft-*/manifest.json"))
    again = ftpipe(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-" in again.stdout
    assert weights(tmp_path) == weights(whole)
    for name in ("trace.jsonl", "initial.json"):  # as if nothing had happened
        assert (policy(tmp_path) / name).read_bytes() == (policy(whole) / name).read_bytes()
    for name in ("held_out_loss", "held_out_loss_before", "loss_last"):
        ours, theirs = (artifacts.open_artifact(policy(root)).metrics for root in (tmp_path, whole))
        assert ours[name] == theirs[name]


def _wait_for(folder: Path, pattern: str) -> None:
    for _ in range(3000):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pattern} never appeared")


def _wait_until_gone(folder: Path) -> None:
    """Wait until no process works in the folder: a killed driver's ranks end with it."""
    for _ in range(100):
        if not any(_cwd(entry) == folder.resolve() for entry in Path("/proc").glob("[0-9]*")):
            return
        time.sleep(0.1)
    raise AssertionError("a rank outlived its driver by ten seconds")


def _cwd(process: Path) -> Path | None:
    try:
        if os.getpid() == int(process.name):
            return None
        return (process / "cwd").resolve(strict=True)
    except OSError:
        return None


def test_two_ranks_train_as_one_does(whole: Path, tmp_path: Path) -> None:
    # dropout off: each rank draws its own
    words = ("sft", *TINY, "adapter.dropout=0", "launch.micro_batch_size=2", "sft.log_every=1")
    losses: dict[int, list[float]] = {}
    states: dict[int, Any] = {}
    for ranks in (1, 2):
        folder = prepared(whole, tmp_path / str(ranks))
        done = ftpipe(folder, *words, f"launch.processes={ranks}")
        assert done.returncode == 0, done.stderr
        lines = [
            json.loads(line) for line in (policy(folder) / "metrics.jsonl").read_text().splitlines()
        ]
        losses[ranks] = [line["sft/loss"] for line in lines if "sft/loss" in line]
        states[ranks] = load_file(policy(folder) / "adapter_model.safetensors")
        assert artifacts.open_artifact(policy(folder)).manifest["provenance"]["world_size"] == ranks
    assert len(losses[1]) == 12
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in states[1].items():
        assert (weight - states[2][name]).abs().max() < 1e-3, name


def test_a_second_driver_is_told_who_is_at_work(whole: Path, tmp_path: Path) -> None:
    words = ("sft", *TINY)
    prepared(whole, tmp_path)
    first = subprocess.Popen(
        command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_for(tmp_path, "outputs/artifacts/sft-*.partial")
    second = ftpipe(tmp_path, *words)
    assert second.returncode == 2
    assert f"is being built by process {first.pid} on" in second.stderr
    assert "Traceback" not in second.stderr
    assert first.wait() == 0  # undisturbed


def test_a_refused_row_is_one_sentence_from_a_real_stage(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    done = ftpipe(
        tmp_path,
        "prepare",
        *TINY,
        "data=own",
        "data.template=chatml",
        "data.sources={own: {format: prompt_completion, path: rows.jsonl}}",
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ftpipe: rows.jsonl, line 2: not valid JSON")
    assert not list(tmp_path.glob("outputs/artifacts/prepare-*/"))
