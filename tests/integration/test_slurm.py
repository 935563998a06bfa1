"""A real Slurm of two virtual nodes: a pipeline as jobs, and all that can happen to a job.

Runs take place in folders that share a made dataset, several at a time. What is trained is that of
``recipe=tiny``; dropout makes the state of random numbers matter.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ftpipe import artifacts
from ftpipe.cluster.record import Record
from tests import cluster as virtual
from tests.cluster import Cluster

# one process runs them all: they share a cluster, and what was made on it
pytestmark = pytest.mark.slow

WORDS = (
    *("recipe=tiny", "launch=slurm-cpu", "launch.threads=1", "launch.micro_batch_size=2"),
    *("sft.samples=0", "sft.max_steps=12", "sft.log_every=5", "sft.save_every=5", "adapter.dropout=0.1"),
)
TWO_NODES = "launch.nodes=2"
# The first attempt begins its training when Slurm has asked it to stop: it then ends after one step.
HOLD = (
    """launch.slurm.setup=['until [ -e "$FTPIPE_STOP" ] || [ "$attempt" -gt 0 ]; do sleep 0.1; done']"""
)
LONG = "sft.max_steps=20000"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if virtual.missing():
        pytest.skip(virtual.missing())
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def ftpipe(slurm: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return slurm.run(sys.executable, "-m", "ftpipe.cli", *words, cwd=folder)


def submit(slurm: Cluster, folder: Path, *words: str) -> Path:
    """Submit a run as a user would, and return its folder."""
    done = ftpipe(slurm, folder, "submit", *WORDS, *words)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1].split()[-1]


def job(run: Path, stage: str = "sft") -> str:
    return Record.read(run).jobs[stage].id


def log(run: Path, attempt: int, stage: str = "sft") -> str:
    return (run / f"logs/{stage}-{job(run, stage)}.{attempt}.log").read_text(encoding="utf-8")


def made(folder: Path, stage: str = "sft") -> Path:
    (found,) = folder.glob(f"outputs/artifacts/{stage}-*/manifest.json")
    return found.parent


def result(folder: Path) -> dict[str, object]:
    """Return what must be the same, however often a run was interrupted."""
    place = made(folder)
    lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    metrics = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    kept = sorted(str(path.relative_to(place)) for path in place.rglob("*.safetensors"))
    return {"metrics": metrics} | {name: (place / name).read_bytes() for name in kept}


@pytest.fixture(scope="module")
def base(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline: model, prepare and sft, on one rank, undisturbed."""
    folder = tmp_path_factory.mktemp("base")
    run = submit(slurm, folder)
    assert [slurm.ends(job(run, stage)) for stage in ("model", "prepare", "sft")] == ["COMPLETED"] * 3
    return folder


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the pipeline makes before sft."""
    folder = tmp_path_factory.mktemp("prepared") / "outputs"
    shutil.copytree(base / "outputs", folder, ignore=shutil.ignore_patterns("sft-*", "runs"))
    return folder


@pytest.fixture(scope="module")
def limited(slurm: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two nodes with a limit of a minute: it waits most of that, so it begins early."""
    folder = tmp_path_factory.mktemp("limited")
    shutil.copytree(prepared, folder / "outputs")
    return submit(
        *(slurm, folder, TWO_NODES, HOLD),
        *("launch.slurm.time='00:01:00'", "launch.slurm.warning_seconds=10"),
    )


@pytest.fixture(scope="module")
def preempted(slurm: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has to make room for another job, which it does by and by."""
    folder = tmp_path_factory.mktemp("preempted")
    shutil.copytree(prepared, folder / "outputs")
    run = submit(slurm, folder, HOLD, "launch.slurm.partition=low", "launch.slurm.gpus=2")
    slurm.wait_for(lambda: (run / f"logs/sft-{job(run)}.0.log").is_file(), 30)
    node = slurm.show(job(run))["NodeList"]
    rival = slurm.run(
        *("sbatch", "--parsable", "--partition=main", "--gres=gpu:2", f"--nodelist={node}"),
        *("--output=/dev/null", "--job-name=rival", "--wrap=true"),
    )
    assert rival.returncode == 0, rival.stderr
    return run


@pytest.fixture
def folder(prepared: Path, limited: Path, preempted: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "outputs")
    return tmp_path


@pytest.fixture(scope="module")
def two_nodes(
    slurm: Cluster, prepared: Path, limited: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(prepared, folder / "outputs")
    run = submit(slurm, folder, TWO_NODES)
    assert slurm.ends(job(run)) == "COMPLETED", log(run, 0)
    return run


def ranks(job: str) -> dict[int, psutil.Process]:
    """Return the living ranks of a job."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            rank = "ftpipe.worker" in process.cmdline() and process.name() != "srun"
            if rank and env.get("SLURM_JOB_ID") == job:
                found[int(env["SLURM_PROCID"])] = process
    return found


def left(job: str) -> list[psutil.Process]:
    """Return every living process of a job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("SLURM_JOB_ID") == job
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def training(slurm: Cluster, folder: Path, characters: int = 900) -> None:
    """Wait until a run has trained for some steps, so that it has written lines of metrics."""
    files = "outputs/artifacts/sft-*.partial/metrics.jsonl"
    slurm.wait_for(lambda: any(len(file.read_text()) > characters for file in folder.glob(files)), 90)


def test_a_pipeline_is_submitted_whole_and_runs_in_order(slurm: Cluster, base: Path) -> None:
    run = next((base / "outputs/runs").iterdir())
    said = ftpipe(slurm, base, "status", str(run))
    assert said.returncode == 0
    assert [line.split()[:2] for line in said.stdout.splitlines()[1:]] == [
        [stage, "made"] for stage in ("model", "prepare", "sft")
    ]
    ends = {stage: slurm.show(job(run, stage)) for stage in ("model", "prepare", "sft")}
    assert ends["model"]["EndTime"] <= ends["prepare"]["StartTime"]
    assert ends["prepare"]["EndTime"] <= ends["sft"]["StartTime"]
    command = artifacts.open_artifact(made(base)).manifest["provenance"]["command"]
    assert command.startswith("ftpipe submit recipe=tiny launch=slurm-cpu ")


def test_a_run_without_slurm_that_is_told_to_stop_ends_as_a_job_does(
    slurm: Cluster, base: Path, folder: Path
) -> None:
    words = ("-m", "ftpipe.cli", "sft", *(word for word in WORDS if word != "launch=slurm-cpu"))
    with subprocess.Popen([sys.executable, *words], cwd=folder, env=slurm.env) as driver:
        training(slurm, folder, characters=10)
        driver.send_signal(signal.SIGTERM)
    assert driver.returncode == 75
    (checkpoint,) = folder.glob("outputs/artifacts/sft-*.partial/checkpoints/checkpoint-*/asked")
    assert slurm.run(sys.executable, *words, cwd=folder).returncode == 0
    assert not list(folder.glob("outputs/artifacts/*.partial")) and not checkpoint.exists()
    assert made(folder).name == made(base).name  # the fingerprint knows nothing of Slurm
    assert result(folder) == result(base)


def test_a_job_that_runs_again_after_its_end_does_nothing(slurm: Cluster, base: Path) -> None:
    run = next((base / "outputs/runs").iterdir())
    before = made(base).stat().st_mtime_ns
    assert slurm.run("scontrol", "requeue", job(run)).returncode == 0
    slurm.wait_for(lambda: (run / f"logs/sft-{job(run)}.1.log").is_file(), 30)
    assert slurm.ends(job(run)) == "COMPLETED"
    assert log(run, 1).splitlines()[-1].startswith("made already outputs/artifacts/sft-")
    assert made(base).stat().st_mtime_ns == before


def test_a_training_on_two_nodes(slurm: Cluster, base: Path, two_nodes: Path) -> None:
    folder = two_nodes.parents[2]
    assert artifacts.open_artifact(made(folder)).manifest["provenance"]["world_size"] == 2
    assert slurm.show(job(two_nodes))["NodeList"] == "n[1-2]"
    # the same rows in the same steps, but each rank draws its own dropout
    losses = [[line.get("sft/loss") for line in result(one)["metrics"]] for one in (base, folder)]  # type: ignore[attr-defined]
    assert losses[0] != losses[1]
    assert [x for x in losses[0] if x] == pytest.approx([x for x in losses[1] if x], rel=0.05)


def test_an_impossible_request_is_refused_with_slurms_reason(slurm: Cluster, tmp_path: Path) -> None:
    before = slurm.run("squeue", "--noheader", "--states=all").stdout.count("\n")
    done = ftpipe(slurm, tmp_path, "submit", *WORDS, "launch.nodes=3", "sft.batch_size=6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ftpipe: Slurm refuses the job of 'sft': ")
    assert "node" in done.stderr.removeprefix("ftpipe: Slurm refuses the job of 'sft': ").lower()
    done = ftpipe(slurm, tmp_path, "submit", *WORDS, "launch.slurm.partition=mian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid partition" in done.stderr.lower()
    assert list(tmp_path.iterdir()) == []
    assert slurm.run("squeue", "--noheader", "--states=all").stdout.count("\n") == before


def test_a_rank_that_dies_ends_the_stage_and_what_waits_for_it(slurm: Cluster, folder: Path) -> None:
    run = submit(slurm, folder, TWO_NODES, LONG, "stages=[prepare,sft,merge]")
    training(slurm, folder)
    found = ranks(job(run))
    assert sorted(found) == [0, 1]
    killed = time.monotonic()
    found[1].kill()
    assert slurm.ends(job(run)) == "FAILED"
    assert time.monotonic() - killed < 40
    assert slurm.ends(job(run, "merge")) == "CANCELLED"
    assert f"rank 1 (process {found[1].pid} on n2) ended after these lines:" in log(run, 0)
    slurm.wait_for(lambda: left(job(run)) == [], 20)
    said = ftpipe(slurm, folder, "status")
    assert said.returncode == 1
    lines = said.stdout.splitlines()
    assert lines[3].startswith(f"  sft       failed    job {job(run)} (FAILED, code 1) in attempt 1")
    assert any("sft' ended with code" in line for line in lines)  # the log's last
    last = f"  merge     cancelled job {job(run, 'merge')}: 'sft', which it waited for, was not made"
    assert lines[-1] == last


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, folder: Path) -> None:
    run = submit(slurm, folder, LONG)
    training(slurm, folder)
    slurm.run("scancel", job(run))
    assert slurm.ends(job(run)) == "CANCELLED"
    slurm.wait_for(lambda: left(job(run)) == [], 20)
    time.sleep(3)  # it would be queued again by now
    assert slurm.show(job(run))["JobState"] == "CANCELLED"
    assert slurm.show(job(run))["Restarts"] == "0"
    said = ftpipe(slurm, folder, "status", run.name)
    assert said.returncode == 1
    assert f"  sft       cancelled job {job(run)} (CANCELLED" in said.stdout


def test_a_sweep_is_an_array_that_shares_what_its_points_have_in_common(
    slurm: Cluster, folder: Path
) -> None:
    words = ("stages=[prepare,sft,merge]", "sft.max_steps=2", "sft.learning_rate=1e-3,2e-3", "-m")
    submit(slurm, folder, *words)
    runs = sorted((folder / "outputs/runs").iterdir())
    records = [Record.read(run).jobs for run in runs]
    for stage in ("sft", "merge"):
        assert len({jobs[stage].id.split("_")[0] for jobs in records}) == 1
        assert sorted(jobs[stage].id.split("_")[1] for jobs in records) == ["0", "1"]
    again = ftpipe(slurm, folder, "submit", *WORDS, *words)  # while they are at work
    assert again.stdout.count("submitted before") == 4
    waits = [slurm.show(jobs["merge"].id)["Dependency"] for jobs in records]
    for at, jobs in enumerate(records):
        # task by task: the other one may still train
        assert f"aftercorr:{jobs['sft'].id.split('_')[0]}_" in waits[at]
        assert slurm.ends(jobs["sft"].id) == "COMPLETED", at
    assert len(list(folder.glob("outputs/artifacts/sft-*/manifest.json"))) == 2
    merges = [jobs["merge"].id for jobs in records]
    slurm.wait_for(lambda: all(slurm.show(one).get("Dependency") == "(null)" for one in merges), 20)
    slurm.run("scancel", *merges)


def test_the_time_limit_costs_nothing(slurm: Cluster, limited: Path, two_nodes: Path) -> None:
    assert slurm.ends(job(limited), 180) == "COMPLETED"
    assert "stage 'sft' stopped as it was asked to, after step 1 of 12" in log(limited, 0)
    assert "continuing from checkpoint-1" in log(limited, 1)
    assert result(limited.parents[2]) == result(two_nodes.parents[2])


def test_a_preempted_job_saves_and_ends_with_the_same_bytes(
    slurm: Cluster, base: Path, preempted: Path
) -> None:
    assert slurm.ends(job(preempted)) == "COMPLETED"
    assert "stage 'sft' stopped as it was asked to, after step 1 of 12" in log(preempted, 0)
    assert "continuing from checkpoint-1" in log(preempted, 1)
    assert result(preempted.parents[2]) == result(base)


def test_a_lost_node_costs_an_attempt(slurm: Cluster, base: Path, folder: Path) -> None:
    wait = "launch.slurm.setup=['[ \"$attempt\" -gt 0 ] || sleep 600']"
    run = submit(slurm, folder, wait)
    slurm.wait_for(lambda: (run / f"logs/sft-{job(run)}.0.log").is_file(), 30)
    node = slurm.show(job(run))["NodeList"]
    try:
        down = ("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        assert slurm.run(*down).returncode == 0
        assert slurm.ends(job(run)) == "COMPLETED"
        assert slurm.show(job(run))["NodeList"] != node
    finally:
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert result(folder) == result(base)


def test_ranks_find_each_other_across_networks(
    two_nodes: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if virtual.no_networks():
        pytest.skip(virtual.no_networks())
    with Cluster(tmp_path_factory.mktemp("networks"), networks=True) as apart:
        run = submit(apart, folder, TWO_NODES)
        assert apart.ends(job(run)) == "COMPLETED", log(run, 0)
    assert result(folder) == result(two_nodes.parents[2])
