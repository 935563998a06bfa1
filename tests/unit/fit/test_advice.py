"""What is advised fits by the formulas, and nothing that is less of a change does."""

from __future__ import annotations

from itertools import combinations as choices_of
from itertools import product
from typing import Any

import pytest

from ftpipe import combinations
from ftpipe.choices import Gpu, Method, Optimizer, Precision, Strategy
from ftpipe.config import RunConfig
from ftpipe.fit import advice, memory
from ftpipe.fit.gpus import CARDS
from ftpipe.fit.model import model_of
from ftpipe.fit.training import training_of
from tests.unit.fit.made import run


def need(cfg: RunConfig, stage: str) -> float:
    return memory.peak(training_of(cfg, stage, model_of(cfg.model), gpu=True)).total


CASES: list[tuple[str, Gpu, dict[str, Any]]] = [
    ("sft", Gpu.h100, {}),
    ("sft", Gpu.a100_40g, {}),
    ("sft", Gpu.rtx_4090, {"adapter__method": Method.lora}),
    ("sft", Gpu.a10g, {"adapter__method": Method.qlora, "launch__micro_batch_size": 16}),
    ("dpo", Gpu.a100_80g, {"stages": ["prepare", "sft", "dpo"]}),
    ("ppo", Gpu.rtx_4090, {"adapter__method": Method.qlora, "stages": ["prepare", "sft", "ppo"]}),
    ("sft", Gpu.a100_40g, {"launch__processes": 8, "sft__batch_size": 64}),
]


@pytest.mark.parametrize(("stage", "gpu", "changed"), CASES)
def test_what_is_advised_fits_and_nothing_smaller_does(
    stage: str, gpu: Gpu, changed: dict[str, Any]
) -> None:
    cfg = run(**changed)
    cfg.ppo.batch_size = 512
    usable = CARDS[gpu].usable
    assert need(cfg, stage) > usable
    found = advice.advise(cfg, stage, model_of(cfg.model), usable)
    assert found.change
    then = advice.changed_by(cfg, found.change)
    then.check()
    combinations.check(then, [stage], elsewhere=True)
    assert need(then, stage) == found.total <= usable
    # fewer of its keys are not enough
    keys = list(found.change)
    for size in range(len(keys)):
        for chosen in choices_of(keys, size):
            less = {key: found.change[key] for key in chosen}
            assert need(advice.changed_by(cfg, less), stage) > usable, less
    # nor is a smaller degree of the last one
    rows = found.change.get("launch.micro_batch_size")
    if rows is not None:
        more = {**found.change, "launch.micro_batch_size": 2 * rows}
        assert need(advice.changed_by(cfg, more), stage) > usable


def test_the_same_weights_are_trained_where_that_can_be() -> None:
    # by hand: every other way to train all weights on this GPU is more than the advice
    cfg, usable = run(), CARDS[Gpu.h100].usable
    found = advice.advise(cfg, "sft", model_of(cfg.model), usable)
    assert "adapter.method" not in found.change
    free = {
        "launch.micro_batch_size": (4, 2, 1),
        "sft.gradient_checkpointing": (False, True),
        "sft.optimizer": (Optimizer.adamw, Optimizer.paged_adamw_32bit, Optimizer.paged_adamw_8bit),
    }
    fits = [
        sum(value != values[0] for value, values in zip(chosen, free.values(), strict=True))
        for chosen in product(*free.values())
        if need(advice.changed_by(cfg, dict(zip(free, chosen, strict=True))), "sft") <= usable
    ]
    assert min(fits) == len(found.change)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        (Strategy.ddp, Precision.bf16),
        (Strategy.ddp, Precision.fp16),
        (Strategy.zero1, Precision.bf16),
        (Strategy.zero2, Precision.bf16),
    ],
)
def test_weights_are_shared_out_before_training_is_given_up(
    strategy: Strategy, precision: Precision
) -> None:
    # LLaMA-13B in all weights: 52 GB of them on every rank under ZeRO-2
    ranks: dict[str, Any] = {
        "launch__processes": 8,
        "sft__batch_size": 128,
        "launch__precision": precision,
    }
    cfg = run(**ranks, launch__strategy=strategy, sft__gradient_checkpointing=True)
    cfg.model.architecture |= {"hidden_size": 5120, "intermediate_size": 13824}
    cfg.model.architecture |= {"num_hidden_layers": 40, "num_attention_heads": 40}
    found = advice.advise(cfg, "sft", model_of(cfg.model), CARDS[Gpu.a100_80g].usable)
    shared = {"launch.strategy": Strategy.zero3}
    scale = {"launch.precision": Precision.bf16} if precision is Precision.fp16 else {}
    assert found.change == shared | scale


def test_more_gpus_are_advised_where_one_cannot_do() -> None:
    cfg = run(launch__micro_batch_size=1, sft__batch_size=64, sft__gradient_checkpointing=True)
    cfg.model.architecture |= {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 22016}
    # 4 bits of 65 billion weights are 34 GB
    usable = 30.0 * 2**30
    found = advice.advise(cfg, "sft", model_of(cfg.model), usable)
    assert found.change["launch.processes"] > 1
    assert found.change["launch.strategy"] is Strategy.fsdp
    fewer = {**found.change, "launch.processes": found.change["launch.processes"] // 2}
    assert need(advice.changed_by(cfg, fewer), "sft") > usable >= found.total


def test_where_nothing_does_it_says_how_far_it_comes() -> None:
    cfg = run()
    found = advice.advise(cfg, "sft", model_of(cfg.model), 1.0)
    assert not found.change and 0 < found.total < need(cfg, "sft")


def test_the_words_of_an_advice_are_those_of_a_command_line() -> None:
    told = advice.Advice({"sft.gradient_checkpointing": True, "adapter.method": Method.qlora}, 1.0)
    assert told.words == "sft.gradient_checkpointing=true adapter.method=qlora"
