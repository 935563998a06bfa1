"""Does a run that is killed again and again end with the weights of one that nothing interrupts?

    make bench-kills                                  # 20 kills of each stage
    make bench-kills args="--kills 5 --only sft dpo"

Each case is made once without interruption. Then its last stage is made again from the same inputs, and
the whole process group is killed by SIGKILL at a random moment, so many times; each new attempt goes on
from what the last one left. At the end every file of the artifact that a later stage reads is compared
byte by byte. While it runs, nothing may lie in the artifact's place before it is whole.
Writes benchmarks/results/kills.json after each case; cases that were not chosen stay in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ftpipe import provenance
from ftpipe.artifacts import MANIFEST, digests
from ftpipe.trace import INITIAL, TRACE
from ftpipe.verify.files import UNREAD

HERE = Path(__file__).resolve().parent
TWO = ("launch.processes=2", "launch.micro_batch_size=2")
CASES: dict[str, tuple[str, ...]] = {
    "prepare": ("prepare", "recipe=tiny"),
    "sft": ("sft", "recipe=tiny", "sft.samples=0", "sft.max_steps=24", "sft.save_every=2"),
    "reward": ("reward", "recipe=tiny-reward", "reward.save_every=1"),
    "dpo": ("dpo", "recipe=tiny-dpo", "dpo.samples=0", "dpo.save_every=2"),
    "ppo": ("ppo", "recipe=tiny-ppo", "ppo.samples=0", "ppo.save_every=1"),
}
CASES["sft, packed"] = (*CASES["sft"], "data.packing=true")
for name in ("sft", "reward", "dpo", "ppo"):
    CASES[f"{name}, two ranks"] = (*CASES[name], *TWO)
CASES["sft, two ranks, ZeRO-2"] = (*CASES["sft"], *TWO, "launch.strategy=zero2", "adapter=full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CASES, help="cases; all of them else")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    draws = random.Random(chosen.seed)
    file = HERE / "results" / "kills.json"
    found = json.loads(file.read_text())["cases"] if chosen.only and file.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for at, name in enumerate(chosen.only or CASES):
            on = {"date": datetime.date.today().isoformat(), "seed": chosen.seed}
            found[name] = on | case(Path(scratch) / str(at), CASES[name], chosen.kills, draws)
            print(f"{name}: {found[name]}", flush=True)
            record = {
                "hardware": provenance.hardware(),
                "packages": provenance.packages(),
                "cases": {name: found[name] for name in CASES if name in found},
            }
            file.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(one["equal"] for one in found.values()) else 1


def case(folder: Path, words: tuple[str, ...], kills: int, draws: random.Random) -> dict[str, Any]:
    """Return how often a stage was killed, at which share of its time, and whether it ended the same."""
    whole, again = folder / "whole", folder / "again"
    whole.mkdir(parents=True)
    run(whole, words).wait()
    stage = words[0]
    known = files(whole, stage)
    shutil.copytree(whole, again)
    drop(again, stage)
    started = time.monotonic()
    run(again, words).wait()
    seconds = time.monotonic() - started
    assert files(again, stage) == known, f"{words}: two whole runs differ"
    moments: list[float] = []
    resumed = finished = 0
    drop(again, stage)
    while len(moments) < kills:
        moment = draws.uniform(0.0, seconds)
        process = run(again, words)
        try:
            process.wait(moment)
            finished += 1  # it goes on from a checkpoint, so it may be sooner done
            if files(again, stage) != known:
                break
            drop(again, stage)
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        moments.append(round(moment / seconds, 3))
        resumed += bool(list(again.glob(f"outputs/artifacts/{stage}-*.partial/**/whole.json")))
        half_visible(again, stage)
    else:
        run(again, words).wait()
    return {
        "equal": files(again, stage) == known,
        "kills": len(moments),
        "left a checkpoint": resumed,
        "finished between": finished,
        "at shares of its time": moments,
        "seconds without a kill": round(seconds, 1),
    }


def run(folder: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ftpipe.cli", *words, "launch.threads=1"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    silent = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=silent, stderr=silent, start_new_session=True
    )


def drop(folder: Path, stage: str) -> None:
    """Remove what the last stage made."""
    for made in folder.glob(f"outputs/artifacts/{stage}-*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def half_visible(folder: Path, stage: str) -> None:
    """Fail if an artifact is in its place and not whole."""
    for made in folder.glob(f"outputs/artifacts/{stage}-*"):
        if made.is_dir() and made.suffix != ".partial":
            recorded = json.loads((made / MANIFEST).read_text())["files"]
            assert digests(made) == recorded, f"{made} is half there"


def files(folder: Path, stage: str) -> dict[str, str]:
    """Return the digests of what the last stage made and a later one reads."""
    (made,) = folder.glob(f"outputs/artifacts/{stage}-*/{MANIFEST}")
    left_out = {*UNREAD} - {TRACE, INITIAL}
    return {
        name: value for name, value in digests(made.parent).items() if Path(name).name not in left_out
    }


if __name__ == "__main__":
    sys.exit(main())
