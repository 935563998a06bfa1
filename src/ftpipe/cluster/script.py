"""The batch script of a job: a template of ``slurm/`` filled in from the configuration.

What stands in an ``#SBATCH`` line was checked to be plain words (``slurm_config``); what bash reads is
quoted. ``launch.slurm.setup`` and ``extra`` are the user's own lines, and are read as such.
"""

from __future__ import annotations

import shlex
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftpipe.choices import Device
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.pipeline import Stage
from ftpipe.slurm_config import StageJobConfig


class Template(string.Template):
    """``@@name`` is a place; a template is then almost bash, where ``$`` has its own meaning."""

    delimiter = "@@"


@dataclass(frozen=True)
class Request:
    """What the job of one stage asks for."""

    nodes: int
    processes: int  # ranks on each node
    gpus: int  # on each node
    cpus: int | None  # of each rank
    memory: str | None
    time: str | None
    partition: str | None
    constraint: str | None

    @classmethod
    def of(cls, cfg: RunConfig, stage: Stage) -> Request:
        """Return what the configuration says of a stage.

        Raises:
            ConfigError: if ranks on GPUs would have too few of them.
        """
        launch, slurm = cfg.launch, cfg.launch.slurm
        job = slurm.stages.get(stage.name, StageJobConfig())
        nodes = (job.nodes or launch.nodes) if stage.all_ranks else 1
        processes = launch.processes if stage.all_ranks else 1
        on_gpu = launch.device is Device.cuda and stage.on_gpu(cfg)
        gpus = job.gpus
        if gpus is None and slurm.gpus is not None and stage.on_gpu(cfg):
            gpus = slurm.gpus if stage.all_ranks else min(slurm.gpus, 1)
        if gpus is None:
            gpus = processes if on_gpu else 0
        if on_gpu and gpus < processes:
            raise ConfigError(
                f"'{stage.name}' runs {processes} ranks on each node, which need a GPU each, but its "
                f"job asks for {gpus}; raise launch.slurm.gpus, or set launch.device=cpu."
            )
        return cls(
            nodes=nodes,
            processes=processes,
            gpus=gpus,
            cpus=job.cpus or slurm.cpus or launch.threads,
            memory=job.memory or slurm.memory,
            time=job.time or slurm.time,
            partition=job.partition or slurm.partition,
            constraint=job.constraint or slurm.constraint,
        )


def directives(cfg: RunConfig, stage: Stage) -> list[str]:
    """Return the options of sbatch for a stage, without its name, its output and what it waits for."""
    slurm, request = cfg.launch.slurm, Request.of(cfg, stage)
    gpu = f"gpu:{slurm.gpu_type}" if slurm.gpu_type else "gpu"
    options = {
        "partition": request.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": request.constraint,
        "exclude": slurm.exclude,
        "time": request.time,
        "nodes": request.nodes,
        "ntasks-per-node": request.processes,
        "cpus-per-task": request.cpus,
        "gres": f"{gpu}:{request.gpus}" if request.gpus else None,
        "mem": request.memory,
        "signal": f"B:USR1@{slurm.warning_seconds}" if slurm.warning_seconds else None,
    }
    again = "--requeue" if slurm.requeue else "--no-requeue"
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*given, again, "--open-mode=append", "--kill-on-invalid-dep=yes", *slurm.extra]


def of_stage(cfg: RunConfig, stage: Stage, runs: Sequence[Path]) -> str:
    """Return the script that makes a stage for one run, or as an array for several.

    Args:
        runs: their folders, which hold ``run.yaml``.
    """
    array = len(runs) > 1
    output = runs[0].absolute() / "logs" / f"{stage.name}-{'%A_%a' if array else '%j'}.slurm"
    lines = [
        f"--job-name={cfg.name}-{stage.name}",
        f'--output="{plain_path(output)}"',
        *([f"--array=0-{len(runs) - 1}"] if array else []),
        *directives(cfg, stage),
    ]
    many = f", {len(runs)} runs as an array" if array else ""
    return _fill(
        "stage",
        cfg,
        lines,
        title=f"{stage.name} of {cfg.name}{many}: {stage.does}.",
        stage=stage.name,
        runs=" ".join(shlex.quote(str(run)) for run in runs),
        requeue="yes" if cfg.launch.slurm.requeue else "no",
    )


def of_sync(cfg: RunConfig, run: Path) -> str:
    """Return the script that sends what wandb kept offline, from where there is a network."""
    output = run.absolute() / "logs" / "sync-%j.slurm"
    lines = [
        f"--job-name={cfg.name}-sync",
        f'--output="{plain_path(output)}"',
        f"--partition={cfg.launch.slurm.sync}",
        *([f"--account={cfg.launch.slurm.account}"] if cfg.launch.slurm.account else []),
        *("--nodes=1", "--ntasks=1"),
    ]
    title = f"wandb of {cfg.name}: sends the runs that were kept offline."
    return _fill("sync", cfg, lines, title=title, offline=shlex.quote(cfg.output))


def plain_path(path: Path) -> str:
    """Return a path as an ``#SBATCH`` line takes it.

    Raises:
        ConfigError: if it holds what Slurm reads as something else.
    """
    text = str(path).replace("%A", "").replace("%a", "").replace("%j", "")
    if any(letter in text for letter in '%"\\\n'):
        raise ConfigError(
            f"{text!r}: Slurm cannot write its logs there; choose an output= and a folder to work in "
            "without %, quotes and backslashes."
        )
    return str(path)


def _fill(template: str, cfg: RunConfig, lines: Sequence[str], **values: str) -> str:
    from ftpipe.compose import shipped

    slurm = cfg.launch.slurm
    python = str(Path(slurm.venv).absolute() / "bin/python") if slurm.venv else sys.executable
    text = (shipped("slurm") / f"{template}.sbatch").read_text(encoding="utf-8")
    return Template(text).substitute(
        values,
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        folder=shlex.quote(str(Path.cwd())),
        setup="\n".join(slurm.setup) or ":",
        python=shlex.quote(python),
    )


def lint(script: str, what: str) -> None:
    """Refuse a script that bash cannot read.

    Raises:
        ConfigError: with bash's words; only lines of the user's own can be at fault.
    """
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0].removeprefix("bash: ")
        raise ConfigError(f"launch.slurm.setup: bash cannot read the job of '{what}': {reason}.")
