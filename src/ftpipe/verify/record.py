"""What a manifest says decided a result, against what is here: nothing is computed for this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.pipeline import STAGES, Step
from ftpipe.verify.findings import Finding, Layer

HARDWARE = ("platform", "cpu", "gpus")  # by which results may differ in their last bits
RANKS, THREADS = "ranks", "threads"  # likewise


def environment(recorded: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> list[Finding]:
    """Return what differs between the provenance of an artifact and that of a run here and now."""

    def unlike(what: str, a: Any, b: Any) -> Finding:
        return Finding(Layer.environment, stage, f"{what} {_said(a)} is recorded, {_said(b)} here")

    found = []
    if recorded["python"] != now["python"]:
        found.append(unlike("python", recorded["python"], now["python"]))
    before, here = recorded["packages"], now["packages"]
    for name in sorted({*before, *here}):
        if before.get(name) != here.get(name):
            found.append(unlike(name, before.get(name), here.get(name)))
    for name in HARDWARE:
        a, b = recorded["hardware"].get(name), now["hardware"].get(name)
        if a != b:
            found.append(unlike(name, a, b))
    if recorded["world_size"] != now["world_size"]:
        found.append(unlike(RANKS, recorded["world_size"], now["world_size"]))
    threads = [which.get("environment", {}).get("blas_threads") for which in (recorded, now)]
    if None not in threads and threads[0] != threads[1]:
        found.append(unlike(THREADS, *threads))
    return found


def other_hardware(findings: list[Finding]) -> bool:
    """Say whether numbers may differ in their last bits for what was found of the environment."""
    words = (*HARDWARE, RANKS, THREADS)
    return any(one.layer is Layer.environment and one.says.startswith(words) for one in findings)


def code(artifact: Artifact, now: Mapping[str, Any]) -> list[Finding]:
    """Return which source files, and which version of the stage, are other than recorded."""
    before: Mapping[str, str] | None = artifact.manifest["provenance"].get("source")
    here: Mapping[str, str] = now.get("source", {})
    found = []
    for name in sorted({*(before or {}), *here}) if before is not None else ():
        a, b = (before or {}).get(name), here.get(name)
        if a != b:
            how = "is new here" if a is None else "is missing here" if b is None else "is other"
            found.append(Finding(Layer.code, artifact.stage, f"{name} {how}"))
    version, current = artifact.manifest["decided_by"]["version"], STAGES[artifact.stage].version
    if version != current:
        says = f"version {version} of the stage is recorded, {current} here"
        found.append(Finding(Layer.code, artifact.stage, says))
    return found


def decided(artifact: Artifact, step: Step) -> list[Finding]:
    """Return which values of the configuration, and which outside input, are other than recorded.

    Args:
        step: the stage as it would be made here and now.
    """
    before, now = artifact.manifest["decided_by"], step.facts
    found = []
    if before["seed"] != now["seed"]:
        found.append(_value(artifact, "seed", before["seed"], now["seed"]))
    for key in sorted({*before["config"], *now["config"]}):
        a, b = before["config"].get(key), now["config"].get(key)
        if a != b:
            found.append(_value(artifact, key, a, b))
    for key in sorted({*before["pins"], *now["pins"]}):
        a, b = before["pins"].get(key), now["pins"].get(key)
        if a != b:
            says = f"{key}: {_digest(a)} is recorded, {_digest(b)} here"
            found.append(Finding(Layer.data, artifact.stage, says))
    return found


def _value(artifact: Artifact, key: str, a: Any, b: Any) -> Finding:
    return Finding(Layer.config, artifact.stage, f"{key}={_said(a)} is recorded, {_said(b)} here")


def _said(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _digest(value: str | None) -> str:
    if value is None:
        return "nothing"
    return value if ":" in value or len(value) < 64 else f"sha256 {value[:16]}"
