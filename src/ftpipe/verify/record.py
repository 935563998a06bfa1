"""What a manifest says decided a result, against what is here: nothing is computed for this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.pipeline import STAGES, Step
from ftpipe.verify.findings import Finding, Layer

HARDWARE = ("platform", "cpu", "gpus")  # by which results may differ in their last bits
# How a step is split: by which sums are rounded, and dropout is drawn, otherwise.
SPLIT = ("micro_batch_size", "strategy", "device")
LAUNCH = "launch."
ROUNDS = (*(f"{name} " for name in (*HARDWARE, "ranks", "threads")), LAUNCH)  # not platformdirs


def environment(recorded: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> list[Finding]:
    """Return what differs between the provenance of an artifact and that of a run here and now.

    Args:
        recorded, now: what ``provenance.collect`` returns, with ``world_size`` and, where they are
            known, ``environment`` and ``launch``.
    """
    before, here = _facts(recorded), _facts(now)
    unsaid = {name for name in before.keys() ^ here.keys() if name.startswith((LAUNCH, "threads"))}
    return [
        Finding(
            Layer.environment,
            stage,
            f"{name} {_said(before.get(name))} is recorded, {_said(here.get(name))} here",
        )
        for name in dict.fromkeys([*before, *here])
        if before.get(name) != here.get(name) and name not in unsaid
    ]


def _facts(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what surrounds a run by name; what an old record does not say is left out."""
    facts = {"python": told["python"]}
    facts |= {name: told["packages"][name] for name in sorted(told["packages"])}
    facts |= {name: told["hardware"].get(name) for name in HARDWARE}
    facts |= {"ranks": told["world_size"]}
    launch = told.get("launch", {})
    facts |= {f"{LAUNCH}{name}": launch[name] for name in SPLIT if name in launch}
    threads = told.get("environment", {}).get("blas_threads")
    return facts if threads is None else facts | {"threads": threads}


def attempts(artifact: Artifact) -> list[Finding]:
    """Return what attempts that were interrupted had otherwise than the one that ended it."""
    told = artifact.manifest["provenance"].get("earlier_attempts", [])
    return [
        Finding(Layer.environment, artifact.stage, f"an interrupted attempt had {name} {_said(value)}")
        for one in told
        for name, value in one.items()
    ]


def other_hardware(findings: list[Finding]) -> bool:
    """Say whether numbers may differ in their last bits for what was found of the environment."""
    return any(one.layer is Layer.environment and one.says.startswith(ROUNDS) for one in findings)


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
