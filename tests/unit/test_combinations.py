"""Every combination that is refused: said in a sentence, in the plan, and only where it is there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from ftpipe import combinations, pipeline
from ftpipe.choices import (
    Determinism,
    Device,
    Dtype,
    Method,
    Offload,
    Optimizer,
    Precision,
    PreferenceLoss,
    Strategy,
)
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.slurm_config import StageJobConfig


@pytest.fixture
def shared(cfg: RunConfig) -> RunConfig:
    """A configuration of two ranks that every strategy takes."""
    cfg.launch.processes = 2
    return cfg


def put(cfg: RunConfig, **values: object) -> None:
    for key, value in values.items():
        *parts, last = key.split("__")
        part: object = cfg
        for name in parts:
            part = getattr(part, name)
        assert hasattr(part, last), key
        setattr(part, last, value)


Z = (Strategy.zero1, Strategy.zero2, Strategy.zero3)
ALL = tuple(Strategy)
BNB = (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit, Optimizer.paged_adamw_32bit)

# name, stage, values, the strategies that refuse them, and words of the sentence. The others take them.
Row = tuple[str, dict[str, object], tuple[Strategy, ...], str]
BYTES: list[Row] = [
    ("reward", {"reward__optimizer": one}, (*Z, Strategy.fsdp), "reward.optimizer=adamw") for one in BNB
]
CASES: list[Row] = [
    ("sft", {}, (), ""),
    ("sft", {"launch__processes": 1}, (*Z, Strategy.fsdp), "nobody to share with"),
    ("sft", {"launch__precision": Precision.fp16}, (*Z, Strategy.fsdp), "launch.precision=bf16"),
    ("sft", {"launch__precision": Precision.bf16}, (), ""),
    ("sft", {"adapter__method": Method.qlora}, (Strategy.zero3, Strategy.fsdp), "zero2 or ddp"),
    ("sft", {"adapter__method": Method.lora}, (), ""),
    *BYTES,
    ("dpo", {"dpo__optimizer": Optimizer.adafactor}, (*Z, Strategy.fsdp), "rows and columns"),
    ("sft", {"sft__optimizer": Optimizer.sgd}, (), ""),
    ("sft", {"sft__optimizer": Optimizer.rmsprop}, (), ""),
    ("sft", {"dpo__optimizer": Optimizer.adafactor}, (), ""),  # of a stage that is not there
    ("sft", {"model__dtype": Dtype.bfloat16}, Z, "float32 copy"),
    ("sft", {"model__dtype": Dtype.float32}, (), ""),
    ("sft", {"adapter__method": Method.lora, "model__dtype": Dtype.bfloat16}, (), ""),
    ("sft", {"adapter__method": Method.lora, "adapter__dtype": Dtype.bfloat16}, Z, "float32 copy"),
    (
        "sft",
        {"launch__sharding__offload_optimizer": Offload.cpu},
        (Strategy.ddp, Strategy.fsdp),
        "only ZeRO offloads",
    ),
    (
        "sft",
        {"launch__sharding__offload_parameters": Offload.cpu},
        (Strategy.ddp, Strategy.zero1, Strategy.zero2, Strategy.fsdp),
        "",  # several rows
    ),
    (
        "sft",
        {"launch__sharding__offload_parameters": Offload.cpu, "launch__device": Device.cuda},
        (Strategy.ddp, Strategy.zero1, Strategy.zero2),
        "every rank holds all weights",
    ),
    (
        "sft",
        {"launch__offload_activations": True, "launch__device": Device.cuda},
        ALL,
        "no stage of this run does it",
    ),
    (
        "sft",
        {"launch__offload_activations": True, "sft__gradient_checkpointing": True},
        ALL,
        "in host memory already",
    ),
    (
        "sft",
        {
            "launch__offload_activations": True,
            "sft__gradient_checkpointing": True,
            "launch__device": Device.cuda,
        },
        (),
        "",
    ),
    (
        "sft",
        {"adapter__method": Method.lora, "model__new_tokens": ["<a>"]},
        (Strategy.zero3, Strategy.fsdp),
        "rows of new tokens",
    ),
    ("sft", {"model__new_tokens": ["<a>"]}, (), ""),
    (
        "sft",
        {"adapter__method": Method.lora, "adapter__dora": True},
        (Strategy.zero3, Strategy.fsdp),
        "the length of whole rows",
    ),
    ("dpo", {}, (Strategy.zero3,), "put 'reference' before 'dpo'"),
    ("dpo", {"stages": ["prepare", "sft", "reference", "dpo"]}, (), ""),
    ("dpo", {"adapter__method": Method.lora}, (), ""),
    ("dpo", {"dpo__loss": PreferenceLoss.simpo}, (), ""),
    ("sft", {"determinism": Determinism.strict, "launch__threads": 1}, (), ""),
    ("sft", {"determinism": Determinism.strict, "launch__device": Device.cuda}, (), ""),
    ("ppo", {}, Z, "one model"),
    ("ppo", {"adapter__method": Method.lora}, (*Z, Strategy.fsdp), "ddp"),
]


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize(("stage", "values", "refused", "words"), CASES)
def test_what_does_not_go_together_is_refused_and_the_rest_is_not(
    shared: RunConfig,
    strategy: Strategy,
    stage: str,
    values: dict[str, object],
    refused: tuple[Strategy, ...],
    words: str,
) -> None:
    put(shared, launch__strategy=strategy, **values)
    if strategy not in refused:
        combinations.check(shared, ["prepare", stage])
        return
    with pytest.raises(ConfigError) as said:
        combinations.check(shared, ["prepare", stage])
    sentence = str(said.value)
    assert sentence.startswith("launch.") and f" in the stage '{stage}': " in sentence
    assert words in sentence and sentence.endswith(".") and "STAGE" not in sentence.split(": ")[0]


SERVER: dict[str, object] = {"launch__threads": 1, "evolve__url": "http://[::1]/v1"}
JUDGE = {key.replace("evolve__", "evaluate__judge__"): value for key, value in SERVER.items()}
STRICT: list[Row] = [
    ("sft", {"determinism": Determinism.strict}, ALL, "launch.threads=None"),
    ("evolve", {"determinism": Determinism.strict, **SERVER}, ALL, "not in this run's hands"),
    ("evaluate", {"determinism": Determinism.strict, **JUDGE}, ALL, "not in this run's hands"),
]


@pytest.mark.parametrize(("stage", "values", "_", "words"), STRICT)
def test_strict_refuses_what_nobody_can_fix(
    cfg: RunConfig, stage: str, values: dict[str, object], _: object, words: str
) -> None:
    put(cfg, **values)
    with pytest.raises(ConfigError, match=f"^determinism=strict, .*{words}"):
        combinations.check(cfg, [stage])
    cfg.determinism = Determinism.seeded
    combinations.check(cfg, [stage])


def test_a_disk_is_for_zero3_alone_and_must_be_there(
    shared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combinations, "_aio", lambda: True)
    put(
        shared,
        launch__sharding__offload_optimizer=Offload.nvme,
        launch__sharding__nvme=str(tmp_path),
        launch__strategy=Strategy.zero3,
    )
    combinations.check(shared, ["sft"])
    shared.launch.sharding.nvme = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^launch\.sharding\.nvme=.*nowhere .*no such folder"):
        combinations.check(shared, ["sft"])
    shared.launch.sharding.nvme = str(tmp_path)
    monkeypatch.setattr(combinations, "_aio", lambda: False)
    with pytest.raises(ConfigError, match=r"libaio, g\+\+ or ninja is missing"):
        combinations.check(shared, ["sft"])
    monkeypatch.setattr(combinations, "_aio", lambda: True)
    for strategy in (Strategy.zero1, Strategy.zero2):
        shared.launch.strategy = strategy
        with pytest.raises(ConfigError, match=r"with ZeRO-3 alone"):
            combinations.check(shared, ["sft"])
    put(
        shared,
        launch__strategy=Strategy.fsdp,
        launch__sharding__offload_optimizer=Offload.none,
        launch__sharding__offload_parameters=Offload.nvme,
    )
    with pytest.raises(ConfigError, match=r"host memory alone"):
        combinations.check(shared, ["sft"])


def test_what_this_machine_lacks_is_of_no_account_elsewhere(shared: RunConfig) -> None:
    put(
        shared,
        launch__sharding__offload_optimizer=Offload.nvme,
        launch__sharding__nvme="/nowhere",
        launch__strategy=Strategy.zero3,
    )
    combinations.check(shared, ["sft"], elsewhere=True)
    with pytest.raises(ConfigError):
        combinations.check(shared, ["sft"])


def test_ranks_are_those_of_the_stages_own_nodes(shared: RunConfig) -> None:
    put(shared, launch__strategy=Strategy.zero2, launch__processes=1, launch__nodes=1)
    shared.launch.slurm.stages = {"sft": StageJobConfig(nodes=2)}
    combinations.check(shared, ["sft"])
    with pytest.raises(ConfigError, match="in the stage 'dpo': one process has nobody"):
        combinations.check(shared, ["dpo"])


def test_it_is_decided_in_the_plan_and_only_for_its_stages(shared: RunConfig) -> None:
    put(shared, launch__strategy=Strategy.zero3, adapter__method=Method.qlora)
    with pytest.raises(ConfigError) as said:
        pipeline.plan(shared)
    assert str(said.value).startswith(
        "launch.strategy=zero3, adapter.method=qlora in the stage 'sft': ZeRO-3 cuts weights"
    )
    pipeline.plan(shared, "prepare")  # which trains nothing


def test_every_row_is_tried_here(shared: RunConfig) -> None:
    disks: list[Row] = [
        ("sft", {"launch__sharding__nvme": "/nowhere", f"launch__sharding__{key}": Offload.nvme}, (), "")
        for key in ("offload_optimizer", "offload_parameters")
    ]
    met = set()
    for stage, values, _, _ in [*CASES, *STRICT, *disks]:
        for strategy in ALL:
            cfg = copy.deepcopy(shared)
            put(cfg, launch__strategy=strategy, **values)
            met |= {row for row in combinations.REFUSED if stage in row.stages and row.when(cfg, stage)}
    assert [row.why for row in combinations.REFUSED if row not in met] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"launch__sharding__offload_optimizer": Offload.nvme}, "launch.sharding.nvme is not set"),
        ({"launch__sharding__nvme": "/scratch"}, "would be read by nothing"),
        ({"launch__sharding__bucket": 999}, "launch.sharding.bucket=999"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_themselves(
    shared: RunConfig, values: dict[str, object], words: str
) -> None:
    put(shared, **values)
    with pytest.raises(ConfigError) as said:
        shared.check()
    assert words in str(said.value)
