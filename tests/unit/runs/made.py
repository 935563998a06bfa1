"""Runs on disk, as the driver leaves them, without the seconds that their stages would take."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftpipe import artifacts, pipeline, schema
from ftpipe.choices import Device, Format, Init, Precision, TemplateName
from ftpipe.config import DataConfig, LaunchConfig, ModelConfig, RunConfig, SourceConfig
from ftpipe.pipeline import Step

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROVENANCE: dict[str, Any] = {
    "command": "ftpipe sft recipe=mine",
    "git": {"commit": COMMIT, "dirty": False},
    "lock": {"requirements.lock": "aa" * 32},
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.1.0"},
    "hardware": {"cpu": "A Processor", "cores": 2, "gpus": []},
    "wall_seconds": 3.5,
    "peak_memory_gib": 0.25,
    "world_size": 1,
    "seed": 0,
}
METRICS: dict[str, dict[str, float]] = {
    "model": {"parameters": 1234},
    "prepare": {"train_rows": 2, "validation_rows": 1},
    "sft": {"loss_first": 5.5, "loss_last": 1.25, "tokens_per_second": 99.5},
}


def config(output: Path) -> RunConfig:
    """Return the configuration of a tiny random model on shipped rows."""
    return RunConfig(
        name="mine",
        output=str(output),
        model=ModelConfig(
            init=Init.random, tokenizer="bytes", architecture={"model_type": "llama", "hidden_size": 32}
        ),
        data=DataConfig(
            sources={"mine": SourceConfig(format=Format.alpaca, path="sample:alpaca.json")},
            template=TemplateName.alpaca,
        ),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32),
    )


def changed(cfg: RunConfig, key: str, value: object) -> RunConfig:
    """Return a copy with another value at a dotted key."""
    other = copy.deepcopy(cfg)
    part: Any = other
    *groups, last = key.split(".")
    for name in groups:
        part = part[name] if isinstance(part, dict) else getattr(part, name)
    setattr(part, last, value)
    return other


def run(cfg: RunConfig, upto: str | None = None, **told: Any) -> Path:
    """Make a run's folder and the artifact of each stage; return the folder.

    Args:
        told: what goes over the provenance.
    """
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    steps = pipeline.plan(cfg, upto)
    pipeline.record(folder, steps)
    for step in steps:
        if step.artifact is None:
            artifact(cfg, step, steps, **told)
    return folder


def artifact(
    cfg: RunConfig,
    step: Step,
    steps: list[Step],
    metrics: Mapping[str, float] | None = None,
    files: Mapping[str, str] | None = None,
    **told: Any,
) -> Path:
    """Publish the artifact of a step, with the manifest that the driver would write."""
    name = step.stage.name
    places = {one.stage.name: one.place.name for one in steps}
    with artifacts.building(Path(cfg.output), name, step.fingerprint) as partial:
        for file, text in {"weights.bin": f"of {step.fingerprint}", **(files or {})}.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).write_text(text, encoding="utf-8")
        manifest = {
            "kind": step.stage.makes,
            "stage": name,
            "fingerprint": step.fingerprint,
            "decided_by": step.facts,
            "inputs": {kind: places[maker] for kind, maker in step.inputs.items()},
            "metrics": metrics if metrics is not None else METRICS.get(name, {}),
            "config": schema.plain(cfg),
            "provenance": PROVENANCE | told,
        }
        return artifacts.publish(partial, manifest).path


def names(folder: Path) -> dict[str, str]:
    """Return the artifact of each stage of a run, as its record has it."""
    listed: dict[str, str] = json.loads((folder / "artifacts.json").read_text(encoding="utf-8"))
    return listed


def place(folder: Path, stage: str) -> Path:
    return folder.parents[1] / "artifacts" / names(folder)[stage]


def date(folder: Path, seconds: int) -> None:
    """Say that a run was started so many seconds after the epoch."""
    os.utime(folder / "run.yaml", (seconds, seconds))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    files = (Path(base) / name for base, _, found in os.walk(folder) for name in found)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
