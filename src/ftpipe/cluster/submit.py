"""From planned runs to jobs: one for each artifact that is to be made, after those of its inputs.

The runs of a sweep share what they have in common: an artifact that several need is made by one job. The
stages that differ are the tasks of an array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftpipe import origins, pipeline, provenance, schema
from ftpipe.choices import WandbMode
from ftpipe.cluster import controller, record, script
from ftpipe.cluster.record import Job, Record
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError
from ftpipe.pipeline import Step


@dataclass(frozen=True)
class Point:
    """One run of a sweep, or the only one: its configuration, its steps and its folder."""

    cfg: RunConfig
    steps: Sequence[Step]
    run: Path
    told: Mapping[str, str] = field(default_factory=dict)  # where each value came from


@dataclass(eq=False)
class Task:
    """An artifact that is to be made, for the first run that needs it.

    Attributes:
        needs: the tasks that make its inputs.
        outside: ids of jobs of earlier submissions that make the others.
        depth: how many tasks come one after the other up to this one.
    """

    point: Point
    step: Step
    needs: list[Task] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return 1 + max((task.depth for task in self.needs), default=0)

    def request(self) -> tuple[str, ...]:
        """Return what tasks of one array must have in common."""
        cfg = self.point.cfg
        return (self.step.stage.name, *script.directives(cfg, self.step.stage), *cfg.launch.slurm.setup)


@dataclass(eq=False)
class Batch:
    """A job, or an array of jobs: its tasks, its script, and once it is submitted its id."""

    tasks: list[Task]
    script: str
    id: str = ""

    @property
    def stage(self) -> str:
        return self.tasks[0].step.stage.name

    def id_of(self, task: Task) -> str:
        return self.id if len(self.tasks) == 1 else f"{self.id}_{self.tasks.index(task)}"


def tasks_of(points: Sequence[Point], alive: dict[str, str]) -> list[Task]:
    """Return what is to be made, each artifact once, inputs first.

    Args:
        alive: ids of jobs that are at work already, by the artifact that they make.
    """
    tasks: dict[Path, Task] = {}
    for point in points:
        steps = {step.stage.name: step for step in point.steps}
        for step in point.steps:
            if step.artifact is not None or step.place in tasks or step.place.name in alive:
                continue
            task = tasks[step.place] = Task(point, step)
            for maker in dict.fromkeys(step.inputs.values()):
                place = steps[maker].place
                if place in tasks:
                    task.needs.append(tasks[place])
                elif place.name in alive:
                    task.outside.append(alive[place.name])
    return list(tasks.values())


def batches_of(tasks: Sequence[Task]) -> list[Batch]:
    """Return the jobs that do the tasks, in an order in which they can be submitted."""
    groups: dict[tuple[int, tuple[str, ...]], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.depth, task.request()), []).append(task)
    batches: list[Batch] = []
    for (_, _), group in sorted(groups.items(), key=lambda item: item[0][0]):
        parts = [group] if aligned(group, batches) else [[task] for task in group]
        for part in parts:
            first = part[0].point
            stage = part[0].step.stage
            text = script.of_stage(first.cfg, stage, [task.point.run for task in part])
            batches.append(Batch(part, text))
    return batches


def aligned(group: Sequence[Task], batches: Sequence[Batch]) -> bool:
    """Say whether tasks can be one array: each waits for the same jobs, or for its like in an array."""
    if len({tuple(task.outside) for task in group}) > 1:
        return False
    if len({len(task.needs) for task in group}) > 1:
        return False
    for needs in zip(*(task.needs for task in group), strict=True):
        same = all(need is needs[0] for need in needs)
        if not same and not any(batch.tasks == list(needs) for batch in batches):
            return False
    return True


def dependency(batch: Batch, batches: Sequence[Batch]) -> str:
    """Return what a job waits for, as ``--dependency`` takes it; "" for nothing."""
    words: dict[str, None] = dict.fromkeys(f"afterok:{id_}" for id_ in batch.tasks[0].outside)
    for needs in zip(*(task.needs for task in batch.tasks), strict=True):
        maker = next(one for one in batches if needs[0] in one.tasks)
        if len(needs) > 1 and maker.tasks == list(needs):
            words[f"aftercorr:{maker.id}"] = None  # task by task
        else:
            words[f"afterok:{maker.id_of(needs[0])}"] = None
    return ",".join(words)


def submit(points: Sequence[Point], command: Sequence[str], dry: bool) -> list[str]:
    """Submit what the runs still lack; return the lines that say so.

    All is checked before anything is submitted, by bash and by Slurm. If a later job is refused all the
    same, those that were submitted are cancelled.

    Args:
        points: with ``run`` not yet written.
        dry: show the scripts; submit nothing and write nothing.

    Raises:
        ConfigError, UserError: with Slurm's reason, if it refuses a job.
    """
    if not dry and not controller.is_here():
        raise ConfigError(
            "sbatch is not here; submit from a machine of the cluster, or look with --dry-run."
        )
    alive = _alive(points) if controller.is_here() else {}
    batches = batches_of(tasks_of(points, alive))
    for batch in batches:
        script.lint(batch.script, batch.stage)
        if controller.is_here():
            controller.check(batch.script, batch.stage)
    sync = _sync(points) if batches else None
    if sync is not None:
        script.lint(sync, "sync")
        if controller.is_here():
            controller.check(sync, "sync")
    if dry:
        return _shown(batches, sync)
    for point in points:
        written = pipeline.write_run(point.cfg, schema.dump(point.cfg))
        assert written == point.run
        origins.write(point.run, point.told)
        (point.run / "logs").mkdir(exist_ok=True)
        pipeline.record(point.run, point.steps)
        Record(provenance.words(command), Record.read(point.run).jobs).write(
            point.run
        )  # before a job reads it
    _send(batches, sync, points)
    return [line for point in points for line in _recorded(point, batches, alive)]


def _alive(points: Sequence[Point]) -> dict[str, str]:
    """Return the jobs of earlier submissions that still wait or run, by artifact."""
    wanted = {step.place.name for point in points for step in point.steps if step.artifact is None}
    found: dict[str, str] = {}
    for output in {Path(point.cfg.output) for point in points}:
        for _, kept in record.submitted(output):
            for job in kept.jobs.values():
                if job.artifact not in wanted or job.artifact in found:
                    continue
                state = controller.state(job.id)
                if state is not None and state.alive:
                    found[job.artifact] = job.id
    return found


def _sync(points: Sequence[Point]) -> str | None:
    first = points[0]
    offline = first.cfg.tracking.wandb is WandbMode.offline
    return script.of_sync(first.cfg, first.run) if first.cfg.launch.slurm.sync and offline else None


def _shown(batches: Sequence[Batch], sync: str | None) -> list[str]:
    lines = []
    for batch in batches:
        lines += [f"== {batch.stage}{_after(batch.tasks[0])}", batch.script]
    if sync is not None:
        lines += ["== sync, after all others have ended", sync]
    checked = "Slurm would take them" if controller.is_here() else "no sbatch here to ask Slurm"
    return [*lines, f"{len(batches)} jobs; bash reads them, {checked}; nothing was submitted."]


def _after(task: Task) -> str:
    names = ", ".join(need.step.stage.name for need in task.needs)
    return f", after {names}" if names else ""


def _send(batches: Sequence[Batch], sync: str | None, points: Sequence[Point]) -> None:
    """Submit the jobs in order and keep their scripts; cancel all if one is refused."""
    try:
        for batch in batches:
            file = batch.tasks[0].point.run / f"{batch.stage}.sbatch"
            file.write_text(batch.script, encoding="utf-8")
            batch.id = controller.submit(batch.script, batch.stage, dependency(batch, batches))
        if sync is not None:
            (points[0].run / "sync.sbatch").write_text(sync, encoding="utf-8")
            ids = ":".join(batch.id for batch in batches)
            controller.submit(sync, "sync", f"afterany:{ids}")
    except UserError:
        sent = [batch.id for batch in batches if batch.id]
        if sent:
            controller.cancel(sent)
            print(f"cancelled what was submitted before: {', '.join(sent)}")
        raise


def _recorded(point: Point, batches: Sequence[Batch], alive: dict[str, str]) -> list[str]:
    """Write the run's jobs into its folder; return a line for each stage."""
    kept = Record.read(point.run)
    made = {task.step.place: (batch, task) for batch in batches for task in batch.tasks}
    lines = [f"{point.cfg.name}: {point.run}"]
    for step in point.steps:
        name = step.stage.name
        after = list(dict.fromkeys(step.inputs.values()))
        if step.artifact is not None:
            lines.append(f"  {name:9} made already")
            continue
        if step.place in made:
            batch, task = made[step.place]
            id_, note = batch.id_of(task), _after(task)
        else:
            id_, note = alive[step.place.name], ", submitted before"
        kept.jobs[name] = Job(id_, step.place.name, after)
        lines.append(f"  {name:9} job {id_}{note}")
    kept.write(point.run)
    return [*lines, f"  follow it with: ftpipe status {point.run}"]
