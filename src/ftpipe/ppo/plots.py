"""The curves of a run, drawn from its metrics alone; the same numbers give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

CURVES = "curves.png"
PREFIX = "ppo/"
# name of a metric -> what its axis says
SHOWN = {
    "score": "score",
    "watched": "watched function",
    "kl": "KL from the reference, nats an answer",
    "length": "tokens of an answer",
    "eos_rate": "share that ends",
    "entropy": "entropy, nats a token",
    "repeated": "repeated 4-grams",
    "clip_fraction": "share clipped",
    "explained_variance": "explained variance",
}


def write(out: Path) -> None:
    """Draw ``curves.png`` from ``metrics.jsonl``; held-out measures are dots on the curves."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    curves = {
        name: [(line["step"], line[PREFIX + name]) for line in lines if PREFIX + name in line]
        for metric in SHOWN
        for name in (metric, f"held_out_{metric}")
    }
    named = [name for name in SHOWN if curves[name]]
    with matplotlib.style.context("default"):
        rows = -(-len(named) // 3)
        figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
        for place, name in enumerate(named, start=1):
            axes = figure.add_subplot(rows, 3, place)
            axes.plot(*zip(*curves[name], strict=True), color="tab:blue", label="rollouts")
            if held := curves[f"held_out_{name}"]:
                axes.plot(*zip(*held, strict=True), "o", color="tab:orange", label="held-out prompts")
                axes.legend(fontsize="small")
            axes.set(ylabel=SHOWN[name], xlabel="rollouts")
        figure.savefig(out / CURVES, dpi=120, metadata={"Software": None})
