"""The ranks of a stage in a job of Slurm: one task of ``srun`` each, on all nodes of the job.

Slurm starts, watches and ends them, so no launcher with signals of its own stands between.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ftpipe.errors import UserError
from ftpipe.slurm_config import SlurmConfig

LAUNCHER = "FTPIPE_RANKS"  # environment variable of a job: "srun"
PORTS = range(15000, 30000)  # below those that a system gives out by itself
# what `accelerate launch` tells its ranks, besides where they are
TOLD = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def by_srun() -> bool:
    """Say whether ranks are tasks of ``srun`` here: in a job that ``ftpipe submit`` made."""
    return os.environ.get(LAUNCHER) == "srun"


def command(slurm: SlurmConfig, ranks: int, job: Path) -> list[str]:
    """Return the words that start a stage's ranks on the nodes of this job."""
    nodes = min(ranks, int(os.environ["SLURM_JOB_NUM_NODES"]))
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it from the job by itself
    python = "python" if slurm.container else sys.executable
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={ranks // nodes}"),
        *("--kill-on-bad-exit=1", "--input=none"),
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        *slurm.srun,
        *slurm.container,
        *(python, "-m", "ftpipe.worker", str(job)),
    ]


def meeting_point() -> dict[str, str]:
    """Return where the ranks meet: this node, the first of the job, and a port that is free on it.

    The search for a port begins at one that depends on the job, so that two jobs on a node differ.

    Raises:
        UserError: if Slurm cannot name the nodes, or no port is free.
    """
    listed = os.environ["SLURM_JOB_NODELIST"]
    words = ["scontrol", "show", "hostnames", listed]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise UserError(f"scontrol cannot name the nodes of {listed}: {done.stderr.strip()}")
    first = int(os.environ["SLURM_JOB_ID"]) * 7 % len(PORTS)
    for port in (*PORTS[first:], *PORTS[:first]):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(port)}
    raise UserError(f"no port from {PORTS[0]} to {PORTS[-1]} is free on {hosts[0]}.")


def place(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what torch wants to know of a rank, by what Slurm says; of a single one nothing.

    A single rank sees one GPU: with several in sight a Trainer would spread its batch over them. Of
    several, each takes the one of its place on the node, or the only one that its task is shown.
    """
    ranks = int(environ["SLURM_NTASKS"])
    alone = re.fullmatch(r"[^,]*\w", environ.get("CUDA_VISIBLE_DEVICES", "").replace("NoDevFiles", ""))
    if ranks == 1:
        gpus = environ.get("CUDA_VISIBLE_DEVICES", "")
        return {"CUDA_VISIBLE_DEVICES": gpus.split(",")[0]} if "," in gpus else {}
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": "0" if alone else environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks // int(environ["SLURM_NNODES"])),
    }


def told_by_accelerate(settings: Path) -> dict[str, str]:
    """Return the environment that ``accelerate launch`` would give to ranks under these settings."""
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    words = ["--config_file", str(settings), "--module", "ftpipe.worker"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        _, env = environments.prepare_deepspeed_cmd_env(args)
    elif args.multi_gpu or args.use_fsdp:
        env = environments.prepare_multi_gpu_env(args)
    else:
        _, env = environments.prepare_simple_launcher_cmd_env(args)
    return {name: value for name, value in env.items() if name.startswith(TOLD)}
