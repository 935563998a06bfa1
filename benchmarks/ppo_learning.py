"""Does PPO learn what it is paid for? Known truths, several seeds, with and without the KL penalty.

    make bench-ppo-learning args="--model stories260k"       # a folder with a small pretrained model

- ``bandit``: answers of one token, four prompts, a random model. The optimum of the KL-regularised
  objective is known exactly, pi(a) ~ rho(a) exp(r(a) / beta); what is reported is the total variation
  distance to it, and that of the reference to it.
- ``function``: a pretrained model is paid for the share of four words that its story has (1 at best).
- ``no penalty``: the same with beta = 0, which shows what the penalty holds back.
- ``learned``: pairs of the model's own stories, ordered by that share, train a reward model; PPO raises
  its score, and the share is only watched.

Writes benchmarks/results/ppo-learning.json and draws the curves.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftpipe import provenance
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.ppo import functions

HERE = Path(__file__).resolve().parent
WANTED = ["happy", "park", "mom", "friend"]
GIRLS, BOYS = ["Lily", "Anna", "Mia", "Sue"], ["Tom", "Ben", "Max", "Sam"]
OPENINGS = [
    "Once upon a time, there was a little {kind} named {name}.",
    "One day, {name} went outside with {their} dog.",
    "{name} had a big red ball. {They} liked to play with it.",
    "{name} and {their} brother saw a small cat in the garden.",
]
PATTERN = "[a-m]"  # what the bandit is paid for
LETTERS = f"ppo.function.parameters={{pattern: '{PATTERN}'}}"
SHARE = f"{{wanted: [{', '.join(WANTED)}]}}"

Curve = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder; without: the bandit alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--beta", type=float, default=0.02)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    chosen = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        found["bandit"] = [bandit(there, seed) for seed in range(chosen.seeds)]
        if chosen.model is not None:
            write_prompts(there / "prompts.jsonl")
            for name, words in {
                "function": (f"ppo.beta={chosen.beta}",),
                "no penalty": ("ppo.beta=0",),
            }.items():
                found[name] = [stories(chosen, there, seed, *words) for seed in range(chosen.seeds)]
            write_pairs(chosen.model, there)
            words = (f"ppo.beta={chosen.beta}", *learned(there))
            found["learned"] = [stories(chosen, there, seed, *words) for seed in range(chosen.seeds)]
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": provenance.hardware(),
        "packages": provenance.packages(),
        "settings": {key: getattr(value, "name", value) for key, value in vars(chosen).items()},
        "last five rollouts, mean and deviation over seeds": {
            name: ends(runs) for name, runs in found.items() if name != "bandit"
        },
        **found,
    }
    (HERE / "results" / "ppo-learning.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found, HERE / "results" / "ppo-learning.png")
    print(json.dumps(record["last five rollouts, mean and deviation over seeds"], indent=1))
    print(*(f"bandit: {run}" for run in found["bandit"]), sep="\n")
    return 0


def run(there: Path, *words: str) -> Path:
    """Run the pipeline and return the folder of the policy that it made last."""
    command = [sys.executable, "-m", "ftpipe.cli", "run", "recipe=tiny", "data=own", *words]
    subprocess.run(command, cwd=there, check=True, stdout=subprocess.DEVNULL)
    manifests = (there / "outputs/artifacts").glob("ppo-*/manifest.json")
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parent


def bandit(there: Path, seed: int) -> dict[str, float]:
    """Return how far the policy is from the optimum, mean over prompts."""
    prompts = there / "bandit.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "3", "4")))
    beta = 0.5
    policy = run(
        there,
        *("stages=[prepare,ppo]", "adapter=full", "data.template=wizardlm", "data.validation=0"),
        f"data.sources={{p: {{format: prompts, path: {prompts}}}}}",
        *("ppo.start=model", "ppo.reward=function", "ppo.function.name=regex", LETTERS),
        *("ppo.max_new_tokens=1", "ppo.missing_eos_penalty=0", f"ppo.beta={beta}"),
        "ppo.health.min_eos_rate=null",  # an answer of one token is seldom its own end
        *("ppo.batch_size=256", "launch.micro_batch_size=256", "ppo.max_steps=150"),
        *("ppo.learning_rate=3e-3", "ppo.ppo_epochs=2", "ppo.value_clip=null", f"seed={seed}"),
    )
    inputs = json.loads((policy / "manifest.json").read_text())["inputs"]
    dataset, base = (policy.parent / inputs[kind] for kind in ("dataset", "base_model"))
    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    paid = [set(tokenizer.decode([token], skip_special_tokens=True)) for token in range(len(tokenizer))]
    rewards_V = torch.tensor([float(bool(one & set("abcdefghijklm"))) for one in paid])
    models = [AutoModelForCausalLM.from_pretrained(str(folder)).eval() for folder in (base, policy)]
    apart = []
    for row in table.read(dataset, Use.prompts, Part.train):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            rho_V, pi_V = (model(input_ids=ids).logits[0, -1].double().softmax(-1) for model in models)
        best_V = rho_V * torch.exp(rewards_V / beta)
        best_V /= best_V.sum()
        apart.append([float((one - best_V).abs().sum() / 2) for one in (pi_V, rho_V)])
    policy_apart, reference_apart = (statistics.mean(column) for column in zip(*apart, strict=True))
    return {"policy to optimum": policy_apart, "reference to optimum": reference_apart}


def write_prompts(path: Path) -> None:
    rows = []
    for opening, name in itertools.product(OPENINGS, GIRLS + BOYS):
        kind, their, they = ("girl", "her", "She") if name in GIRLS else ("boy", "his", "He")
        rows.append({"prompt": opening.format(name=name, kind=kind, their=their, They=they)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pairs(model: Path, there: Path, samples: int = 16) -> None:
    """Write pairs of the model's own stories, the one with more of the four words being the better."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    policy = AutoModelForCausalLM.from_pretrained(str(model)).eval()
    draws = random.Random(0)
    gold = functions.named("presence", {"wanted": WANTED})
    pairs = []
    for line in (there / "prompts.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        ids = tokenizer(prompt, return_tensors="pt").input_ids.repeat(samples, 1)
        whole = policy.generate(ids, max_new_tokens=48, do_sample=True, top_k=0, pad_token_id=0)
        texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in whole]
        for one, other in itertools.combinations(texts, 2):
            shares = [gold(prompt, text, None) for text in (one, other)]
            if shares[0] != shares[1] and draws.random() < 0.2:
                better, worse = (one, other) if shares[0] > shares[1] else (other, one)
                pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    (there / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def learned(there: Path) -> list[str]:
    return [
        "stages=[prepare,reward,ppo]",
        f"data.sources.pairs={{format: preference, path: {there / 'pairs.jsonl'}}}",
        *("reward.start=model", "reward.epochs=4", "reward.learning_rate=1e-3", "reward.batch_size=32"),
        *("ppo.reward=model", "ppo.function={name: null, parameters: {}}", "ppo.ignore_gate=true"),
        *("ppo.watch.name=presence", f"ppo.watch.parameters={SHARE}"),
    ]


def stories(chosen: argparse.Namespace, there: Path, seed: int, *words: str) -> Curve:
    """Return the curves of one run on a pretrained model."""
    policy = run(
        there,
        *(f"model.path={chosen.model.resolve()}", "model.init=pretrained", "model.tokenizer=null"),
        *("model.architecture={model_type: llama}", "adapter=full", "stages=[prepare,ppo]"),
        *("data.template=plain", "data.validation=4", "data.max_length=256"),
        f"data.sources={{p: {{format: prompts, path: {there / 'prompts.jsonl'}}}}}",
        *("ppo.start=model", "ppo.reward=function", "ppo.function.name=presence"),
        f"ppo.function.parameters={SHARE}",
        *("ppo.max_new_tokens=48", "ppo.missing_eos_penalty=0", f"ppo.batch_size={chosen.batch}"),
        *("launch.micro_batch_size=32", f"ppo.max_steps={chosen.rollouts}", f"seed={seed}"),
        *(f"ppo.learning_rate={chosen.learning_rate}", "ppo.value_learning_rate=1e-3"),
        *("ppo.ppo_epochs=4", "ppo.minibatches=2"),
        # the curves show what the gates would end
        *(f"ppo.health.{gate}=null" for gate in ("max_kl", "min_entropy", "min_eos_rate")),
        *words,
    )
    lines = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    names = ("score", "watched", "kl", "entropy", "repeated")
    rollouts = [line for line in lines if "ppo/score" in line]
    return {
        name: [line[f"ppo/{name}"] for line in rollouts]
        for name in names
        if f"ppo/{name}" in rollouts[0]
    }


def ends(runs: list[Curve]) -> dict[str, list[float]]:
    """Return mean and standard deviation over seeds of each curve's first and last five values."""
    found = {}
    for name in runs[0]:
        for part, values in (
            ("first", [curve[name][0] for curve in runs]),
            ("last", [statistics.mean(curve[name][-5:]) for curve in runs]),
        ):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[f"{name}, {part}"] = [round(statistics.mean(values), 4), round(spread, 4)]
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw score, watched share, KL and entropy of every run, one colour for each kind."""
    from matplotlib.figure import Figure

    kinds = [name for name in found if name != "bandit"]
    if not kinds:
        return
    figure = Figure(figsize=(12, 6), layout="constrained")
    for place, name in enumerate(("score", "watched", "kl", "entropy", "repeated"), start=1):
        axes = figure.add_subplot(2, 3, place)
        for number, kind in enumerate(kinds):
            for curve in found[kind]:
                if name in curve:
                    axes.plot(curve[name], color=f"C{number}", alpha=0.7, lw=1)
        axes.set(xlabel="rollouts", ylabel=name)
    for number, kind in enumerate(kinds):
        figure.get_axes()[0].plot([], [], color=f"C{number}", label=kind)
    figure.get_axes()[0].legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
