"""The reward stage in real processes: two ranks as one, killed in the second member of an ensemble."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftpipe import artifacts
from tests.integration.test_processes import _wait_for, _wait_until_gone, command, ftpipe, prepared
from tests.integration.test_reward import SHORT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

WORDS = (
    *("reward", *SHORT, "adapter.dropout=0", "reward.ensemble=2", "reward.max_steps=null"),
    *("reward.epochs=2", "reward.save_every=2", "reward.keep_checkpoints=20"),
    *("reward.batch_size=8", "reward.eval_every=3"),
)
LATER = "outputs/artifacts/reward-*.partial/member-1/checkpoints/checkpoint-4/whole.json"


def made(folder: Path) -> Path:
    (found,) = folder.glob("outputs/artifacts/reward-*/manifest.json")
    return found.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing interrupts, by their number of ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        if ranks == 2:
            prepared(folders[1], folders[2], "reward")
        done = ftpipe(folders[ranks], *WORDS, f"launch.processes={ranks}")
        assert done.returncode == 0, done.stderr
    return folders


def test_two_ranks_train_and_measure_as_one_does(whole: dict[int, Path]) -> None:
    one, two = (made(whole[ranks]) for ranks in (1, 2))
    for member in ("member-0", "member-1"):
        lines = [
            [json.loads(line) for line in (at / member / "metrics.jsonl").read_text().splitlines()]
            for at in (one, two)
        ]
        assert len(lines[0]) == len(lines[1]) > 10
        for ours, theirs in zip(*lines, strict=True):
            for name in set(ours) - {"time"}:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name
        first, second = (load_file(at / member / "adapter_model.safetensors") for at in (one, two))
        for name, weight in first.items():
            assert (weight - second[name]).abs().max() < 1e-3, name
    ours, theirs = (artifacts.open_artifact(at).metrics for at in (one, two))
    for name in set(ours) - {"tokens_per_second"}:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name


def test_killed_in_the_second_member_it_ends_with_the_same_bytes(
    whole: dict[int, Path], tmp_path: Path
) -> None:
    words = (*WORDS, "launch.processes=2")
    prepared(whole[2], tmp_path, "reward")
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_for(tmp_path, LATER)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_gone(tmp_path)
    assert not list(tmp_path.glob("outputs/artifacts/reward-*/manifest.json"))
    again = ftpipe(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert "trained already" in again.stdout and "continuing from checkpoint-" in again.stdout
    names = (
        *("report.json", "reward.json", "report.md", "reliability.png", "reward_by_length.png"),
        *(f"member-{k}/adapter_model.safetensors" for k in (0, 1)),
        *(f"member-{k}/trace.jsonl" for k in (0, 1)),
    )
    for name in names:
        assert (made(tmp_path) / name).read_bytes() == (made(whole[2]) / name).read_bytes(), name
    ours, theirs = (artifacts.open_artifact(made(at)).metrics for at in (tmp_path, whole[2]))
    assert {**ours, "tokens_per_second": 0} == {**theirs, "tokens_per_second": 0}
