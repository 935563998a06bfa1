"""What going wider costs here: one process and two of each strategy, on processors, beside the formulas.

Trains all weights of a small Llama for a few steps with each, and writes
benchmarks/results/scaling-cpu.json. Two ranks share the cores of one machine, so what is measured is
what the strategies cost beside each other, not what two machines gain.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from ftpipe import costs
from ftpipe.choices import Strategy

RESULT = Path(__file__).parent / "results" / "scaling-cpu.json"
STEPS = 10
WORDS = (
    *("recipe=tiny", "adapter=full", "model.architecture.hidden_size=256", "sft.samples=0"),
    *("model.architecture.intermediate_size=1024", "model.architecture.num_hidden_layers=4"),
    *("sft.batch_size=8", f"sft.max_steps={STEPS}", "sft.log_every=1", "sft.eval_every=0"),
    *("sft.learning_rate=1e-3", "launch.micro_batch_size=2", "launch.threads=1"),
)


def measure(folder: Path, strategy: Strategy, ranks: int) -> dict[str, Any]:
    """Train once; return seconds a step (median of the later ones), and what the formulas say."""
    first = folder / f"{Strategy.ddp}-1" / "artifacts"  # model and dataset are made once
    if first.is_dir():
        mine = folder / f"{strategy}-{ranks}" / "artifacts"
        shutil.copytree(first, mine, ignore=shutil.ignore_patterns("sft-*"))
    words = [*WORDS, f"launch.processes={ranks}", f"launch.strategy={strategy}"]
    words.append(f"output={folder / f'{strategy}-{ranks}'}")
    command = [sys.executable, "-m", "ftpipe.cli", "sft", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (path,) = (folder / f"{strategy}-{ranks}").glob("artifacts/sft-*/manifest.json")
    lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "sft/loss" in line]
    seconds = sorted(b["time"] - a["time"] for a, b in pairwise(steps[2:]))
    (model,) = (folder / f"{strategy}-{ranks}").glob("artifacts/model-*/manifest.json")
    weights = json.loads(model.read_text())["metrics"]["parameters"]
    accumulated = 8 // (2 * ranks)
    held = costs.states(strategy, weights, 0, ranks)
    moved = costs.sent(strategy, weights, 0, ranks, accumulated, gathered=4)
    return {
        "strategy": str(strategy),
        "ranks": ranks,
        "seconds_a_step": round(seconds[len(seconds) // 2], 4),
        "loss_last": steps[-1]["sft/loss"],
        "grad_norm_last": steps[-1]["sft/grad_norm"],
        "peak_memory_gib": json.loads(path.read_text())["provenance"]["peak_memory_gib"],
        "weights": weights,
        "states_mb": round(held.total / 1e6, 2),
        "sent_mb_a_step": round(moved / 1e6, 2),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), Strategy.ddp, 1)]
        rows += [measure(Path(folder), strategy, 2) for strategy in Strategy]
    for row in rows:
        print(json.dumps(row))
    first = rows[0]
    for row in rows[1:]:
        assert abs(row["loss_last"] / first["loss_last"] - 1) < 1e-3, row
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
