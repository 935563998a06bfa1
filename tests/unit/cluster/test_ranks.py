"""The ranks of a job: how srun starts them, and what each learns of its place."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ftpipe import launch
from ftpipe.choices import Device, Precision
from ftpipe.cluster import ranks
from ftpipe.config import RunConfig
from ftpipe.errors import UserError


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a job of two nodes, with a scontrol that names them."""
    for name, value in (
        ("FTPIPE_RANKS", "srun"),
        ("SLURM_JOB_ID", "12"),
        ("SLURM_JOB_NUM_NODES", "2"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_srun_starts_a_task_for_each_rank(cfg: RunConfig, job: Path, tmp_path: Path) -> None:
    cfg.launch.processes, cfg.launch.nodes = 4, 2
    words = launch.launch_command(cfg, 8, tmp_path / "settings", Path("job.json"))
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"} <= set(words)
    assert words[-3:] == ["-m", "ftpipe.worker", "job.json"]
    assert not any(word.startswith("--cpus-per-task") for word in words)
    one = launch.launch_command(cfg, 1, tmp_path / "settings", Path("job.json"))
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1"} <= set(one)


def test_srun_is_told_what_it_does_not_take_from_the_job(
    cfg: RunConfig, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")  # since Slurm 22.05 only sbatch reads it
    cfg.launch.slurm.srun = ["--mpi=none"]
    cfg.launch.slurm.container = ["apptainer", "exec", "--nv", "an image.sif"]
    words = launch.launch_command(cfg, 2, tmp_path / "settings", Path("job.json"))
    assert "--cpus-per-task=6" in words
    assert words[-9:] == [
        *("--mpi=none", "apptainer", "exec", "--nv", "an image.sif"),
        *("python", "-m", "ftpipe.worker", "job.json"),
    ]


def test_outside_of_a_job_of_ours_accelerate_starts_the_ranks(
    cfg: RunConfig, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTPIPE_RANKS")  # a shell in a job is a machine like any other
    words = launch.launch_command(cfg, 2, tmp_path / "settings", Path("job.json"))
    assert "accelerate.commands.launch" in words
    assert launch.DRIVER in launch.environment(cfg, 2)
    assert "MASTER_ADDR" not in launch.environment(cfg, 2)


def test_the_ranks_meet_on_the_first_node_at_a_port_that_is_free(job: Path) -> None:
    place = ranks.meeting_point()
    port = int(place["MASTER_PORT"])
    assert place["MASTER_ADDR"] == "n1"
    assert 15000 <= port < 30000
    with socket.socket() as taken:
        taken.bind(("", port))
        assert int(ranks.meeting_point()["MASTER_PORT"]) > port


def test_two_jobs_on_a_node_look_at_other_ports(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for number in range(20):
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        found.add(ranks.meeting_point()["MASTER_PORT"])
    assert len(found) == 20


def test_nodes_that_have_no_names_are_a_sentence(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "x")
    with pytest.raises(UserError, match=r"^scontrol cannot name the nodes of x"):
        ranks.meeting_point()


def test_the_environment_of_a_job_leaves_gpus_to_slurm(
    cfg: RunConfig, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    cfg.launch.device, cfg.launch.processes, cfg.launch.nodes = Device.cuda, 2, 2
    found = launch.environment(cfg, 4)
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["MASTER_ADDR"] == "n1"
    assert launch.DRIVER not in found  # it is no ancestor of a rank on another node
    assert found["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert "MASTER_ADDR" not in launch.environment(cfg, 1)
    cfg.launch.device = Device.cpu
    assert launch.environment(cfg, 4)["CUDA_VISIBLE_DEVICES"] == ""


TASK = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}


def test_a_rank_knows_its_place_by_its_task() -> None:
    # docs.pytorch.org, "torchrun", Environment Variables
    assert ranks.place(TASK) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }


@pytest.mark.parametrize(
    ("visible", "local"),
    [("", "3"), ("0,1,2,3", "3"), ("5", "0"), ("GPU-8f2a", "0"), ("NoDevFiles", "3")],
)
def test_a_task_that_is_shown_one_gpu_takes_that_one(visible: str, local: str) -> None:
    assert ranks.place({**TASK, "CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == local


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, {}), ("", {}), ("5", {}), ("5,6", {"CUDA_VISIBLE_DEVICES": "5"})],
)
def test_a_single_rank_is_none_of_several_and_sees_one_gpu(
    visible: str | None, seen: dict[str, str]
) -> None:
    task = {**TASK, "SLURM_NTASKS": "1"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert ranks.place(task) == seen


@pytest.mark.parametrize(
    ("device", "precision", "processes"),
    [
        (Device.cpu, Precision.fp32, 2),
        (Device.cpu, Precision.bf16, 2),
        (Device.cuda, Precision.fp16, 2),
    ],
)
def test_a_rank_is_told_what_accelerate_would_tell_it(
    cfg: RunConfig, tmp_path: Path, device: Device, precision: Precision, processes: int
) -> None:
    cfg.launch.device, cfg.launch.precision = device, precision
    launch.launch_command(cfg, processes, tmp_path / "settings.yaml", tmp_path / "job.json")
    told = ranks.told_by_accelerate(tmp_path / "settings.yaml")
    assert told["ACCELERATE_MIXED_PRECISION"] == ("no" if precision is Precision.fp32 else precision)
    assert told.get("ACCELERATE_USE_CPU", "False") == "False"  # which would leave DeepSpeed out
    # where it is stays Slurm's to say
    assert not {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} & set(told)
