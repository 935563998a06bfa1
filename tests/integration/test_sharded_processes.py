"""Two ranks under every strategy: they learn as one process does, and save what plain libraries load."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ftpipe import cli, launch, pipeline, schema
from ftpipe.artifacts import Artifact
from ftpipe.choices import Strategy
from ftpipe.config import RunConfig

pytestmark = pytest.mark.slow

RANKS = Path(__file__).resolve().parents[1] / "sharded_ranks.py"
# Rows of unlike lengths, in steps of 8 (dpo: 6, the last step of an epoch is filled up), so a rank's
# micro-batches have unlike numbers of tokens; clipping is in force where the norm is above 1.
BOTH = (
    *("recipe=tiny", "launch.threads=1", "launch.micro_batch_size=1", "data=own", "data.validation=5"),
    "data.sources={p: {format: preference, path: 'sample:preference.jsonl', "
    "use: [preferences, demonstrations, prompts]}}",
    *("adapter.dropout=0", "sft.samples=1", "sft.sample_tokens=4", "sft.max_steps=4", "sft.log_every=1"),
    *("reward.max_steps=4", "reward.batch_size=4", "reward.log_every=1", "reward.learning_rate=1e-3"),
    *("ppo.batch_size=7", "ppo.max_steps=3", "ppo.max_new_tokens=6", "ppo.ptx_weight=0.1"),
    *("ppo.ignore_gate=true", "ppo.samples=1", "ppo.save_every=1", "ppo.eval_every=1"),
    *("dpo.samples=1", "dpo.sample_tokens=4", "dpo.max_steps=4", "dpo.batch_size=6", "dpo.log_every=1"),
)
WORDS = {
    "lora": (*BOTH, "stages=[prepare,sft,reward,dpo]", "dpo.learning_rate=2e-3"),
    "full": (
        *(*BOTH, "adapter=full", "stages=[prepare,sft,reward,reference,dpo,ppo]"),
        *("sft.learning_rate=1e-3", "dpo.learning_rate=2e-4", "ppo.learning_rate=1e-4"),
    ),
}


@dataclass(frozen=True)
class Case:
    method: str
    stage: str


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


def run(alone: Mapping[str, Whole], cases: list[Case], strategy: str, *words: str) -> dict[Case, Path]:
    """Run stages on two ranks, in one start, from what one process made before them."""
    jobs: dict[Case, Path] = {}
    outs: dict[Case, Path] = {}
    for case in cases:
        (cfg,) = cli.configurations(
            [*WORDS[case.method], "launch.processes=2", f"launch.strategy={strategy}", *words]
        )
        run_folder = pipeline.write_run(cfg, schema.dump(cfg))
        step = next(step for step in pipeline.plan(cfg, case.stage) if step.stage.name == case.stage)
        outs[case] = Path("sharded", strategy, f"{case.method}-{case.stage}").resolve()
        outs[case].mkdir(parents=True)
        made = alone[case.method].made
        job = {
            "stage": case.stage,
            "run": str(run_folder),
            "inputs": {kind: str(made[maker].path) for kind, maker in step.inputs.items()},
            "out": str(outs[case]),
        }
        jobs[case] = outs[case].with_suffix(".job.json")
        jobs[case].write_text(json.dumps(job))
    command = launch.launch_command(cfg, 2, run_folder / "accelerate.yaml", next(iter(jobs.values())))
    command = [*command[: command.index("--module")], str(RANKS), *map(str, jobs.values())]

    done = subprocess.run(
        command,
        env=launch.environment(cfg, 2),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for out in outs.values():
        assert (out / launch.RESULT).is_file(), done.stdout[-2000:] + done.stderr[-3000:]
    return outs


def curve(folder: Path, stage: str, name: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[f"{stage}/{name}"] for line in lines if f"{stage}/{name}" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


CASES = [Case(method, stage) for stage in ("sft", "reward", "dpo") for method in ("lora", "full")]
LOADERS: dict[Case, Any] = {
    **{Case("lora", stage): AutoPeftModelForCausalLM for stage in ("sft", "dpo")},
    **{Case("full", stage): AutoModelForCausalLM for stage in ("sft", "dpo")},
    Case("lora", "reward"): AutoPeftModelForSequenceClassification,
    Case("full", "reward"): AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("strategy", list(Strategy))
def test_two_ranks_learn_as_one_process_does(alone: dict[str, Whole], strategy: Strategy) -> None:
    outs = run(alone, CASES, strategy)
    for case, out in outs.items():
        one = alone[case.method].made[case.stage].path
        for name in ("loss", "grad_norm"):
            ours, theirs = curve(out, case.stage, name), curve(one, case.stage, name)
            assert len(theirs) == 4 and all(map(math.isfinite, theirs))
            assert ours == pytest.approx(theirs, rel=1e-4), (case, name)
        first, second = weights(one), weights(out)
        assert first.keys() == second.keys()
        for name, weight in first.items():
            assert weight.dtype is second[name].dtype
            assert (weight - second[name]).abs().max() < 5e-4, (case, name)
        options = {"num_labels": 1} if case.stage == "reward" else {}
        LOADERS[case].from_pretrained(str(out), **options)
        before, after = (
            json.loads((at / file).read_text())["metrics"]
            for at, file in ((one, "manifest.json"), (out, launch.RESULT))
        )
        for name in {"held_out_loss", "held_out_loss_before", "held_out_accuracy"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=1e-4), (case, name)
