"""The trace that a recipe ships: what its trainings did where it was written, for everybody to compare.

It lies beside the recipe as ``NAME.trace.json``. Other hardware rounds otherwise, so numbers are
compared within ``traces.TOLERANCE`` there; rows are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftpipe import pipeline, provenance, schema
from ftpipe.artifacts import Artifact, write_atomic
from ftpipe.config import RunConfig
from ftpipe.errors import UserError
from ftpipe.launch import run_stage
from ftpipe.trace import INITIAL, TRACE
from ftpipe.verify import record, traces
from ftpipe.verify.findings import Layer, Report
from ftpipe.verify.rebuild import LOG, printing_to

SUFFIX = ".trace.json"
KEPT = ("python", "packages", "hardware", "world_size", "environment")  # of provenance


def beside(recipe: Path) -> Path:
    """Return where the trace of a recipe lies."""
    return recipe.with_name(recipe.stem + SUFFIX)


def read(recipe: Path) -> dict[str, Any]:
    """Return the trace of a recipe.

    Raises:
        UserError: if it ships none.
    """
    path = beside(recipe)
    if not path.is_file():
        raise UserError(
            f"{recipe} ships no trace; `ftpipe verify recipe={recipe.stem} --write` makes one."
        )
    shipped: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return shipped


@dataclass
class Fresh:
    """A recipe made from nothing in a folder of its own."""

    cfg: RunConfig
    scratch: Path
    made: dict[str, Artifact] = field(default_factory=dict)  # by stage

    def __iter__(self) -> Iterator[str]:
        """Make every stage; yield what is done next, in words."""
        cfg = replace(self.cfg, output=str(self.scratch))
        run = pipeline.write_run(cfg, schema.dump(cfg))
        for step in pipeline.plan(cfg):
            yield f"makes '{step.stage.name}'"
            inputs = {kind: self.made[maker] for kind, maker in step.inputs.items()}
            with printing_to(self.scratch / LOG):
                self.made[step.stage.name], _ = run_stage(cfg, step, inputs, run, ["ftpipe", "verify"])

    def trained(self) -> dict[str, tuple[Artifact, Path]]:
        """Return each folder with a trace, and its artifact, by stage (and member of an ensemble)."""
        found = {}
        for stage, artifact in self.made.items():
            for path in sorted(artifact.path.rglob(TRACE)):
                name = path.parent.relative_to(artifact.path).as_posix()
                found[stage if name == "." else f"{stage}/{name}"] = artifact, path.parent
        return found


def write(recipe: Path, fresh: Fresh) -> Path:
    """Write what a recipe's trainings did beside it; return the file."""
    stages = {}
    for name, (artifact, folder) in fresh.trained().items():
        around = artifact.manifest["provenance"]
        stages[name] = {
            "provenance": {key: around[key] for key in KEPT if key in around},
            "initial": json.loads((folder / INITIAL).read_text(encoding="utf-8")),
            "steps": (folder / TRACE).read_text(encoding="utf-8").splitlines(),
        }
    told = {"recipe": recipe.stem, "version": provenance.packages()["ftpipe"], "stages": stages}
    write_atomic(beside(recipe), json.dumps(told, indent=1) + "\n")
    return beside(recipe)


def compare(shipped: Mapping[str, Any], fresh: Fresh, scratch: Path) -> Report:
    """Compare what a recipe did here with what it did where its trace was written."""
    report = Report()
    trained = fresh.trained()
    for name, known in shipped["stages"].items():
        if name not in trained:
            report.left_out.append(f"{name}: the recipe has no such stage any more")
            continue
        artifact, made = trained[name]
        before = scratch / "shipped" / name
        before.mkdir(parents=True)
        (before / INITIAL).write_text(json.dumps(known["initial"]), encoding="utf-8")
        (before / TRACE).write_text("\n".join(known["steps"]) + "\n", encoding="utf-8")
        around = record.environment(known["provenance"], artifact.manifest["provenance"], name)
        elsewhere = bool(around)
        tolerated = [replace(one, tolerated=True) for one in around]
        report.look(Layer.environment, name, "where it was written", tolerated)
        if not elsewhere:
            what, found = traces.initial(before, made, name)
            report.look(Layer.weights, name, what, found)
        tolerance = traces.TOLERANCE[fresh.cfg.launch.precision] if elsewhere else 0.0
        what, found = traces.steps(before, made, name, None, tolerance)
        report.look(Layer.steps, name, what, found)
    return report
