"""The keys of ``launch.slurm``: what the jobs of ``ftpipe submit`` ask Slurm for.

Nothing here decides a result, so nothing here is in a fingerprint. What becomes part of an ``#SBATCH``
line must be one plain word, so that no value can end the line or say something else.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from ftpipe import provenance
from ftpipe.errors import ConfigError, require, unknown

WORD = re.compile(r"[\w.,:+@/=&|*!()\[\]-]+", re.ASCII)
TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+:\d+(:\d+)?", re.ASCII)
MEMORY = re.compile(r"\d+[KMGT]?", re.ASCII)
OPTION = re.compile(r"--?[a-zA-Z][^\n]*")


@dataclass
class StageJobConfig:
    """What the job of one stage asks for otherwise; null: as ``launch`` and ``launch.slurm`` say."""

    nodes: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    constraint: str | None = None

    def check(self, key: str) -> None:
        for name in ("nodes", "cpus"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{key}.{name}", value, "at least 1, or null")
        gpus = self.gpus
        require(gpus is None or gpus >= 0, f"{key}.gpus", gpus, "0 or more, or null")
        check_words(self, key, ("partition", "constraint"))
        check_amounts(self, key)


@dataclass
class SlurmConfig:
    """What jobs ask for, and how they are entered."""

    partition: str | None = None  # null: the cluster's default, as for every key that follows
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None  # features that nodes must have, such as a100
    exclude: str | None = None  # nodes that jobs stay away from, such as n[3,7]
    time: str | None = None  # limit of one attempt of a stage: HH:MM:SS or D-HH:MM:SS, quoted in YAML
    gpus: int | None = None  # of each node; null: one for each rank, where launch.device=cuda
    gpu_type: str | None = None  # as the cluster names it, such as a100
    cpus: int | None = None  # of each rank; null: launch.threads, or the cluster's default
    memory: str | None = None  # of each node, such as 64G; 0: all it has
    warning_seconds: int = 120  # before the limit: save, requeue, go on from there
    requeue: bool = True  # whether a job that was told to stop, or lost its node, is queued again
    venv: str | None = None  # folder of the environment that jobs use; null: the one that submits
    container: list[str] = field(default_factory=list)  # words before each rank's python, such as
    # [apptainer, exec, --nv, image.sif]; then ranks use the container's python
    srun: list[str] = field(default_factory=list)  # more options of srun, such as --mpi=none
    setup: list[str] = field(default_factory=list)  # lines of bash at the start of each job
    extra: list[str] = field(default_factory=list)  # more #SBATCH lines, such as --mail-type=FAIL
    sync: str | None = None  # partition with a network, where a last job sends offline wandb runs
    stages: dict[str, StageJobConfig] = field(default_factory=dict)  # by stage: what it asks otherwise

    def check(self) -> None:
        key = "launch.slurm"
        for name in ("gpus", "warning_seconds"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{key}.{name}", value, "0 or more")
        require(self.cpus is None or self.cpus >= 1, f"{key}.cpus", self.cpus, "at least 1, or null")
        words = ("partition", "account", "qos", "reservation", "constraint", "exclude", "gpu_type")
        check_words(self, key, (*words, "sync"))
        check_amounts(self, key)
        for name in ("setup", "container", "srun", "extra"):
            if any(provenance.holds_secret(line) for line in getattr(self, name)):
                raise ConfigError(
                    f"{key}.{name} holds what looks like a secret, and it is written to the scripts and "
                    "the record; let setup read it from a file, such as source ~/.secrets."
                )
        for line in self.extra:
            fits = OPTION.fullmatch(line) is not None
            require(fits, f"{key}.extra", repr(line), "an option of sbatch, such as --mail-type=FAIL")
        for name, job in self.stages.items():
            job.check(f"{key}.stages.{name}")
        limits = [self.time, *(job.time for job in self.stages.values())]
        shortest = min((seconds(limit) for limit in limits if limit is not None), default=None)
        require(
            shortest is None or self.warning_seconds < shortest,
            f"{key}.warning_seconds",
            self.warning_seconds,
            f"less than the shortest limit of a job, {shortest} s",
        )

    def check_names(self, known: Collection[str]) -> None:
        """Refuse a job for a stage that does not exist.

        Raises:
            ConfigError: with the nearest name.
        """
        for name in self.stages:
            if name not in known:
                raise ConfigError("launch.slurm.stages: " + unknown("stage", name, known))


def seconds(limit: str) -> int:
    """Return a limit such as D-HH, D-HH:MM:SS, HH:MM:SS or MM:SS in seconds (sbatch, ``--time``)."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def check_words(part: object, key: str, names: Collection[str]) -> None:
    """Refuse what is no plain word."""
    for name in names:
        value = getattr(part, name)
        plain = value is None or WORD.fullmatch(value) is not None
        require(plain, f"{key}.{name}", repr(value), "a word without spaces, quotes, $ or #")


def check_amounts(part: SlurmConfig | StageJobConfig, key: str) -> None:
    """Refuse a time or a memory that Slurm would read as something else."""
    time, memory = part.time, part.memory
    require(
        time is None or TIME.fullmatch(time) is not None,
        f"{key}.time",
        repr(time),
        "HH:MM:SS or D-HH:MM:SS (in a YAML file in quotes: without them 1:00:00 is the number 3600)",
    )
    fits = memory is None or MEMORY.fullmatch(memory) is not None
    require(fits, f"{key}.memory", repr(memory), "a number with K, M, G or T, such as 64G")
