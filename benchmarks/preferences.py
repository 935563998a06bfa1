"""Learning from preferences side by side: our dpo and reward stages against plain TRL, same work.

    make bench-preferences args="--rows pairs.jsonl --count 64 --runs 5"

Rows are ``prompt, chosen, rejected`` texts, cut to one length. Each run is one epoch over the same rows
in batches of the same size. Both sides of a comparison run at the same time, a core each, so that
whatever else the machine does slows both; they begin their first steps together, and change cores the
next time. Both are timed by the same code (clock/sitecustomize.py), from the first step on: by the
clock, and by what the processor worked for them, which other work on the machine disturbs less. What
counts are the ratios.
``two adapters`` trains a LoRA policy against a frozen copy of itself: ours on one base, TRL's with a
second model as its reference. Writes benchmarks/results/preferences-<cpu|gpu>.json.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from together import at_once, together

from ftpipe import provenance

HERE = Path(__file__).resolve().parent
BATCH, MICRO_BATCH = 8, 4  # pairs
THREADS = 1  # of either side
RATIOS = "ratios ftpipe / trl (median of pairs)"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

Measurement = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48, help="pairs of an epoch")
    parser.add_argument("--length", type=int, default=700, help="characters of a prompt with its reply")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="kinds of work, such as reward; all of them else")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = side_by_side(chosen, Path(scratch))
    kinds = {side.rpartition(":")[0] for side in found["measured"]}
    record = {
        "dates": dict.fromkeys(sorted(kinds), datetime.date.today().isoformat()),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "settings": {
            "pairs": chosen.count,
            "characters": chosen.length,
            "runs": chosen.runs,
            "rows": chosen.rows.name,
            "model": SHAPE,
        },
        **found,
    }
    name = f"preferences-{'gpu' if provenance.gpus() else 'cpu'}.json"
    file = HERE / "results" / name
    if chosen.only and file.is_file():
        add(record, json.loads(file.read_text()))
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{name}")
    return 0


def add(record: dict[str, Any], before: dict[str, Any]) -> None:
    """Keep the kinds of work that were measured before, on the same machine and rows."""
    alike = {"hardware", "packages"}
    settings = [{**one["settings"], "runs": None} for one in (record, before)]
    if all(record[key] == before[key] for key in alike) and settings[0] == settings[1]:
        for part in ("dates", "measured", RATIOS):
            record[part] = {**before[part], **record[part]}


def side_by_side(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return measurements, and medians of the ratios ours / theirs, of each kind of work."""
    rows = scratch / "rows.jsonl"
    write_rows(chosen.rows, rows, chosen.count, chosen.length)
    tuned = ours(scratch, rows, "sft", "stages=[prepare,sft]")  # makes the model, too
    model = next((scratch / "outputs/artifacts").glob("model-*/config.json")).parent
    works: dict[str, tuple[Callable[[], Measurement], Callable[[], Measurement]]] = {
        "dpo": (
            lambda: ours(scratch, rows, "dpo", "stages=[prepare,dpo]", "dpo.start=model"),
            lambda: plain(scratch, model, rows, "dpo", None),
        ),
        "two adapters": (
            lambda: ours(scratch, rows, "dpo", "stages=[prepare,sft,dpo]"),
            lambda: plain(scratch, model, rows, "dpo", scratch / "tuned"),
        ),
        "reward": (
            lambda: ours(scratch, rows, "reward", "stages=[prepare,reward]", "reward.start=model"),
            lambda: plain(scratch, model, rows, "reward", None),
        ),
    }
    del tuned
    works = {name: sides for name, sides in works.items() if name in (chosen.only or works)}
    measured: dict[str, list[Measurement]] = {}
    for number in range(chosen.runs):
        for work, sides in works.items():
            for left in ("ftpipe", "trl"):  # of the comparison before
                (scratch / f"{left}.ready").unlink(missing_ok=True)
            for side, found in zip(("ftpipe", "trl"), together(sides, number), strict=True):
                measured.setdefault(f"{work}: {side}", []).append(found)
                shown = {key: round(value, 4) for key, value in found.items()}
                print(f"{work}: {side:8} {shown}", flush=True)
    ratios = {
        work: {
            key: statistics.median(
                a[key] / b[key]
                for a, b in zip(measured[f"{work}: ftpipe"], measured[f"{work}: trl"], strict=True)
            )
            for key in ("pairs_per_second", "pairs_per_cpu_second", "peak_memory_gib")
        }
        for work in works
    }
    for work, ratio in ratios.items():
        print(f"{work:14} {ratio}")
    return {"measured": measured, RATIOS: ratios}


def write_rows(source: Path, target: Path, count: int, length: int) -> None:
    """Write so many pairs, each prompt once, from the file's rows as often as it takes.

    Every prompt with its reply is cut to the same length: else which rows share a batch, which either
    side draws its own way, would decide how much padding is computed, and with it the ratio.
    """
    fit = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, *replies = [row["prompt"], row["chosen"], row["rejected"]]
        whole = all(isinstance(text, str) and text.isascii() for text in (prompt, *replies))
        least = length - len(prompt)
        if whole and least > 20 and all(len(text.strip()) >= least for text in replies):
            # no space at the end, which one side would strip
            chosen, rejected = (f"{text.strip()[: least - 1]}." for text in replies)
            if chosen != rejected:
                fit.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not fit:
        raise SystemExit(f"{source} has no pair of {length} characters; set --length lower")
    repeated = [
        {**fit[at % len(fit)], "prompt": f"{at:04}. {fit[at % len(fit)]['prompt']}"}
        for at in range(count)
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in repeated), encoding="utf-8")


def ours(scratch: Path, rows: Path, stage: str, *extra: str) -> Measurement:
    uses = "use: [preferences, demonstrations]"
    words = [
        *("recipe=tiny", "data=own", "data.template=wizardlm", "data.validation=0"),
        f"data.sources={{rows: {{format: preference, path: {rows}, {uses}}}}}",
        "model.architecture=" + "{" + ", ".join(f"{k}: {v}" for k, v in SHAPE.items()) + "}",
        *("adapter.dropout=0", "sft.max_steps=2", "sft.samples=0", "dpo.samples=0"),
        *(f"launch.micro_batch_size={MICRO_BATCH}", f"launch.threads={THREADS}", "launch.device=auto"),
        *(f"{name}.batch_size={BATCH}" for name in ("sft", "dpo", "reward")),
        *(f"{name}.learning_rate=1e-4" for name in ("dpo", "reward")),
        *extra,
    ]
    for old in (scratch / "outputs/artifacts").glob(f"{stage}-*/manifest.json"):
        if stage != "sft":
            old.unlink()  # the same work again, not reused
            old.parent.rename(scratch / f"done-{os.urandom(4).hex()}")
    command = [sys.executable, "-m", "ftpipe.cli", "run", *words]
    env = {**os.environ, **clock(scratch, "ftpipe", f"{stage}.job.json")}
    subprocess.run(
        command, cwd=scratch, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    (made,) = (scratch / "outputs/artifacts").glob(f"{stage}-*/manifest.json")
    if stage == "sft" and not (scratch / "tuned").exists():
        (scratch / "tuned").symlink_to(made.parent)
    manifest = json.loads(made.read_text())
    metrics = manifest["metrics"]
    return {
        "tokens": metrics["tokens"],
        **({} if stage == "sft" else speed(scratch, "ftpipe", rows)),
        "peak_memory_gib": manifest["provenance"]["peak_memory_gib"],
        "loss": metrics["loss_first"],
    }


def plain(scratch: Path, model: Path, rows: Path, stage: str, adapter: Path | None) -> Measurement:
    settings = {
        "stage": stage,
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "rows": str(rows),
        "out": str(scratch / "plain"),
        "batch": BATCH,
        "micro_batch": MICRO_BATCH,
    }
    command = [sys.executable, str(HERE / "plain_trl_preferences.py"), json.dumps(settings)]
    env = {
        **os.environ,
        **clock(scratch, "trl", "plain_trl_preferences"),
        "OMP_NUM_THREADS": str(THREADS),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    measured: Measurement = json.loads(done.stdout.splitlines()[-1])
    return measured | speed(scratch, "trl", rows)


def clock(scratch: Path, side: str, word: str) -> dict[str, str]:
    """Return the environment in which a training whose command has a word tells what it took.

    It waits for the other side, where both run at once.
    """
    path = os.pathsep.join([str(HERE / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"PYTHONPATH": path, "FTPIPE_CLOCK": str(scratch / side), "FTPIPE_CLOCK_FOR": word}
    if at_once(2) and "sft" not in word:
        told["FTPIPE_CLOCK_OTHER"] = str(scratch / ("trl" if side == "ftpipe" else "ftpipe"))
    return told


def speed(scratch: Path, side: str, rows: Path) -> Measurement:
    """Return what a side's clock told, per second of either kind."""
    told = json.loads((scratch / side).read_text())
    pairs = len(rows.read_text(encoding="utf-8").splitlines())
    return {
        "pairs_per_second": pairs / told["seconds"],
        "pairs_per_cpu_second": pairs / told["cpu_seconds"],
    }


if __name__ == "__main__":
    sys.exit(main())
