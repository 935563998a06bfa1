"""Several seeds as one thing: the same recipe with each of them, and how far its metrics spread."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ftpipe import pipeline
from ftpipe.artifacts import Artifact, write_atomic
from ftpipe.config import RunConfig

SPREAD = "seeds.json"  # in the folder of the run that stands for all


def each(cfg: RunConfig) -> list[RunConfig]:
    """Return the runs that ``seeds`` asks for: of ``seed``, ``seed + 1`` and so on, else the same."""
    return [replace(cfg, seed=cfg.seed + at, seeds=1) for at in range(cfg.seeds)]


def spread(runs: Sequence[Mapping[str, Artifact]]) -> dict[str, list[float]]:
    """Return the values of each metric, by ``stage/metric``, one for each seed.

    A metric that some run lacks is left out.

    Args:
        runs: the artifacts of each seed by stage.
    """
    values: dict[str, list[float]] = {}
    for run in runs:
        for stage, artifact in run.items():
            for name, value in artifact.metrics.items():
                values.setdefault(f"{stage}/{name}", []).append(float(value))
    return {name: found for name, found in values.items() if len(found) == len(runs)}


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1 in the denominator); nan if a value is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def write(cfg: RunConfig, folders: Sequence[Path], values: Mapping[str, Sequence[float]]) -> Path:
    """Write what all seeds gave into the folder of the run that stands for them; return the file.

    Args:
        cfg: with ``seeds`` as it was asked for.
        folders: of each seed's run.
    """
    found = {
        name: {"mean": statistics.fmean(of), "sd": deviation(of), "values": list(of)}
        for name, of in values.items()
    }
    folder = pipeline.run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [one.seed for one in each(cfg)]
    told = {"seeds": seeds, "runs": [path.name for path in folders], "metrics": found}
    write_atomic(folder / SPREAD, json.dumps(told, indent=1) + "\n")
    return folder / SPREAD


def table(seeds: Sequence[int], values: Mapping[str, Sequence[float]]) -> list[str]:
    """Return lines for a person: mean, standard deviation and range of each metric."""
    width = max(map(len, values), default=0)
    lines = [f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}): mean ± standard deviation [range]"]
    for name, of in values.items():
        mean, sd = statistics.fmean(of), deviation(of)
        lines.append(f"  {name:{width}}  {mean:.6g} ± {sd:.3g}  [{min(of):.6g}, {max(of):.6g}]")
    return lines
