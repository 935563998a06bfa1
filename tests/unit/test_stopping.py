"""Asking a stage to stop: by a file, by signals to its driver, and what the driver makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ftpipe import checkpoints, cli, launch, stopping, worker
from ftpipe.config import RunConfig
from ftpipe.evolve.calls import Call, Journal, Said
from ftpipe.launch import StageFailed, last_words, run_stage
from ftpipe.pipeline import Step
from ftpipe.stopping import Stopped, asked, passed_on
from tests.unit.test_launch import DONE, build, first_step, stand_in
from tests.unit.test_worker import write

STOP = "(out / 'checkpoint').touch()\n"
# waits until it is asked, then says where it was
WAITS = (
    "while not os.path.exists(os.environ['FTPIPE_STOP']): time.sleep(0.01)\n"
    f"(out / {launch.STOPPED!r}).write_text(json.dumps({{'where': 'after step 3 of 9'}}))\n"
)


def test_a_rank_was_asked_when_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(stopping.FILE, raising=False)
    assert not asked()
    monkeypatch.setenv(stopping.FILE, str(tmp_path / "stop"))
    assert not asked()
    (tmp_path / "stop").touch()
    assert asked()


def test_a_rank_of_slurm_was_asked_when_it_is_sent_term() -> None:
    code = (
        "import os, signal; from ftpipe import stopping; stopping.listen(); "
        "print(stopping.asked()); os.kill(os.getpid(), signal.SIGTERM); print(stopping.asked())"
    )
    env = {name: value for name, value in os.environ.items() if name != stopping.FILE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\nTrue\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_makes_the_file(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    file = tmp_path / "stop"
    with passed_on(file, "sft", stops=True):
        assert not file.exists()
        os.kill(os.getpid(), number)
        assert file.exists()
        os.kill(os.getpid(), signal.SIGUSR1)  # more of the same
        if number == signal.SIGUSR1:
            os.kill(os.getpid(), signal.SIGTERM)  # the first of its kind, whoever made the file
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    said = capfd.readouterr().out.splitlines()
    assert set(said) == {"sft: asked to stop; it saves and ends after this step"}


def test_a_stage_that_cannot_be_continued_is_ended_or_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stop"
    with passed_on(file, "prepare", stops=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not file.exists()
    said = capfd.readouterr().out
    assert said == "prepare: asked to stop, but it cannot be continued, so it goes on\n"


def test_a_thread_that_cannot_be_signalled_runs_its_stage_all_the_same(tmp_path: Path) -> None:
    done: list[bool] = []

    def work() -> None:
        with passed_on(tmp_path / "stop", "sft", stops=True):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_stage_that_stopped_is_continued(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = first_step(cfg)
    monkeypatch.setitem(step.stage.__dict__, "stops", True)
    monkeypatch.setitem(step.stage.__dict__, "resumes", True)
    monkeypatch.delenv(stopping.FILE, raising=False)
    stand_in(monkeypatch, f"{STOP}os.kill(os.getppid(), {int(signal.SIGTERM)})\n{WAITS}")
    with pytest.raises(Stopped) as stopped:
        run_stage(cfg, step, {}, run, ["ftpipe"])
    assert str(stopped.value) == (
        "stage 'model' stopped as it was asked to, after step 3 of 9; the same command goes on."
    )
    partial = step.place.with_name(f"{step.place.name}.partial")
    assert (partial / "checkpoint").is_file()
    # nobody asks the next attempt, and what the last one said is forgotten
    assert_asked_no_more = "assert not os.path.exists(os.environ['FTPIPE_STOP'])\n"
    stand_in(monkeypatch, assert_asked_no_more + DONE)
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert set(made.manifest["files"]) - {"uncommitted.diff"} == {"checkpoint"}


def test_a_stage_that_was_done_by_then_is_made(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stopping.FILE, raising=False)
    stand_in(monkeypatch, "pathlib.Path(os.environ['FTPIPE_STOP']).touch()\n" + DONE)
    made, _ = build(cfg)
    assert set(made.manifest["files"]) <= {"uncommitted.diff"}
    assert not (made.path / launch.STOP).exists()


@pytest.mark.usefixtures("empty_folder", "in_process")
def test_a_stop_during_the_last_step_of_a_stage_holds_for_those_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def signalled(cfg: RunConfig, step: Step, *given: Any) -> Any:
        with passed_on(Path("stop"), step.stage.name, stops=True):
            os.kill(os.getpid(), signal.SIGTERM)  # when there is nothing left that could be stopped
        made.append(step.stage.name)
        return run_stage(cfg, step, *given)

    with monkeypatch.context() as patched:
        patched.setattr(cli, "run_stage", signalled)
        assert cli.main(["prepare", "recipe=tiny"]) == stopping.AGAIN
    assert made == ["model"]
    assert "'prepare' was not begun, as asked" in capsys.readouterr().err
    assert cli.main(["prepare", "recipe=tiny"]) == 0


def test_a_stop_is_one_line_and_the_exit_code_for_another_try(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    empty_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (empty_folder / "stop").touch()
    monkeypatch.setenv(stopping.FILE, str(empty_folder / "stop"))  # as the script of a job has it
    stand_in(monkeypatch, WAITS)
    assert cli.main(["model", "recipe=tiny"]) == 75  # sysexits.h: EX_TEMPFAIL
    said = capfd.readouterr().err
    assert said.startswith("ftpipe: stage 'model' stopped as it was asked to, after step 3 of 9; ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_says_where_a_stage_stopped(
    cfg: RunConfig, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Stopped("after step 3 of 9")

    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("ftpipe.stages.prepare.run", stop)
    assert worker.main([str(write(cfg))]) == 0
    assert (Path("out") / launch.STOPPED).exists() == (rank == "0")
    assert not (Path("out") / launch.RESULT).exists()


def test_slurm_is_told_of_a_users_error_so_that_it_ends_the_other_ranks(
    cfg: RunConfig, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    monkeypatch.setenv("FTPIPE_RANKS", "srun")
    file = write(cfg)
    rows.write_text('[{"instruction": 3}]', encoding="utf-8")
    assert worker.main([str(file)]) == 1
    assert "rows.json, row 1" in (Path("out") / launch.ERROR).read_text(encoding="utf-8")


def test_the_last_words_of_other_ranks_are_shown(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"line {number}\\n" for number in range(30))
    stand_in(
        monkeypatch,
        f"(out / '.rank-1.log').write_text('rank 1 (process 7 on n2)\\n{lines}')\n"
        "(out / '.rank-2.log').write_text('rank 2 (process 8 on n2)\\n')\n"
        "sys.exit(1)",
    )
    with pytest.raises(StageFailed):
        build(cfg)
    assert capfd.readouterr().err.splitlines() == [
        "rank 1 (process 7 on n2) ended after these lines:",
        *(f"  line {number}" for number in range(18, 30)),
        "rank 2 (process 8 on n2) ended without a word",
    ]
    # neither what an earlier attempt said nor what this one says is a part of the artifact
    stand_in(monkeypatch, "(out / '.rank-3.log').write_text('rank 3')\n" + DONE)
    made, _ = build(cfg)
    assert not list(made.path.glob(".rank*"))
    assert last_words(made.path) == []


def test_a_checkpoint_that_was_not_due_does_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-4/x.safetensors", "checkpoint-5/x.safetensors", "checkpoint-5/asked"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "checkpoint-4/unlogged-0.json").touch()
    checkpoints.tidy(tmp_path)
    left = [path.relative_to(folder) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [Path("checkpoint-4/x.safetensors")]


class Model:
    model, together = "m", 1

    def __init__(self, file: Path) -> None:
        self._file = file

    def complete(self, calls):  # type: ignore[no-untyped-def]
        for number, call in enumerate(calls):
            if number == 2:
                self._file.touch()
            yield call, Said(call.prompt)


def test_evolving_stops_after_a_call_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stop"
    monkeypatch.setenv(stopping.FILE, str(file))
    calls = [Call(str(number), 0.0, 1.0, 8, 0) for number in range(5)]
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(Stopped, match="with 3 calls in its journal"):
        journal.ask(Model(file), calls, "calls")
    journal.close()
    kept = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in kept] == ["0", "1", "2"]
