"""PPO in real processes: the same bytes twice, two ranks as one, killed at random moments."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.test_processes import _wait_for, _wait_until_gone, command, ftpipe, prepared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

# 7 answers a rollout: ranks and minibatches have unlike shares of them
WORDS = (
    *("ppo", "recipe=tiny", "stages=[prepare,sft,reward,ppo]", "launch.threads=1", "data=own"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}",
    *("data.validation=5", "sft.max_steps=4", "sft.samples=0", "reward.max_steps=4"),
    *("reward.learning_rate=5e-3", "ppo.ignore_gate=true", "ppo.batch_size=14", "ppo.minibatches=2"),
    *("ppo.max_steps=8", "ppo.max_new_tokens=8", "ppo.learning_rate=1e-3", "ppo.ptx_weight=0.1"),
    *("ppo.kl_target=0.1", "ppo.kl_horizon=100", "ppo.save_every=1", "ppo.eval_every=2"),
    *("ppo.samples=2", "launch.micro_batch_size=2", "ppo.stop=['a','e']", "adapter.dropout=0"),
)


def made(folder: Path, stage: str = "ppo") -> Path:
    (found,) = (folder / "outputs/artifacts").glob(f"{stage}-*/manifest.json")
    return found.parent


def lines(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics without what a clock says."""
    read = map(json.loads, (made(folder) / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if "seconds" not in name and name != "time"}
        for line in read
    ]


def answers(folder: Path) -> dict[str, Any]:
    files = (made(folder) / "held_out").iterdir()
    return {file.name: json.loads(file.read_text()) for file in files}


def files(folder: Path) -> dict[str, bytes]:
    """Return what must be the same, byte for byte."""
    names = (
        *("adapter_model.safetensors", "adapter_config.json", "samples.md", "curves.png"),
        *("trace.jsonl", "initial.json"),
    )
    found = {name: (made(folder) / name).read_bytes() for name in names}
    return found | {path.name: path.read_bytes() for path in (made(folder) / "held_out").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing interrupts, by their number of ranks."""
    folders = {1: tmp_path_factory.mktemp("ranks1")}
    done = ftpipe(folders[1], *WORDS)
    assert done.returncode == 0, done.stderr
    folders[2] = prepared(folders[1], tmp_path_factory.mktemp("ranks2"), "ppo")
    done = ftpipe(folders[2], *WORDS, "launch.processes=2")
    assert done.returncode == 0, done.stderr
    return folders


def test_the_same_command_in_another_folder_gives_the_same_bytes(
    whole: dict[int, Path], tmp_path: Path
) -> None:
    again = prepared(whole[1], tmp_path / "again", "ppo")
    assert ftpipe(again, *WORDS).returncode == 0
    assert files(again) == files(whole[1]) and lines(again) == lines(whole[1])


def test_two_ranks_learn_as_one_does(whole: dict[int, Path], tmp_path: Path) -> None:
    # Two ranks round otherwise, and a draw that falls on the border of two tokens by less than that
    # parts the runs: this is rarer in few steps.
    one = prepared(whole[1], tmp_path / "one", "ppo")
    two = prepared(whole[1], tmp_path / "two", "ppo")
    for folder, words in ((one, ()), (two, ("launch.processes=2",))):
        done = ftpipe(folder, *WORDS, "ppo.max_steps=4", *words)
        assert done.returncode == 0, done.stderr
    assert len(lines(one)) == len(lines(two)) == 4 + 3
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)
    for name, told in answers(one).items():
        for ours, theirs in zip(told["answers"], answers(two)[name]["answers"], strict=True):
            assert theirs["answer"] == ours["answer"] and theirs["ended"] == ours["ended"]
            assert theirs["score"] == pytest.approx(ours["score"], rel=1e-3, abs=1e-4)
    first, second = (load_file(made(n) / "adapter_model.safetensors") for n in (one, two))
    came = load_file(made(one, "sft") / "adapter_model.safetensors")
    for name, weight in first.items():
        moved = (weight - came[name]).abs().max()
        assert (weight - second[name]).abs().max() < 0.05 * moved, name


@pytest.mark.parametrize(("ranks", "seed"), [(1, 1), (2, 2)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    whole: dict[int, Path], tmp_path: Path, ranks: int, seed: int
) -> None:
    words = (*WORDS, f"launch.processes={ranks}")
    hurt = prepared(whole[ranks], tmp_path / "hurt", "ppo")
    draw = random.Random(10 * ranks + seed)
    for _ in range(2):  # the second time in what the first one left
        process = subprocess.Popen(
            command(*words), cwd=hurt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_for(hurt, "outputs/artifacts/ppo-*.partial/metrics.jsonl")
        time.sleep(draw.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait_until_gone(hurt)
    again = ftpipe(hurt, *words)
    assert again.returncode == 0, again.stderr
    assert files(hurt) == files(whole[ranks])
    assert lines(hurt) == lines(whole[ranks])
    assert not list(made(hurt).rglob("*checkpoint*"))


def test_ended_for_its_health_it_says_so_once_and_goes_on(
    whole: dict[int, Path], tmp_path: Path
) -> None:
    words = (*WORDS, "launch.processes=2")
    hurt = prepared(whole[2], tmp_path / "hurt", "ppo")
    limits = ("ppo.health.min_entropy=0.99999", "ppo.health.patience=1")
    ended = ftpipe(hurt, *words, *limits)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("ppo was ended in rollout") == 1 and "Traceback" not in ended.stderr
    (state,) = hurt.glob("outputs/artifacts/ppo-*.partial/checkpoints/ended-*/state.json")
    assert json.loads(state.read_text())["progress"]["rollouts"] < 8
    again = ftpipe(hurt, *words)
    assert again.returncode == 0, again.stderr
    assert files(hurt) == files(whole[2]) and lines(hurt) == lines(whole[2])
