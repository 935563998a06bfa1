"""What a job runs: one stage of a frozen run, with what earlier jobs have made."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from ftpipe import artifacts, cli, launch, pipeline, schema
from ftpipe.cluster import job
from ftpipe.cluster.record import Record
from ftpipe.config import RunConfig
from ftpipe.errors import BusyError
from tests.unit.test_launch import DONE, stand_in


@pytest.fixture
def run(cfg: RunConfig) -> Path:
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    Record(["ftpipe", "submit", "recipe=mine", "--token=abc"], {}).write(folder)
    return folder


def test_a_stage_is_made_as_it_would_be_without_slurm(
    cfg: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, DONE)
    assert cli.main(["job", str(run), "model"]) == 0
    place = pipeline.plan(cfg)[0].place
    assert capsys.readouterr().out.splitlines()[-1] == f"made {place}"
    made = artifacts.open_artifact(place)
    assert made.manifest["provenance"]["command"] == "ftpipe submit recipe=mine --token=<removed>"
    # once more, as a job that was queued again after it had finished
    stand_in(monkeypatch, "sys.exit('must not run')")
    before = place.stat().st_mtime_ns
    assert cli.main(["job", str(run), "model"]) == 0
    assert capsys.readouterr().out == f"made already {place}\n"
    assert place.stat().st_mtime_ns == before


def test_a_stage_gets_what_its_inputs_jobs_have_made(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, DONE)
    for stage in ("model", "prepare", "sft"):
        assert cli.main(["job", str(run), stage]) == 0
    inputs = json.loads((run / "sft.job.json").read_text(encoding="utf-8"))["inputs"]
    assert {kind: Path(path).name.split("-")[0] for kind, path in inputs.items()} == {
        "dataset": "prepare",
        "base_model": "model",
    }


def test_a_stage_whose_input_is_not_there_says_which(
    cfg: RunConfig, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["job", str(run), "prepare"]) == 1
    place = pipeline.plan(cfg)[0].place
    assert capsys.readouterr().err.startswith(f"ftpipe: 'prepare' needs {place}, which is not there: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "sft"], "nowhere holds no run.yaml; "),
        ([], "job takes the folder of a run and a stage; "),
        (["a"], "job takes the folder of a run and a stage; "),
    ],
)
def test_a_job_of_nothing_is_refused(
    words: list[str], said: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["job", *words]) == 2
    assert capsys.readouterr().err.startswith(f"ftpipe: {said}")


def test_a_stage_that_the_recipe_lacks_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["job", str(run), "dpo"]) == 2
    assert "has no stage 'dpo'" in capsys.readouterr().err


def test_an_attempt_waits_until_the_one_before_it_has_ended(
    cfg: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, DONE)
    step = pipeline.plan(cfg)[0]
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with artifacts.building(Path(cfg.output), "model", step.fingerprint):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            free.set()
            thread.join()

    monkeypatch.setattr("ftpipe.cluster.job.sleep", pause)
    made, built = job.run(run, "model")
    assert (made.path, built) == (step.place, True)
    assert len(looks) == 3
    assert capsys.readouterr().out.count("is being built by process") == 1


def test_it_does_not_wait_for_ever(cfg: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PAUSE", 0.01)
    monkeypatch.setattr(job, "PATIENCE", 0.1)
    monkeypatch.setattr(launch, "launch_command", lambda *_: [sys.executable, "-c", "exit(9)"])
    step = pipeline.plan(cfg)[0]
    with (
        artifacts.building(Path(cfg.output), "model", step.fingerprint),
        pytest.raises(BusyError, match="is being built by process"),
    ):
        job.run(run, "model")
