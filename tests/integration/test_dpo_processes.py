"""Preferences in real processes: two ranks as one, and killed at random moments with the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.test_processes import _wait_for, _wait_until_gone, command, ftpipe, prepared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

# 20 pairs, 6 a step: the last step of each epoch is filled up; the run ends in its third epoch
WORDS = (
    *("dpo", "recipe=tiny", "stages=[prepare,sft,dpo]", "launch.threads=1", "data=own"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, unpaired]}}",
    *("data.validation=4", "sft.max_steps=4", "sft.samples=0", "adapter.dropout=0", "dpo.samples=1"),
    *("dpo.max_steps=10", "dpo.batch_size=6", "dpo.log_every=1", "dpo.learning_rate=2e-3"),
    *("dpo.save_every=2", "dpo.keep_checkpoints=3", "launch.micro_batch_size=1"),
)


def made(folder: Path, stage: str) -> Path:
    (found,) = (folder / "outputs/artifacts").glob(f"{stage}-*/manifest.json")
    return found.parent


def losses(folder: Path) -> list[float]:
    lines = (made(folder, "dpo") / "metrics.jsonl").read_text().splitlines()
    return [line["dpo/loss"] for line in map(json.loads, lines) if "dpo/loss" in line]


def metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((made(folder, "dpo") / "manifest.json").read_text())["metrics"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = ftpipe(folder, *WORDS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("extra", [(), ("dpo.loss=kto",)])
def test_two_ranks_prefer_as_one_does(whole: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    one = whole
    if extra:
        one = prepared(whole, tmp_path / "one", "dpo")
        assert ftpipe(one, *WORDS, *extra).returncode == 0
    two = prepared(whole, tmp_path / "two", "dpo")
    done = ftpipe(two, *WORDS, *extra, "launch.processes=2")
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-5)
    assert metrics(two)["tokens"] == metrics(one)["tokens"]
    for name in ("held_out_loss", "held_out_loss_before"):
        assert metrics(two)[name] == pytest.approx(metrics(one)[name], rel=1e-3)
    first, second = (load_file(made(n, "dpo") / "adapter_model.safetensors") for n in (one, two))
    for name, weight in first.items():
        assert (weight - second[name]).abs().max() < 2e-3, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, ranks: int
) -> None:
    words = (*WORDS, f"launch.processes={ranks}")
    unhurt = whole
    if ranks == 2:
        unhurt = prepared(whole, tmp_path / "unhurt", "dpo")
        assert ftpipe(unhurt, *words).returncode == 0
    hurt = prepared(whole, tmp_path / "hurt", "dpo")
    draw = random.Random(ranks)
    for kill in range(3 - ranks):  # the second time in what the first one left
        process = subprocess.Popen(
            command(*words), cwd=hurt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        later = "outputs/artifacts/dpo-*.partial/checkpoints/checkpoint-*/whole.json"
        _wait_for(hurt, later)
        time.sleep(draw.uniform(0, 1 if kill == 0 else 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait_until_gone(hurt)
    again = ftpipe(hurt, *words)
    assert again.returncode == 0, again.stderr
    for file in ("adapter_model.safetensors", "samples.md", "trace.jsonl", "initial.json"):
        ours, theirs = (made(folder, "dpo") / file for folder in (hurt, unhurt))
        assert ours.read_bytes() == theirs.read_bytes(), file
    assert losses(hurt) == losses(unhurt)
