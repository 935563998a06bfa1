"""Which jobs stand for the stages of a run: ``slurm.json`` in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftpipe.artifacts import write_atomic

FILE = "slurm.json"


@dataclass(frozen=True)
class Job:
    """A job of one stage.

    Attributes:
        id: as Slurm's commands take it; ``12_3`` for the task of an array.
        artifact: the name of the folder that it makes.
        after: the stages whose jobs it waits for.
    """

    id: str
    artifact: str
    after: list[str]


@dataclass
class Record:
    """What was submitted for a run: the command, and the job of each stage."""

    command: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> Record:
        """Return what was submitted for a run; nothing where nothing was."""
        if not (run / FILE).is_file():
            return cls()
        kept = json.loads((run / FILE).read_text(encoding="utf-8"))
        return cls(kept["command"], {stage: Job(**job) for stage, job in kept["jobs"].items()})

    def write(self, run: Path) -> None:
        write_atomic(run / FILE, json.dumps(asdict(self), indent=1) + "\n")


def logs(run: Path, stage: str, job: str) -> list[Path]:
    """Return the logs of a stage's job, one for each attempt, the last one last."""
    found = (run / "logs").glob(f"{stage}-{job}.*.log")
    return sorted(found, key=lambda path: int(path.name.split(".")[-2]))


def submitted(output: Path) -> Iterator[tuple[Path, Record]]:
    """Yield the runs of an output folder that were submitted, the newest first."""
    files = sorted(output.glob(f"runs/*/{FILE}"), key=lambda path: -path.stat().st_mtime_ns)
    yield from ((file.parent, Record.read(file.parent)) for file in files)
