"""From runs to jobs: one for each artifact, in order, each after those that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe import cli
from ftpipe.cluster import controller
from ftpipe.cluster.record import Record
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from tests.unit.cluster.conftest import Commands

pytestmark = pytest.mark.usefixtures("empty_folder")

TINY = ("recipe=tiny", "launch=slurm-cpu", "sft.max_steps=2")
ALIVE = "JobId=1 JobState=PENDING Reason=Priority Restarts=0 ExitCode=0:0"


def submit(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["submit", *TINY, *words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", *TINY, *words]) == 2
    return capsys.readouterr().err.removeprefix("ftpipe: ").rstrip("\n")


def submitted(commands: Commands) -> list[tuple[str, str]]:
    """Return the name of each job that was submitted, and what it waits for."""
    calls = [call.split() for call in commands.calls() if call.startswith("submit ")]
    return [
        (name, next((word[13:] for word in words if word.startswith("--dependency=")), ""))
        for _, name, *words in calls
    ]


def make(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    stage, print_ = place.name.split("-")
    manifest = {"kind": "x", "stage": stage, "fingerprint": print_}
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def places(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Path]:
    assert cli.main(["plan", *TINY, *words]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:]
    return {line.split()[1]: Path(line.split()[2]) for line in lines}


def test_each_stage_is_a_job_after_those_it_needs(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = submit(capsys, "stages=[prepare,sft,merge]")
    # a merged policy is made of the adapter and its base
    assert submitted(commands) == [
        ("tiny-model", ""),
        ("tiny-prepare", "afterok:101"),
        ("tiny-sft", "afterok:102,afterok:101"),
        ("tiny-merge", "afterok:103"),
    ]
    run = Path(lines[0].split()[-1])
    assert lines[-1] == f"  follow it with: ftpipe status {run}"
    kept = Record.read(run)
    assert {stage: one.id for stage, one in kept.jobs.items()} == {
        "model": "101",
        "prepare": "102",
        "sft": "103",
        "merge": "104",
    }
    assert kept.jobs["merge"].after == ["sft"]
    assert kept.command[:3] == ["ftpipe", "submit", "recipe=tiny"]
    assert (run / "run.yaml").is_file() and (run / "artifacts.json").is_file()
    assert (run / "logs").is_dir()
    assert "#SBATCH --job-name=tiny-sft" in (run / "sft.sbatch").read_text(encoding="utf-8")


def test_slurm_is_asked_about_every_job_before_one_is_submitted(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.refuse("test", "tiny-sft")
    sentence = refusal(capsys)
    assert sentence == "Slurm refuses the job of 'sft': Batch job submission failed: " + (
        "Invalid qos specification."
    )
    assert submitted(commands) == []
    assert not Path("outputs").exists()


def test_what_was_submitted_before_a_refusal_is_cancelled(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.refuse("submit", "tiny-sft")
    assert "Slurm refuses the job of 'sft': " in refusal(capsys)
    assert commands.calls()[-1] == "cancel --quiet 101 102"
    (run,) = Path("outputs/runs").iterdir()
    assert Record.read(run).jobs == {}


def test_a_dry_run_shows_all_and_leaves_nothing(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "\n".join(submit(capsys, "--dry-run"))
    for name in ("model", "prepare", "sft"):
        assert f"#SBATCH --job-name=tiny-{name}\n" in said
    assert "== sft, after prepare, model\n" in said
    assert said.endswith("3 jobs; bash reads them, Slurm would take them; nothing was submitted.")
    assert submitted(commands) == []
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_a_run_can_be_looked_at_and_not_submitted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert submit(capsys, "--dry-run")[-1].startswith("3 jobs; bash reads them, no sbatch here ")
    assert refusal(capsys).startswith("sbatch is not here; ")
    assert not Path("outputs").exists()


def test_a_wrong_setup_is_refused_before_anything(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "launch.slurm.setup=['if']").startswith("launch.slurm.setup: bash cannot ")
    assert commands.calls() == []


def test_what_is_made_already_is_not_submitted(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    made = places(capsys)
    make(made["model"])
    make(made["prepare"])
    lines = submit(capsys)
    assert submitted(commands) == [("tiny-sft", "")]
    assert [line.split(maxsplit=1)[1] for line in lines[1:3]] == ["made already"] * 2
    make(made["sft"])
    before = len(submitted(commands))
    submit(capsys)
    assert len(submitted(commands)) == before


def test_what_is_at_work_already_is_waited_for(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(capsys)
    for job in ("101", "102", "103"):
        commands.say(job, ALIVE)
    assert sum("submitted before" in line for line in submit(capsys)) == 3
    assert len(submitted(commands)) == 3
    # another run that shares a part of it
    lines = submit(capsys, "sft.learning_rate=1")
    assert submitted(commands)[3:] == [("tiny-sft", "afterok:102,afterok:101")]
    assert sum("submitted before" in line for line in lines) == 2
    # one that has failed is submitted again
    commands.say("103", ALIVE.replace("PENDING", "FAILED"))
    submit(capsys)
    assert submitted(commands)[4:] == [("tiny-sft", "afterok:102,afterok:101")]


def test_a_sweep_shares_what_its_runs_have_in_common(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stages=[prepare,sft,merge]", "sft.learning_rate=1,2,3", "-m")
    lines = submit(capsys, *words)
    assert submitted(commands) == [
        ("tiny-model", ""),
        ("tiny-prepare", "afterok:101"),
        ("tiny-sft", "afterok:102,afterok:101"),
        ("tiny-merge", "aftercorr:103"),
    ]
    runs = [Path(line.split()[-1]) for line in lines if line.startswith("tiny: ")]
    assert len(set(runs)) == 3
    for at, run in enumerate(runs):
        jobs = Record.read(run).jobs
        assert [jobs[name].id for name in ("model", "sft", "merge")] == ["101", f"103_{at}", f"104_{at}"]
        assert (run / "run.yaml").is_file() and (run / "logs").is_dir()
        assert str(run) in (runs[0] / "merge.sbatch").read_text(encoding="utf-8")


def test_runs_that_do_not_match_task_by_task_are_jobs_of_their_own(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    # two trainings, from each of which two go on: an array would make them wait for the wrong one
    words = ("stages=[prepare,sft,dpo]", "data.sources.alpaca.use=[demonstrations]", "-m")
    pairs = "data.sources.p={format: preference, path: 'sample:preference.jsonl'}"
    submit(capsys, pairs, *words, "sft.learning_rate=1,2", "dpo.beta=0.1,0.2")
    after = dict.fromkeys(wait for name, wait in submitted(commands) if name == "tiny-dpo")
    assert [wait.split(",")[1] for wait in after] == ["afterok:103_0", "afterok:103_1"]
    assert [name for name, _ in submitted(commands)].count("tiny-dpo") == 4


def test_an_array_may_wait_for_one_task_of_another(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stages=[prepare,sft,dpo]", "data.sources.alpaca.use=[demonstrations]")
    pairs = "data.sources.p={format: preference, path: 'sample:preference.jsonl'}"
    for beta in ("0.1", "0.2"):  # what follows the second training is made already
        make(places(capsys, pairs, *words, "sft.learning_rate=2", f"dpo.beta={beta}")["dpo"])
    submit(capsys, pairs, *words, "sft.learning_rate=1,2", "dpo.beta=0.1,0.2", "-m")
    name, after = submitted(commands)[-1]
    assert name == "tiny-dpo"
    assert "afterok:103_0" in after.split(",") and "aftercorr" not in after


def test_runs_that_ask_for_other_machines_are_jobs_of_their_own(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(capsys, "sft.learning_rate=1,2", "launch.slurm.time='00:10:00','00:20:00'", "-m")
    # the first two runs that need it are tasks of one array; the others make the same
    assert [name for name, _ in submitted(commands)] == ["tiny-model", "tiny-prepare", "tiny-sft"]


def test_a_job_sends_offline_runs_when_all_others_have_ended(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(capsys, "launch.slurm.sync=login")  # nothing is kept offline
    assert len(submitted(commands)) == 3
    submit(capsys, "launch.slurm.sync=login", "tracking=offline", "seed=1")
    assert submitted(commands)[-1] == ("tiny-sync", "afterany:104:105:106")


def test_a_device_that_depends_on_the_machine_is_refused(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "launch.device=auto").startswith("launch.device=auto: a job has to say ")
    # no GPU is here, and none is needed to ask for eight
    submit(capsys, "launch.device=cuda", "launch.precision=auto", "launch.processes=2")
    (file,) = Path("outputs/runs").glob("*/run.yaml")
    assert "precision: bf16" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("key", ["launch.nodes", "launch.slurm.stages.sft.nodes"])
def test_several_nodes_are_for_jobs(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", *TINY, f"{key}=2"]) == 2
    assert "launch.nodes=2 needs a job of Slurm; submit it " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("export HF_TOKEN=hf_abcdefghijkl", True),
        ("export WANDB_API_KEY='abc'", True),
        ("export HF_TOKEN=$(cat ~/.token)", False),
        ("source ~/.secrets", False),
    ],
)
def test_a_secret_in_a_script_is_refused_where_one_from_a_file_is_not(
    line: str, refused: bool, cfg: RunConfig
) -> None:
    cfg.launch.slurm.setup = [line]
    if not refused:
        cfg.launch.slurm.check()
        return
    with pytest.raises(ConfigError, match=r"launch\.slurm\.setup holds what looks like a secret"):
        cfg.launch.slurm.check()


def test_submit_says_which_option_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--dry").startswith("no option '--dry'.")


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("sbatch: error: invalid partition: x\nallocation failure: Bad\n", "allocation failure: Bad"),
        ("sbatch: error: Job submission failed: Invalid.\n", "Job submission failed: Invalid"),
        ("", "it does not say why"),
    ],
)
def test_the_reason_is_the_last_thing_said(stderr: str, reason: str) -> None:
    assert controller.reason_of(stderr) == reason
