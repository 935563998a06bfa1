"""A stage that is asked to stop goes on as if it had not; ranks that die or hang end their stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftpipe import cli, stopping
from tests.integration.test_processes import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]

# Checkpoints at 3 and 6 (the end), lines of metrics at 1, 4 and 6: a stop at 5 is far from either.
EVERY = ("max_steps=6", "save_every=3", "log_every=4", "learning_rate=1e-3")
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


def words(stage: str, folder: str) -> list[str]:
    return [
        *("run", "recipe=tiny", "data=own", PAIRS, "data.template=chatml", "data.validation=5"),
        *("launch.threads=1", "launch.micro_batch_size=2", "adapter.dropout=0.1", f"output={folder}"),
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


def made(folder: str, stage: str) -> dict[str, Any]:
    (manifest,) = Path(folder).glob(f"artifacts/{stage}-*/manifest.json")
    place = manifest.parent
    names = [path for path in place.rglob("*") if path.is_file() and path != manifest]
    # a state of the Trainer says how long its steps took
    return {str(path.relative_to(place)): told(path) for path in names if path.name[:8] != "trainer_"}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("stage", WORDS)
def test_a_stage_that_stops_twice_makes_what_it_would_have_made(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(stage, "whole")) == 0
    for at in (2, 3):  # steps of each attempt: it ends after 2, then after 5
        left = iter([False] * (at - 1))
        monkeypatch.setattr(stopping, "asked", lambda left=left: next(left, True))
        assert cli.main(words(stage, "parts")) == 75
    said = capsys.readouterr()
    unit = "rollout" if stage == "ppo" else "step"
    assert [f"after {unit} {done} of 6;" in said.err for done in (2, 5)] == [True, True]
    assert "continuing from checkpoint-2" in said.out
    monkeypatch.setattr(stopping, "asked", lambda: False)
    assert cli.main(words(stage, "parts")) == 0
    assert "continuing from checkpoint-5" in capsys.readouterr().out
    whole, parts = made("whole", stage), made("parts", stage)
    assert sorted(parts) == sorted(whole)
    different = [name for name in whole if whole[name] != parts[name]]
    assert different == []


@pytest.mark.usefixtures("in_process")
def test_a_stop_at_the_last_step_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([False] * 5)
    monkeypatch.setattr(stopping, "asked", lambda: next(calls, True))
    assert cli.main(words("sft", "whole")) == 0


def marked(mark: str) -> dict[str, psutil.Process]:
    """Return the living processes that carry a mark, ranks by their number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            if env.get("FTPIPE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[env.get("RANK", str(process.pid))] = process
    return found


def test_a_rank_that_hangs_and_one_that_dies_end_the_stage_in_time() -> None:
    """The minute of the time limit is short here; a hang ends the stage after it, a death at once."""
    mark = uuid.uuid4().hex
    env = {**os.environ, "FTPIPE_TEST_MARK": mark, "PYTHONUNBUFFERED": "1"}
    long = ("sft.max_steps=100000", "launch.processes=2", "launch.timeout_minutes=0.1")
    for number, within in ((signal.SIGSTOP, 60), (signal.SIGKILL, 45)):
        driver = subprocess.Popen(
            command(*words("sft", "outputs"), *long),
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = "outputs/artifacts/sft-*.partial/metrics.jsonl"
        until = time.monotonic() + 120
        while not any(len(file.read_text()) > 300 for file in Path().glob(lines)):
            assert driver.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        rank = marked(mark)["1"]
        rank.send_signal(number)
        hit = time.monotonic()
        _, said = driver.communicate(timeout=within)
        assert driver.returncode == 1
        assert time.monotonic() - hit < within
        assert f"rank 1 (process {rank.pid} on " in said
        assert said.splitlines()[-1].startswith("ftpipe: stage 'sft' ended with code ")
        until = time.monotonic() + 15
        while marked(mark) and time.monotonic() < until:
            time.sleep(0.1)
        assert marked(mark) == {}
        for file in Path().glob(lines):
            file.unlink()


def test_a_command_that_is_told_to_stop_says_so_and_ends_soon() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-m", "ftpipe.cli", *words("sft", "outputs"), "sft.max_steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not any(
        file.stat().st_size for file in Path().glob("outputs/artifacts/sft-*.partial/metrics.jsonl")
    ):
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    driver.send_signal(signal.SIGUSR1)
    out, said = driver.communicate(timeout=30)
    assert driver.returncode == 75
    assert "sft: asked to stop; it saves and ends after this step" in out
    assert said.startswith("ftpipe: stage 'sft' stopped as it was asked to, after step ")
