"""Compare a run with itself, made again here and now: from its record to its last weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftpipe import artifacts, pipeline, provenance, schema
from ftpipe.artifacts import Artifact
from ftpipe.combinations import TRAIN
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, ModelError, UserError, unknown
from ftpipe.launch import StageFailed, environment, ranks_of, resolve_device
from ftpipe.pipeline import STAGES, Step
from ftpipe.runs import records
from ftpipe.trace import INITIAL, TRACE
from ftpipe.verify import files, rebuild, record, traces
from ftpipe.verify.findings import Finding, Layer, Report

# What a stage that trains nothing leaves is rows, the weights that others begin with, or a result.
LEAVES = {"prepare": Layer.data, "evolve": Layer.data, "model": Layer.weights}


@dataclass(frozen=True)
class Recorded:
    """A finished run, as it lies on the disk.

    Attributes:
        cfg: its configuration.
        made: its artifacts by stage, in order.
        overrides: what this machine asks for, ``launch.processes=1`` and the like.
    """

    folder: Path
    cfg: RunConfig
    made: Mapping[str, Artifact]
    overrides: Sequence[str] = ()

    @classmethod
    def of(cls, folder: Path, overrides: Sequence[str] = ()) -> Recorded:
        """Read the record of a run.

        Raises:
            UserError: if it is not finished, or an artifact is gone or damaged.
        """
        cfg = schema.load(folder / "run.yaml", overrides)
        cfg.check()
        root = records.root_of(folder)
        names = pipeline.listed(folder)
        if not names:
            raise UserError(f"{folder} does not say what it made: the run was never finished.")
        made = {}
        for stage, name in names.items():
            path = root / "artifacts" / name
            if not (path / artifacts.MANIFEST).is_file():
                raise UserError(
                    f"{path} is not there: the run was not finished, or it was removed; run it again."
                )
            made[stage] = artifacts.open_artifact(path)
        return cls(folder, cfg, made, overrides)

    def cfg_of(self, stage: str) -> RunConfig:
        """Return the configuration to make a stage by.

        It is launched as its artifact was, which may be of an earlier run, and as this machine asks for.

        Raises:
            ConfigError: if this machine cannot run it so.
        """
        own = self.made[stage].manifest["config"]
        parts = {name: own[name] for name in ("launch", "tracking")}
        cfg = schema.changed(self.cfg, parts, self.overrides)
        resolve_device(cfg)
        return cfg

    def inputs(self, stage: str) -> dict[str, Artifact]:
        """Return the artifacts that a stage of the run had."""
        named = self.made[stage].manifest["inputs"]
        by_name = {artifact.path.name: artifact for artifact in self.made.values()}
        for name in named.values():
            if name not in by_name:
                raise UserError(f"the run has no artifact {name}, which its stage '{stage}' was given.")
        return {kind: by_name[name] for kind, name in named.items()}


@dataclass
class Verification:
    """One comparison.

    Attributes:
        scratch: where stages are made again.
        steps: of each training that are made again; None: those on record from its beginning.
        full: all of its steps, and what it leaves.
        stages: which are made again; empty: all.
    """

    run: Recorded
    scratch: Path
    steps: int | None = None
    full: bool = False
    stages: Sequence[str] = ()
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage not in self.run.made:
                raise ConfigError("--stage: " + unknown("stage", stage, self.run.made))

    def __iter__(self) -> Iterator[str]:
        """Compare, layer by layer; yield what is done next, in words."""
        yield "reads the record"
        planned = self._plan()
        self._record(planned)
        for stage, artifact in self.run.made.items():
            step = planned.get(stage)
            if step is None or (self.stages and stage not in self.stages):
                continue
            if _asks(self.run.cfg).get(stage) is not None and not self.stages:
                self.report.left_out.append(
                    f"{stage}: a server's answers, which cost, and are others each time"
                )
                continue
            most = self._most(artifact)
            yield f"makes '{stage}' again" + (f", up to step {most}" if most is not None else "")
            try:
                cfg = self.run.cfg_of(stage)
                made = rebuild.again(cfg, step, self.run.inputs(stage), self.scratch, most)
            except (UserError, StageFailed) as error:
                self.report.unmade.append(f"'{stage}' cannot be made here: {error}")
                continue
            self._stage(artifact, made, most)

    def _plan(self) -> dict[str, Step]:
        """Return the stages as they would be made here and now; what is in the way is on record."""
        here = replace(self.run.cfg, output=str(self.scratch))  # nothing is written to the run's
        try:
            return {step.stage.name: step for step in pipeline.plan(here)}
        except (DataError, ModelError) as error:
            self.report.look(Layer.data, "", "", [Finding(Layer.data, "", str(error))])
        except UserError as error:
            self.report.unmade.append(f"the run cannot be planned here: {error}")
        self.report.left_out.append("config and data: the run cannot be planned here")
        return {}

    def _record(self, planned: Mapping[str, Step]) -> None:
        """Compare what needs nothing to be made."""
        look, made = self.report.look, self.run.made
        now = provenance.collect([])
        damage, around, code = [], [], []
        for stage, artifact in made.items():
            damage += files.damage(artifact)
            here = {**now, **self._ranks(stage)}
            before = artifact.manifest["provenance"] | {"launch": artifact.manifest["config"]["launch"]}
            around += record.environment(before, here, stage)
            code += record.code(artifact, now)
            around += record.attempts(artifact)
        count = sum(len(artifact.manifest["files"]) for artifact in made.values())
        look(Layer.record, "", f"{len(made)} artifacts, {count:,} files", _once(damage))
        look(Layer.environment, "", _of_environment(now), _once(around))
        look(Layer.code, "", _of_code(now), _once(code))
        decided = [
            finding
            for stage, step in planned.items()
            if stage in made
            for finding in record.decided(made[stage], step)
        ]
        for layer in (Layer.config, Layer.data) if planned else ():
            found = _once([one for one in decided if one.layer is layer])
            what = "every value that decides" if layer is Layer.config else "outside input, by content"
            look(layer, "", what, found)

    def _ranks(self, stage: str) -> dict[str, Any]:
        """Return how many ranks and threads would make a stage here, and how they would split a step."""
        try:
            cfg = self.run.cfg_of(stage)
        except ConfigError:  # which is said when it is to be made
            cfg = self.run.cfg
        ranks = ranks_of(cfg, STAGES[stage])
        threads = int(environment(cfg, ranks)["OMP_NUM_THREADS"])
        told = {"world_size": ranks, "environment": {"blas_threads": threads}}
        return {**told, "launch": schema.plain(cfg)["launch"]} if stage in TRAIN else told

    def _most(self, artifact: Artifact) -> int | None:
        if artifact.stage not in TRAIN or self.full:
            return None
        first: int = artifact.manifest["config"]["tracking"].get("trace_first", 0)
        return self.steps or first or 1

    def _stage(self, artifact: Artifact, made: Path, most: int | None) -> None:
        stage = artifact.stage
        if stage in TRAIN:
            self._training(artifact, made, most)
        if stage not in TRAIN or self.full:
            layer = LEAVES.get(stage, Layer.result)
            what, found = files.compare(artifact.path, made, stage, layer)
            self.report.look(layer, stage, what, found)

    def _training(self, artifact: Artifact, made: Path, most: int | None) -> None:
        stage = artifact.stage
        for folder in _trained(artifact.path):
            name = folder.relative_to(artifact.path).as_posix()
            of = stage if name == "." else f"{stage}/{name}"
            if not (made / name / INITIAL).is_file():
                self.report.left_out.append(
                    f"{of}: only the first of an ensemble is made without --full"
                )
                continue
            what, found = traces.initial(folder, made / name, of)
            self.report.look(Layer.weights, of, what, found)
            exact = not record.other_hardware(self.report.findings)
            tolerance = 0.0 if exact else traces.TOLERANCE[self.run.cfg.launch.precision]
            what, found = traces.steps(folder, made / name, of, most, tolerance)
            if what == traces.NONE:
                self.report.left_out.append(f"{of}: {what} (tracking.trace_first)")
            else:
                self.report.look(Layer.steps, of, what, found)
        if not _trained(artifact.path):
            self.report.left_out.append(f"{stage}: its artifact has no trace, so it is too old for this")


def _asks(cfg: RunConfig) -> dict[str, str | None]:
    """Return the servers that stages ask, by stage."""
    return {"evolve": cfg.evolve.url, "evaluate": cfg.evaluate.judge.url}


def _trained(folder: Path) -> list[Path]:
    """Return the folders of an artifact that hold a trace: itself, or those of an ensemble."""
    return sorted(path.parent for path in folder.rglob(TRACE))


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings of the whole run: what several stages say alike is said once."""
    return list(dict.fromkeys(Finding(one.layer, "", _named(one)) for one in findings))


def _named(finding: Finding) -> str:
    """Return a finding's words, with its stage where they would not be understood without."""
    of_all = finding.layer in (Layer.environment, Layer.code, Layer.data)
    return finding.says if of_all or not finding.stage else f"{finding.stage}: {finding.says}"


def _of_environment(now: Mapping[str, Any]) -> str:
    return f"python {now['python']}, {len(now['packages'])} packages, hardware, ranks"


def _of_code(now: Mapping[str, Any]) -> str:
    return f"{len(now.get('source', {})):,} source files, versions of stages"
