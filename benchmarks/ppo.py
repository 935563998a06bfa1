"""PPO side by side: the stage ppo against the last TRL that had PPO, same model, prompts and lengths.

    make bench-ppo                                  # shipped prompts, a random model
    make bench-ppo args="--model FOLDER --prompts prompts.jsonl --batch 16 --rollouts 2 --runs 2"

A LoRA policy with a learned reward, either side. Ours has policy, reference, value function and reward
model on one base; TRL has a base for the policy (and reference), one for the reward model and one, fully
trained, for the value function. Both score in micro-batches; neither punishes a missing end; the weight
of the KL penalty is the same per nat of normalised score. TRL 1.12 is installed into a folder of its
own, over the same other packages. On a CPU both run at the same time, a core each, so that whatever else
the machine does slows both; the next time they change cores. What counts are the ratios. Writes
benchmarks/results/ppo-<cpu|gpu>.json and draws the reward curves together.
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
from pathlib import Path
from typing import Any

from together import together

from ftpipe import provenance
from ftpipe.samples import sample_path

HERE = Path(__file__).resolve().parent
TRL = "trl==1.12.0"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

Measurement = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder or GGUF file; without: random weights")
    parser.add_argument("--prompts", type=Path, default=sample_path("sample:prompts.jsonl"))
    parser.add_argument("--pairs", type=Path, default=sample_path("sample:preference.jsonl"))
    parser.add_argument("--template", default="wizardlm")
    parser.add_argument("--pad", type=int, help="TRL's padding token; without: the tokenizer's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--reward-steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--name", default="", help="of the result, where there are several")
    chosen = parser.parse_args()
    rows = sum(1 for line in chosen.prompts.open(encoding="utf-8") if line.strip())
    if chosen.batch > rows:  # TRL drops what does not fill a batch, and would look for one for ever
        parser.error(f"--batch {chosen.batch} is more than the {rows} prompts of {chosen.prompts}")
    with tempfile.TemporaryDirectory() as scratch:
        found = side_by_side(chosen, Path(scratch))
    settings = {key: value for key, value in vars(chosen).items() if key not in ("name", "pairs")}
    named = {key: getattr(value, "name", value) for key, value in settings.items()}
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "theirs": TRL,
        "settings": named | ({} if chosen.model else {"architecture": SHAPE}),
        **found,
    }
    kind = "gpu" if provenance.gpus() else "cpu"
    name = "-".join(part for part in ("ppo", chosen.name, kind) if part)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found["measured"], HERE / "results" / f"{name}.png")
    print(f"written: benchmarks/results/{name}.json and .png")
    return 0


def side_by_side(chosen: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return measurements, and medians of the ratios ours / theirs."""
    site = scratch / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), TRL]
    subprocess.run([sys.executable, *install], check=True)
    execute(chosen, scratch, "stages=[prepare,reward]")  # makes the model, too
    made = {
        kind: next((scratch / "outputs/artifacts").glob(f"{kind}-*/manifest.json")).parent
        for kind in ("prepare", "reward")
    }
    base = json.loads((made["reward"] / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = Path(base) if Path(base).is_absolute() else scratch / base
    merge(base, made["reward"], made["prepare"], scratch / "scored")
    normalised = json.loads((made["reward"] / "reward.json").read_text())["members"]["."]
    measured: dict[str, list[Measurement]] = {"ftpipe": [], "trl": []}
    # its scores are raw ones, so the penalty is weighed by their deviation
    beta = chosen.beta * normalised["deviation"]
    sides = (
        lambda: ours(chosen, scratch),
        lambda: theirs(chosen, scratch, base, made["prepare"], site, beta),
    )
    for number in range(chosen.runs):
        pair = [side() for side in sides] if chosen.threads > 1 else together(sides, number)
        for side, found in zip(measured, pair, strict=True):
            measured[side].append(found)
        for side, runs in measured.items():
            print(f"{side:8}", {k: v for k, v in runs[-1].items() if isinstance(v, float)}, flush=True)
    for run in measured["trl"]:
        run["scores"] = [(s - normalised["mean"]) / normalised["deviation"] for s in run["scores"]]
    ratios = {
        key: statistics.median(
            a[key] / b[key] for a, b in zip(measured["ftpipe"], measured["trl"], strict=True)
        )
        for key in ("answers_per_second", "peak_memory_gib")
    }
    print("ratios", ratios)
    return {"measured": measured, "ratios ftpipe / trl (median of pairs)": ratios}


def execute(chosen: argparse.Namespace, scratch: Path, stages: str) -> None:
    random = "model.architecture=" + "{" + ", ".join(f"{k}: {v}" for k, v in SHAPE.items()) + "}"
    given = [f"model.path={chosen.model}", "model.init=pretrained", "model.tokenizer=null"]
    words = [
        *("recipe=tiny", "data=own", f"data.template={chosen.template}", "data.validation=0"),
        f"data.sources={{prompts: {{format: prompts, path: {chosen.prompts}}}, "
        f"pairs: {{format: preference, path: {chosen.pairs}}}}}",
        *("data.duplicates=keep", "data.max_length=512", "data.over_length=drop", "data.max_lost=1"),
        *(given if chosen.model else [random]),
        *(stages, "reward.start=model", "ppo.start=model", "adapter.dropout=0"),
        *(
            f"reward.max_steps={chosen.reward_steps}",
            f"reward.batch_size={chosen.micro_batch}",
            "reward.learning_rate=1e-4",
        ),
        *("ppo.ignore_gate=true", "ppo.value_clip=0.2", "ppo.samples=0", "ppo.missing_eos_penalty=0"),
        *(f"ppo.{key}={getattr(chosen, key)}" for key in ("ppo_epochs", "max_new_tokens", "beta")),
        *(f"ppo.batch_size={chosen.batch}", f"ppo.max_steps={chosen.rollouts}"),
        f"ppo.learning_rate={chosen.learning_rate}",
        *(f"launch.micro_batch_size={chosen.micro_batch}", f"launch.threads={chosen.threads}"),
        *("launch.device=auto", f"launch.precision={'bf16' if chosen.bf16 else 'fp32'}"),
    ]
    command = [sys.executable, "-m", "ftpipe.cli", "run", *words]
    subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)


def ours(chosen: argparse.Namespace, scratch: Path) -> Measurement:
    for old in (scratch / "outputs/artifacts").glob("ppo-*/manifest.json"):
        old.unlink()  # the same work again, not reused
        old.parent.rename(scratch / f"done-{os.urandom(4).hex()}")
    execute(chosen, scratch, "stages=[prepare,reward,ppo]")
    (made,) = (scratch / "outputs/artifacts").glob("ppo-*/manifest.json")
    manifest = json.loads(made.read_text())
    lines = map(json.loads, (made.parent / "metrics.jsonl").read_text().splitlines())
    rollouts = [line for line in lines if "ppo/score" in line]
    parts = ("rollout", "scoring", "update")
    seconds = {part: sum(line[f"ppo/seconds_{part}"] for line in rollouts) for part in parts}
    memory = manifest["metrics"].get("peak_gpu_gib", manifest["provenance"]["peak_memory_gib"])
    return {
        "answers_per_second": chosen.batch * len(rollouts) / sum(seconds.values()),
        "peak_memory_gib": memory,
        **{f"seconds_{part}": value for part, value in seconds.items()},
        "mean_length": statistics.mean(line["ppo/length"] for line in rollouts),
        "scores": [line["ppo/score"] for line in rollouts],
        "kl": [line["ppo/kl"] for line in rollouts],
    }


def merge(base: Path, reward: Path, dataset: Path, out: Path) -> None:
    """Write the reward model as one whole model, which is what TRL takes."""
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "base, reward, dataset, out = sys.argv[1:]\n"
        "model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)\n"
        "PeftModel.from_pretrained(model, reward).merge_and_unload().save_pretrained(out)\n"
        "AutoTokenizer.from_pretrained(dataset + '/tokenizer').save_pretrained(out)\n"
    )
    command = [sys.executable, "-c", code, str(base), str(reward), str(dataset), str(out)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def theirs(
    chosen: argparse.Namespace, scratch: Path, base: Path, dataset: Path, site: Path, beta: float
) -> Measurement:
    tokenizer = json.loads((dataset / "tokenizer/tokenizer_config.json").read_text())
    vocabulary = json.loads((dataset / "tokenizer/tokenizer.json").read_text())
    ids = {one["content"]: one["id"] for one in vocabulary["added_tokens"]}
    settings = {
        "model": str(base),
        "reward": str(scratch / "scored"),
        "prompts": str(dataset / "prompts/train.arrow"),
        "out": str(scratch / "plain"),
        "pad": ids[tokenizer["pad_token"]] if chosen.pad is None else chosen.pad,
        **{
            key: getattr(chosen, key)
            for key in (
                *("batch", "micro_batch", "max_new_tokens", "rollouts", "ppo_epochs"),
                *("learning_rate", "bf16"),
            )
        },
        "beta": beta,
    }
    command = [sys.executable, str(HERE / "plain_trl_ppo.py"), json.dumps(settings)]
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": str(chosen.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    measured: Measurement = json.loads(done.stdout.splitlines()[-1])
    return measured


def draw(measured: dict[str, list[Measurement]], path: Path) -> None:
    """Draw scores and KL of the last run of both sides, rollout by rollout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for place, (key, says) in enumerate(
        [("scores", "normalised score"), ("kl", "KL from the reference, nats an answer")], start=1
    ):
        axes = figure.add_subplot(1, 2, place)
        for side, runs in measured.items():
            axes.plot(range(1, len(runs[-1][key]) + 1), runs[-1][key], label=side)
        axes.set(xlabel="rollouts", ylabel=says)
        axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
