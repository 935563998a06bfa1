"""What the record of a run costs: fine-tuning with its trace as it comes, and with none.

    make bench-record args="--steps 120 --runs 4"

Both sides run at the same time, a core each, and change cores from one time to the next. Steps per
second are those that a training reports of its steps alone; the digests of the first weights, before
them, are a number of their own, and so is a checkpoint with its digests.
Writes benchmarks/results/record-cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from together import together

from ftpipe import checkpoints, provenance, trace

HERE = Path(__file__).resolve().parent
SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SIDES = {"record": (), "none": ("tracking.trace_first=0", "tracking.trace_every=1000000")}
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of which the first ten are on record")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--mib", type=int, default=256, help="size of the checkpoint that is sealed")
    chosen = parser.parse_args()
    measured: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(chosen.runs):
            sides = [
                partial(speed, Path(scratch) / f"{number}-{name}", chosen.steps, words)
                for name, words in SIDES.items()
            ]
            for name, found in zip(SIDES, together(sides, number), strict=True):
                measured[name].append(found)
                print(f"{name:8} {found:.1f} tokens/s", flush=True)
        seconds = sealing(Path(scratch) / "checkpoint-1", chosen.mib)
    ratios = [a / b for a, b in zip(measured["record"], measured["none"], strict=True)]
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "settings": {**vars(chosen), "model": SHAPE},
        "tokens per second": measured,
        "ratios record / none": ratios,
        "median": statistics.median(ratios),
        "MiB per second": seconds,
    }
    (HERE / "results" / "record-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"ratios {ratios}, median {record['median']:.4f}, {seconds}")
    return 0


def speed(folder: Path, steps: int, words: tuple[str, ...]) -> float:
    """Return the tokens per second that a training reports."""
    folder.mkdir()
    shape = ", ".join(f"{key}: {value}" for key, value in SHAPE.items())
    command = [
        *(sys.executable, "-m", "ftpipe.cli", "sft", "recipe=tiny", "sft.samples=0", "launch.threads=1"),
        *(f"sft.max_steps={steps}", "data.validation=0", f"model.architecture={{{shape}}}", *words),
    ]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (manifest,) = folder.glob("outputs/artifacts/sft-*/manifest.json")
    return float(json.loads(manifest.read_text())["metrics"]["tokens_per_second"])


def sealing(folder: Path, mib: int) -> dict[str, float]:
    """Return how fast a checkpoint is written, sealed, and read again, and weights are digested."""
    folder.mkdir()
    data = os.urandom(mib * MIB)

    def timed(what: Any) -> float:
        started = time.monotonic()
        what()
        return round(mib / (time.monotonic() - started), 1)

    weights = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return {
        "a file is written": timed(lambda: (folder / "model.safetensors").write_bytes(data)),
        "a checkpoint is put on the disk and sealed": timed(lambda: checkpoints.seal(folder)),
        "a checkpoint is verified": timed(lambda: checkpoints.damaged(folder)),
        "first weights are digested": timed(lambda: trace.of_weights([("w", weights)], [weights])),
    }


if __name__ == "__main__":
    sys.exit(main())
