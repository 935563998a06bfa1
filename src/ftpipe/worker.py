"""What each rank runs: read run.yaml, seed, import the stage, call it.

``python -m ftpipe.worker JOB.json``, started by ``launch`` or by Slurm; never imports Hydra.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from ftpipe import determinism, environment, home, schema, stopping
from ftpipe.artifacts import open_artifact, write_atomic
from ftpipe.choices import Device
from ftpipe.cluster import ranks
from ftpipe.config import RunConfig
from ftpipe.errors import UserError
from ftpipe.launch import ERROR, RESULT, STOPPED, WORDS, die_with_parent
from ftpipe.logs import quiet_libraries
from ftpipe.pipeline import STAGES
from ftpipe.room import NoRoom, is_full
from ftpipe.stopping import Stopped


def main(argv: list[str]) -> int:
    """Run one stage; a user error leaves its sentence for the driver."""
    if not ranks.by_srun():  # which ends its tasks itself
        die_with_parent()
    job = read_job(argv)
    cfg = schema.load(Path(job["run"]) / "run.yaml")
    out = Path(job["out"])
    quiet_libraries()
    if cfg.launch.device is Device.cuda and "LOCAL_RANK" in os.environ:
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # weights are loaded where it points
    meet(cfg)
    try:
        return attempt(job, cfg, out)
    except (NoRoom, OSError) as error:
        if not (isinstance(error, NoRoom) or is_full(error, out)):
            raise
        print(NoRoom(out))
        return 1


def attempt(job: dict[str, Any], cfg: RunConfig, out: Path) -> int:
    """Run the stage and leave for the driver what came of it; return the exit code.

    Raises:
        NoRoom: if the disk is full.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        metrics = run(job, cfg, out)
    except UserError as error:
        # Every rank sees the same input, so any of them may tell. They end as if all were well, since
        # torch's launcher would print a page about each that does not; the driver looks for the file.
        # Slurm prints a line, and ends those that still wait for this one.
        write_atomic(out / ERROR, json.dumps({"error": str(error)}))
        return 1 if ranks.by_srun() else 0
    except Stopped as stopped:
        if first:
            write_atomic(out / STOPPED, json.dumps({"where": str(stopped)}))
        return 0
    except KeyboardInterrupt:
        return 130
    if first:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = {"metrics": metrics, "peak_memory_kib": peak, "environment": environment.of_rank(cfg)}
        write_atomic(out / RESULT, json.dumps(told))
    return 0


def run(job: dict[str, Any], cfg: RunConfig, out: Path) -> dict[str, float]:
    """Call the stage; return its metrics.

    Raises:
        UserError: if it refuses its input, or has no deterministic kernel where it must.
        Stopped: if it was asked to stop.
        NoRoom: if the disk is full.
    """
    stage = importlib.import_module(f"ftpipe.stages.{job['stage']}")
    inputs = {kind: open_artifact(Path(path)) for kind, path in job["inputs"].items()}
    try:
        metrics: dict[str, float] = stage.run(cfg, inputs, out)
    except (UserError, Stopped):
        raise
    except Exception as error:
        if is_full(error, out):
            raise NoRoom(out) from None
        refused = determinism.refusal(error)
        if refused is not None:
            raise UserError(refused) from None
        raise
    return metrics


def read_job(argv: list[str]) -> dict[str, Any]:
    """Return what the driver wrote for this stage, with the home in its paths."""
    job: dict[str, Any] = json.loads(Path(argv[0]).read_text())
    for key in ("run", "out", "settings"):
        if key in job:
            job[key] = home.full(job[key])
    job["inputs"] = {kind: home.full(path) for kind, path in job["inputs"].items()}
    return job


def meet(cfg: RunConfig) -> None:
    """Join the other ranks, if there are any, for no longer a wait than the configuration has it.

    A Trainer would do it later, and on processors with torch's own limit of half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        limit = timedelta(minutes=cfg.launch.timeout_minutes)
        PartialState(cpu=cfg.launch.device is Device.cpu, timeout=limit)


def process(argv: list[str]) -> int:
    """Be a rank: know one's place, answer Slurm, keep one's words apart from those of the first."""
    job = read_job(argv)
    if ranks.by_srun():
        os.environ.update(ranks.place(os.environ))
        if "RANK" in os.environ:  # one that is alone was told all by its driver
            os.environ.update(ranks.told_by_accelerate(Path(job["settings"])))
        if STAGES[job["stage"]].stops:
            stopping.listen()
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return main(argv)
    words = Path(job["out"]) / WORDS.format(rank)
    with words.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", flush=True)
    code = main(argv)
    if code == 0:
        words.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(process(sys.argv[1:]))
