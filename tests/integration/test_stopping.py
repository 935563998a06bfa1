"""A stage that is asked to stop goes on as if it had not; ranks that die or hang end their stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftpipe import cli, stopping
from tests.integration.test_processes import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

# Checkpoints at 2, 4, 6 and 8 (the end), the last two of which are kept; lines of metrics at 1, 4 and 8:
# stops at 3 and 7 are at neither.
EVERY = ("max_steps=8", "save_every=2", "log_every=4", "learning_rate=1e-3")
PAIRS = (
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}"
)
WORDS = {
    "sft": ("stages=[prepare,sft]", "sft.samples=1", "sft.sample_tokens=4"),
    "dpo": ("stages=[prepare,dpo]", "dpo.start=model", "dpo.samples=0"),
    "reward": ("stages=[prepare,reward]", "reward.start=model"),
    "ppo": (
        *("stages=[prepare,ppo]", "ppo.start=model", "ppo.reward=function", "ppo.function.name=length"),
        *("ppo.function.parameters={target: 5}", "ppo.batch_size=8", "ppo.max_new_tokens=8"),
        *("ppo.eval_every=2", "ppo.samples=1"),
    ),
}


def words(stage: str) -> list[str]:
    return [
        *("run", "recipe=tiny", "data=own", PAIRS, "data.template=chatml", "data.validation=5"),
        *("launch.threads=1", "launch.micro_batch_size=2", "adapter.dropout=0.1"),
        *(f"{stage}.{one}" for one in EVERY),
        *WORDS[stage],
    ]


def told(path: Path) -> Any:
    """Return what a file of an artifact says but for what a clock said."""
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    return [
        {name: value for name, value in line.items() if "seconds" not in name and name != "time"}
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]


def made(folder: Path, stage: str) -> dict[str, Any]:
    (manifest,) = folder.glob(f"outputs/artifacts/{stage}-*/manifest.json")
    place = manifest.parent
    names = [path for path in place.rglob("*") if path.is_file() and path != manifest]
    # a state of the Trainer says how long its steps took
    return {str(path.relative_to(place)): told(path) for path in names if path.name[:8] != "trainer_"}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("stage", "stops"),
    [("sft", [3, 7]), ("dpo", [3, 7]), ("dpo", [3]), ("reward", [3, 7]), ("ppo", [3, 7])],
)
def test_a_stage_that_stops_makes_what_it_would_have_made(
    stage: str,
    stops: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    monkeypatch.chdir(whole)
    assert cli.main(words(stage)) == 0
    monkeypatch.chdir(parts)
    unit = "rollout" if stage == "ppo" else "step"
    for before, at in zip([0, *stops], stops, strict=False):
        no = iter([False] * (at - before - 1))
        monkeypatch.setattr(stopping, "asked", lambda no=no: next(no, True))
        assert cli.main(words(stage)) == 75
        said = capsys.readouterr()
        assert f"after {unit} {at} of 8;" in said.err
        marks = list(parts.glob("outputs/artifacts/*.partial/checkpoints/*/asked"))
        assert [mark.parent.name for mark in marks] == [f"checkpoint-{at}"] * (stage != "ppo")
        assert (f"continuing from checkpoint-{before}" in said.out) is (before > 0)
    monkeypatch.setattr(stopping, "asked", lambda: False)
    assert cli.main(words(stage)) == 0
    assert f"continuing from checkpoint-{stops[-1]}" in capsys.readouterr().out
    one, other = made(whole, stage), made(parts, stage)
    assert sorted(other) == sorted(one)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.usefixtures("in_process")
def test_a_stop_at_the_last_step_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    no = iter([False] * 7)
    monkeypatch.setattr(stopping, "asked", lambda: next(no, True))
    assert cli.main(words("sft")) == 0


def marked(mark: str) -> dict[str, psutil.Process]:
    """Return the living processes that carry a mark, ranks by their number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            if env.get("FTPIPE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[env.get("RANK", str(process.pid))] = process
    return found


def started(*more: str) -> subprocess.Popen[str]:
    """Start a training that would last for hours, and wait until it has trained for some steps."""
    driver = subprocess.Popen(
        command(*words("sft"), "sft.max_steps=100000", *more),
        env={**os.environ, "FTPIPE_TEST_MARK": (mark := uuid.uuid4().hex)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    files = "outputs/artifacts/sft-*.partial/metrics.jsonl"
    until = time.monotonic() + 120
    while not any(len(file.read_text()) > 300 for file in Path().glob(files)):
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    driver.args = mark  # by which its processes are found
    return driver


def end(driver: subprocess.Popen[str]) -> None:
    for process in marked(str(driver.args)).values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    driver.communicate()


@pytest.mark.parametrize(("number", "within"), [(signal.SIGSTOP, 75), (signal.SIGKILL, 45)])
def test_a_rank_that_hangs_or_dies_ends_the_stage_in_time(number: int, within: float) -> None:
    """A hang is known after ``launch.timeout_minutes``; torch's launcher waits half a minute more."""
    driver = started("launch.processes=2", "launch.timeout_minutes=0.1")
    mark = str(driver.args)
    try:
        rank = marked(mark)["1"]
        rank.send_signal(number)
        _, said = driver.communicate(timeout=within)
        assert driver.returncode == 1
        assert f"rank 1 (process {rank.pid} on " in said
        assert said.splitlines()[-1].startswith("ftpipe: stage 'sft' ended with code ")
        until = time.monotonic() + 15
        while marked(mark) and time.monotonic() < until:
            time.sleep(0.1)
        assert marked(mark) == {}
    finally:
        end(driver)


def test_a_command_that_is_told_to_stop_says_so_and_ends_soon() -> None:
    driver = started()
    try:
        driver.send_signal(signal.SIGUSR1)
        out, said = driver.communicate(timeout=30)
    finally:
        end(driver)
    assert driver.returncode == 75
    assert "sft: asked to stop; it saves and ends after this step" in out
    last = said.splitlines()[-1]
    assert last.startswith("ftpipe: stage 'sft' stopped as it was asked to, after step ")
