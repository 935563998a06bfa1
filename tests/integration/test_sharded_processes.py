"""Two ranks under every strategy: they learn as one process does, and save what plain libraries load."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ftpipe import cli, costs, launch, pipeline, schema
from ftpipe.artifacts import Artifact
from ftpipe.choices import Strategy
from ftpipe.config import RunConfig

pytestmark = pytest.mark.slow

RANKS = Path(__file__).resolve().parents[1] / "sharded_ranks.py"
# Rows of unlike lengths, and the last step of an epoch is filled up, so a rank's micro-batches have
# unlike numbers of tokens, pairs and prompts; clipping is in force where the norm is above 1.
BOTH = (
    *("recipe=tiny", "launch.threads=1", "launch.micro_batch_size=1", "data=own", "data.validation=5"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}",
    *("adapter.dropout=0", "sft.samples=1", "sft.sample_tokens=4", "sft.max_steps=4", "sft.log_every=1"),
    *("reward.max_steps=4", "reward.batch_size=4", "reward.log_every=1", "reward.learning_rate=1e-3"),
    *("ppo.batch_size=7", "ppo.max_steps=3", "ppo.max_new_tokens=6", "ppo.ptx_weight=0.1"),
    *("ppo.ignore_gate=true", "ppo.samples=1", "ppo.save_every=1", "ppo.eval_every=1"),
    *("dpo.samples=1", "dpo.sample_tokens=4", "dpo.max_steps=4", "dpo.batch_size=8", "dpo.log_every=1"),
)
WORDS = {
    "lora": (*BOTH, "stages=[prepare,sft,reward,dpo]", "dpo.learning_rate=2e-3"),
    "full": (
        *(*BOTH, "adapter=full", "stages=[prepare,sft,reward,reference,dpo,ppo]"),
        *("sft.learning_rate=1e-3", "dpo.learning_rate=2e-4", "ppo.learning_rate=1e-4"),
    ),
    # sequences of several rows, some of them empty at the end of an epoch
    "packed": (
        *(*BOTH, "stages=[prepare,sft]", "data.packing=true", "data.max_length=512"),
        "sft.batch_size=4",
    ),
}


@dataclass(frozen=True)
class Case:
    """A stage of one of ``WORDS``, split into micro-batches of so many rows."""

    method: str
    stage: str
    micro: int = 1


@dataclass(frozen=True)
class Whole:
    """What one process makes: the artifacts of its stages, by stage, and the configuration."""

    cfg: RunConfig
    made: Mapping[str, Artifact]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Whole]]:
    """Runs of one process, by method, and the folder that all of this happens in."""
    from ftpipe import worker
    from tests.conftest import InProcess

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        patch.setattr(launch, "Popen", InProcess)
        patch.setattr(worker, "die_with_parent", lambda: None)
        patch.setattr(worker, "quiet_libraries", lambda: None)
        found = {}
        for method, words in WORDS.items():
            assert cli.main(["run", *words]) == 0
            (cfg,) = cli.configurations(list(words))
            steps = pipeline.plan(cfg)
            found[method] = Whole(
                cfg, {step.stage.name: step.artifact for step in steps if step.artifact}
            )
        yield found


def run(
    alone: Mapping[str, Whole],
    cases: Sequence[Case],
    strategy: str,
    *words: str,
    ends: Sequence[str] = ("",),
    ranks: int = 2,
    folder: str = "",
) -> dict[Case, Path]:
    """Run stages on several ranks, in one start, from what one process made before them.

    Args:
        ends: of each attempt at a stage, the step that ends it as a kill would; empty: none.
        folder: where they write; one that ended runs left is gone on from.
    """
    jobs: dict[Case, Path] = {}
    outs: dict[Case, Path] = {}
    for case in cases:
        (cfg,) = cli.configurations(
            [
                *(*WORDS[case.method], f"launch.processes={ranks}", f"launch.strategy={strategy}"),
                *(f"launch.micro_batch_size={case.micro}", *words),
            ]
        )
        run_folder = pipeline.write_run(cfg, schema.dump(cfg))
        step = next(one for one in pipeline.plan(cfg, case.stage) if one.stage.name == case.stage)
        name = f"{case.method}-{case.stage}-{case.micro}"
        outs[case] = Path("sharded", folder or strategy, name).resolve()
        outs[case].mkdir(parents=True, exist_ok=True)
        made = alone[case.method].made
        job = {
            "stage": case.stage,
            "run": str(run_folder),
            "inputs": {kind: str(made[maker].path) for kind, maker in step.inputs.items()},
            "out": str(outs[case]),
        }
        jobs[case] = outs[case].with_suffix(".job.json")
        jobs[case].write_text(json.dumps(job))
    command = launch.launch_command(cfg, ranks, run_folder / "accelerate.yaml", jobs[case])
    attempts = [f"{job}:{end}".rstrip(":") for job in jobs.values() for end in ends]
    started = command.index("-m" if ranks == 1 else "--module")  # by python itself, or by a launcher
    command = [*command[:started], str(RANKS), *attempts]
    environment = launch.environment(cfg, ranks)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for out in outs.values():
        finished = (out / launch.RESULT).is_file()
        assert finished is (ends[-1] == ""), done.stdout[-2000:] + done.stderr[-3000:]
    return outs


def curve(folder: Path, stage: str, name: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[f"{stage}/{name}"] for line in lines if f"{stage}/{name}" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


LOADERS: dict[Case, Any] = {
    **{Case("lora", stage): AutoPeftModelForCausalLM for stage in ("sft", "dpo")},
    **{Case("full", stage): AutoModelForCausalLM for stage in ("sft", "dpo", "ppo")},
    Case("lora", "reward"): AutoPeftModelForSequenceClassification,
    Case("full", "reward"): AutoModelForSequenceClassification,
}
ALL = tuple(LOADERS)
# Every strategy with all weights and with an adapter, every stage under zero3 and fsdp (ppo: below).
TRIED = {
    Strategy.zero1: (Case("full", "sft"), Case("lora", "reward")),
    Strategy.zero2: (Case("full", "sft"), Case("lora", "sft"), Case("full", "dpo")),
    Strategy.zero3: (Case("full", "sft"), Case("lora", "dpo"), Case("full", "reward")),
    Strategy.fsdp: (
        Case("lora", "sft"),
        Case("full", "reward"),
        Case("lora", "dpo"),
        Case("full", "ppo"),
    ),
}


@pytest.mark.parametrize("strategy", TRIED)
def test_two_ranks_learn_as_one_process_does(alone: dict[str, Whole], strategy: Strategy) -> None:
    # ZeRO's checkpoints serve as many ranks as wrote them: these stages are ended once, and go on
    ended = strategy is Strategy.zero3
    saving = ("sft.save_every=2", "dpo.save_every=2", "reward.save_every=2") if ended else ()
    outs = run(alone, TRIED[strategy], strategy, *saving, ends=("2", "") if ended else ("",))
    for case, out in outs.items():
        one = alone[case.method].made[case.stage].path
        same(case, out, one)
        if case == Case("full", "sft") or (case, strategy) == (Case("full", "reward"), Strategy.fsdp):
            as_computed(strategy, sum(map(torch.numel, weights(one).values())), out)


def as_computed(strategy: Strategy, trained: int, out: Path) -> None:
    """Compare what each rank held with what ``costs`` says of so many weights."""
    computed = costs.states(strategy, trained, 0, 2)
    for rank in range(2):
        held = json.loads((out / f"held-{rank}.json").read_text())
        assert held["weights"] == pytest.approx(computed.weights, rel=0.01)
        assert held["optimizer"] == pytest.approx(computed.optimizer, rel=0.01)


def same(case: Case, out: Path, one: Path) -> None:
    """Compare losses, gradient norms, held-out measures and weights; load what is saved."""
    names = (
        ("policy_loss", "policy_grad_norm", "score") if case.stage == "ppo" else ("loss", "grad_norm")
    )
    for name in names:
        ours, theirs = curve(out, case.stage, name), curve(one, case.stage, name)
        assert len(theirs) >= 3 and all(map(math.isfinite, theirs))
        assert ours == pytest.approx(theirs, rel=1e-4), (case, name)
    first, second = weights(one), weights(out)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert weight.dtype is second[name].dtype
        assert (weight - second[name]).abs().max() < 5e-4, (case, name)
    options = {"num_labels": 1} if case.stage == "reward" else {}
    LOADERS[case].from_pretrained(str(out), **options)
    before = json.loads((one / "manifest.json").read_text())["metrics"]
    after = json.loads((out / launch.RESULT).read_text())["metrics"]
    held_out = {name for name in before if name.startswith("held_out")}
    assert held_out and {name: after[name] for name in held_out} == pytest.approx(
        {name: before[name] for name in held_out}, rel=1e-3, abs=1e-4
    )
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".distcp")]


def test_what_two_ranks_of_fsdp_left_four_go_on_from(alone: dict[str, Whole]) -> None:
    cases = [Case("full", "sft"), Case("full", "ppo")]
    run(alone, cases, Strategy.fsdp, "sft.save_every=2", ends=("2",), folder="ended")
    outs = run(alone, cases, Strategy.fsdp, "sft.save_every=2", folder="ended", ranks=4)
    for case, out in outs.items():
        same(case, out, alone[case.method].made[case.stage].path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_the_same_however_its_batch_is_split(alone: dict[str, Whole], ranks: int) -> None:
    # ranks x accumulation x packing x stage: a rank accumulates as many micro-batches as are left to it
    stages = (("lora", "sft"), ("packed", "sft"), ("lora", "reward"), ("lora", "dpo"))
    cases = [Case(*one, micro=micro) for one in stages for micro in (1, 2) if ranks == 2 or micro == 2]
    outs = run(alone, cases, Strategy.ddp, ranks=ranks, folder=f"split-{ranks}")
    for case, out in outs.items():
        one = alone[case.method].made[case.stage].path
        for name in ("loss", "grad_norm"):
            found, expected = curve(out, case.stage, name), curve(one, case.stage, name)
            assert len(expected) == 4
            assert found == pytest.approx(expected, rel=1e-4), (case, name)
