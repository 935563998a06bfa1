"""What became of the jobs of a run: an artifact is the last word, before it Slurm's."""

from __future__ import annotations

import json
from pathlib import Path

from ftpipe import artifacts, schema
from ftpipe.cluster import controller, record
from ftpipe.cluster.record import Job, Record
from ftpipe.errors import UserError

LAST = 12  # lines of a failed stage's log that are shown


def of_run(run: Path) -> tuple[list[str], bool]:
    """Return a line for each stage of a run, more of a failed one, and whether all is well so far.

    Raises:
        UserError: if nothing was submitted for the run.
    """
    if not (run / record.FILE).is_file():
        raise UserError(f"{run} holds no {record.FILE}: nothing was submitted for it.")
    cfg = schema.load(run / "run.yaml")
    jobs = Record.read(run).jobs
    listed: dict[str, str] = json.loads((run / "artifacts.json").read_text(encoding="utf-8"))
    lines, well = [f"{cfg.name}: {run}"], True
    for stage, name in listed.items():
        place = Path(cfg.output) / "artifacts" / name
        if (place / artifacts.MANIFEST).is_file():
            lines.append(f"  {stage:9} made      {place}")
        elif stage not in jobs:
            lines.append(f"  {stage:9} not submitted")
        else:
            told, fine = _of_job(run, stage, jobs[stage])
            lines += told
            well &= fine
    return lines, well


def _of_job(run: Path, stage: str, job: Job) -> tuple[list[str], bool]:
    state = controller.state(job.id)
    found = record.logs(run, stage, job.id)
    head = f"  {stage:9} "
    if state is None:
        where = f"; its last log is {found[-1]}" if found else ""
        return [f"{head}gone      job {job.id} is not known to Slurm and made no artifact{where}"], False
    if state.word in controller.WAITING:
        again = f", attempt {state.attempt}" if state.attempt > 1 else ""
        return [f"{head}waiting   job {job.id}{again}: {state.reason or state.word}"], True
    if state.word in controller.RUNNING:
        said = _last_lines(found[-1], 1) if found else []
        line = f"{head}running   job {job.id} on {state.nodes}, attempt {state.attempt}"
        return [": ".join([line, *said])], True
    if state.reason == "DependencyNeverSatisfied":
        after = " or ".join(f"'{name}'" for name in job.after)
        return [f"{head}cancelled job {job.id}: {after}, which it waited for, was not made"], False
    code = f", {state.code}" if state.code else ""
    kind = "cancelled" if state.word.startswith("CANCELLED") else "failed   "
    lines = [f"{head}{kind} job {job.id} ({state.word}{code}) in attempt {state.attempt}"]
    for file in [*found[-1:], *(run / "logs").glob(f"{stage}-{job.id}.slurm")]:
        said = _last_lines(file, LAST)
        lines += [f"    {file}:", *(f"      {line}" for line in said)] if said else []
    return lines, False


def _last_lines(file: Path, count: int) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def chosen(words: list[str]) -> Path:
    """Return the run that a command line means: a folder, a name below ``outputs/runs``, or the newest.

    Raises:
        UserError: if there is none.
    """
    if len(words) > 1:
        raise UserError(f"status takes one run, but got {len(words)}: {' '.join(words)}.")
    if words:
        for place in (Path(words[0]), Path("outputs/runs") / words[0]):
            if place.is_dir():
                return place
        raise UserError(f"there is no run {words[0]}; give the folder of one.")
    newest = next(record.submitted(Path("outputs")), None)
    if newest is None:
        raise UserError("no run below outputs/ was submitted; give the folder of one.")
    return newest[0]
