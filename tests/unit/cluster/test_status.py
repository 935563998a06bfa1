"""What became of a run's jobs, from what Slurm 22.05 was seen to print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe import cli, pipeline, schema
from ftpipe.cluster import controller, record, status
from ftpipe.cluster.controller import State
from ftpipe.cluster.record import Job, Record
from ftpipe.config import RunConfig
from tests.unit.cluster.conftest import Commands

RUNNING = (
    "JobId=14 JobName=tiny-sft UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901752 Nice=0 "
    "Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:01:05 TimeLimit=00:10:00 NodeList=n[1-2] BatchHost=n1 "
    "Command=/tmp/a JobState=x.sh"
)
WAITING = (
    "JobId=14 JobState=PENDING Reason=BeginTime Dependency=(null) Restarts=1 ExitCode=0:0 NodeList="
)
FAILED = "JobId=14 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=7:0 NodeList=n1"
KILLED = "JobId=14 JobState=TIMEOUT Reason=TimeLimit Restarts=0 ExitCode=0:15 NodeList=n1"
NEVER = "JobId=14 JobState=CANCELLED Reason=DependencyNeverSatisfied Restarts=0 ExitCode=0:0 NodeList="
CANCELLED = "JobId=14 JobState=CANCELLED Reason=None Restarts=0 ExitCode=0:15 NodeList=n1"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (RUNNING, State("RUNNING", nodes="n[1-2]", attempt=3)),
        (WAITING, State("PENDING", reason="BeginTime", attempt=2)),
        (FAILED, State("FAILED", reason="NonZeroExitCode", code="code 7", nodes="n1")),
        (KILLED, State("TIMEOUT", reason="TimeLimit", code="signal 15", nodes="n1")),
        (
            "JobId=4 ArrayJobId=4 ArrayTaskId=0-2 JobState=PENDING Reason=(null)\nJobId=5 ",
            State("PENDING"),
        ),
        ("", None),
        ("slurm_load_jobs error: Invalid job id specified", None),
    ],
)
def test_what_the_controller_says(text: str, state: State | None) -> None:
    assert controller.from_scontrol(text) == state


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("COMPLETED|0:0|n1\n", State("COMPLETED", nodes="n1")),
        ("CANCELLED by 1000|0:15|n[1-2]\n", State("CANCELLED", code="signal 15", nodes="n[1-2]")),
        ("PENDING|0:0|None assigned\n", State("PENDING")),
        ("OUT_OF_MEMORY|0:125|n2\n", State("OUT_OF_MEMORY", code="signal 125", nodes="n2")),
        ("\n", None),
    ],
)
def test_what_the_accounting_says(text: str, state: State | None) -> None:
    assert controller.from_sacct(text) == state


@pytest.mark.parametrize(
    ("word", "alive"),
    [("PENDING", True), ("RUNNING", True), ("COMPLETING", True), ("FAILED", False), ("TIMEOUT", False)],
)
def test_a_job_lives_until_it_has_ended(word: str, alive: bool) -> None:
    assert State(word).alive is alive


def test_the_accounting_is_asked_where_the_controller_has_forgotten(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert controller.state("14") is None
    file = tmp_path / "sacct"
    file.write_text("#!/bin/sh\necho 'FAILED|1:0|n1'\n", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{commands._folder}:/usr/bin:/bin")
    assert controller.state("14") == State("FAILED", code="code 1", nodes="n1")
    commands.say("14", RUNNING)
    assert controller.state("14") == State("RUNNING", nodes="n[1-2]", attempt=3)


@pytest.fixture
def run(cfg: RunConfig, commands: Commands) -> Path:
    """A run whose model is made, whose dataset is job 13, and whose training is job 14."""
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    steps = pipeline.plan(cfg)
    pipeline.record(folder, steps)
    steps[0].place.mkdir(parents=True)
    (steps[0].place / "manifest.json").write_text("{}", encoding="utf-8")
    after = {"prepare": ["model"], "sft": ["prepare", "model"]}
    ids = {"prepare": "13", "sft": "14"}
    jobs = {step.stage.name: step.place.name for step in steps[1:]}
    Record(["ftpipe"], {name: Job(ids[name], jobs[name], after[name]) for name in jobs}).write(folder)
    (folder / "logs").mkdir()
    commands.say("13", "JobId=13 JobState=COMPLETED Reason=None ExitCode=0:0")
    return folder


def lines(run: Path, code: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what is said of the training."""
    assert cli.main(["status", str(run)]) == code
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"mine: {run}"
    assert said[1].startswith("  model     made      outputs/artifacts/model-")
    at = next(number for number, line in enumerate(said) if line.startswith("  sft "))
    return said[at:]


def make(run: Path, stage: str) -> None:
    listed = json.loads((run / "artifacts.json").read_text(encoding="utf-8"))
    place = Path("outputs/artifacts") / listed[stage]
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}", encoding="utf-8")


def test_a_running_stage_shows_its_last_line(
    run: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run, "prepare")
    commands.say("14", RUNNING)
    for attempt, text in ((9, "old\n"), (10, "first\nstep 3/9\n")):
        (run / f"logs/sft-14.{attempt}.log").write_text(text, encoding="utf-8")
    said = ["  sft       running   job 14 on n[1-2], attempt 3: step 3/9"]
    assert lines(run, 0, capsys) == said


def test_a_waiting_stage_says_for_what(
    run: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run, "prepare")
    commands.say("14", WAITING)
    assert lines(run, 0, capsys) == ["  sft       waiting   job 14, attempt 2: BeginTime"]


def test_a_failed_stage_shows_its_last_lines_and_slurms_own(
    run: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run, "prepare")
    commands.say("14", FAILED)
    log, own = run / "logs/sft-14.0.log", run / "logs/sft-14.slurm"
    log.write_text("".join(f"line {number}\n" for number in range(100)), encoding="utf-8")
    own.write_text("slurmstepd: error: Exceeded job memory limit\n", encoding="utf-8")
    assert lines(run, 1, capsys) == [
        "  sft       failed    job 14 (FAILED, code 7) in attempt 1",
        f"    {log}:",
        *(f"      line {number}" for number in range(88, 100)),
        f"    {own}:",
        "      slurmstepd: error: Exceeded job memory limit",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (KILLED, "failed    job 14 (TIMEOUT, signal 15) in attempt 1"),
        (CANCELLED, "cancelled job 14 (CANCELLED, signal 15) in attempt 1"),
        (NEVER, "cancelled job 14: 'prepare' or 'model', which it waited for, was not made"),
        (
            "JobId=14 JobState=COMPLETED Reason=None ExitCode=0:0",
            "failed    job 14 (COMPLETED) in attempt 1",  # it says so, but made nothing
        ),
    ],
)
def test_how_a_stage_ended(
    run: Path, commands: Commands, text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.say("14", text)
    assert lines(run, 1, capsys) == [f"  sft       {line}"]


def test_an_artifact_is_the_last_word(
    run: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.say("14", FAILED)
    make(run, "prepare")
    make(run, "sft")
    (said,) = lines(run, 0, capsys)
    assert said.startswith("  sft       made      outputs/artifacts/sft-")


def test_a_job_that_slurm_has_forgotten_is_gone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "logs/sft-14.0.log").touch()
    log = run / "logs/sft-14.0.log"
    said = (
        f"  sft       gone      job 14 is not known to Slurm and made no artifact; its last log is {log}"
    )
    assert lines(run, 1, capsys) == [said]


def test_a_stage_without_a_job_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run, "prepare")
    kept = Record.read(run)
    del kept.jobs["sft"]
    kept.write(run)
    assert lines(run, 0, capsys) == ["  sft       not submitted"]


def test_the_run_is_a_folder_or_a_name_or_the_newest(run: Path, empty_folder: Path) -> None:
    assert status.chosen([str(run)]) == run
    assert status.chosen([run.name]) == run
    assert status.chosen([]) == run
    assert [path for path, _ in record.submitted(Path("outputs"))] == [run]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no run nowhere; "),
        (["a", "b"], "status takes one run, but got 2: a b."),
        ([], "no run below outputs/ was submitted; "),
        (["."], ". holds no slurm.json: nothing was submitted for it."),
    ],
)
def test_a_run_that_is_none_is_refused(
    words: list[str], said: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", *words]) == 2
    assert capsys.readouterr().err.startswith(f"ftpipe: {said}")
