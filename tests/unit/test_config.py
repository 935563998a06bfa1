"""Values that cannot work are refused with the name of their key; those at the edge are not."""

from __future__ import annotations

import functools
import typing
from typing import Any

import pytest

from ftpipe import schema
from ftpipe.choices import (
    Algorithm,
    Dtype,
    Init,
    Optimizer,
    Precision,
    PreferenceLoss,
    RewardKind,
    Role,
    Scheduler,
    Use,
    ValueStart,
)
from ftpipe.commits import is_commit
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.schema import all_keys
from ftpipe.slurm_config import StageJobConfig

COMMIT = "4782ad278652c7c71b72204d462d6d01eaaf7549"

# Of what every training stage has.
BAD_TRAINING: list[tuple[str, Any]] = [
    ("learning_rate", 0.0),
    ("epochs", 0.0),
    ("max_steps", 0),
    ("batch_size", 0),
    ("adam_beta1", 1.0),
    ("adam_beta2", -0.1),
    ("adam_epsilon", 0.0),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("warmup_ratio", 1.0),
    ("warmup_steps", -1),
    ("log_every", 0),
    ("eval_every", -1),
    ("save_every", -1),
    ("keep_checkpoints", 0),
]

BAD: list[tuple[str, Any]] = [
    ("seed", -1),
    ("seed", 2**32),
    ("model.revision", "main"),
    ("model.revision", COMMIT[:39]),
    ("model.revision", COMMIT + "0"),
    ("model.revision", "g" * 40),
    ("model.tokenizer_revision", "v1.0"),
    ("adapter.r", 0),
    ("adapter.alpha", 0),
    ("adapter.dropout", -0.1),
    ("adapter.dropout", 1.0),
    ("adapter.quantization", "int4"),
    ("adapter.targets", []),
    ("adapter.dtype", Dtype.auto),
    ("data.sources.mine.revision", "main"),
    ("data.sources.mine.rows", 0),
    ("data.sources.mine.top_k", 0),
    ("data.sources.mine.count", 0),
    ("data.sources.mine.weight", 0.0),
    ("data.sources.mine.weight", 101.0),
    ("data.sources.mine.weight", float("nan")),
    ("data.sources.mine.use", [Use.preferences]),
    ("data.max_skipped", -0.01),
    ("data.max_skipped", 1.01),
    ("data.near_duplicates", 0.3),
    ("data.near_duplicates", 1.01),
    ("data.ngram", 4),
    ("data.ngram", 101),
    ("data.max_length", 7),
    ("data.max_lost", -0.01),
    ("data.max_lost", 1.01),
    ("data.validation", -0.1),
    ("data.validation", 1.5),
    ("data.validation", float("nan")),
    ("data.validation", float("inf")),
    ("data.learn", []),
    ("sft.learning_rate", 0.0),
    ("sft.learning_rate", -1e-5),
    ("sft.learning_rate", float("nan")),
    ("sft.learning_rate", float("inf")),
    ("sft.epochs", 0.0),
    ("sft.epochs", float("inf")),
    ("sft.max_steps", 0),
    ("sft.batch_size", 0),
    ("sft.adam_beta1", -0.1),
    ("sft.adam_beta1", 1.0),
    ("sft.adam_beta2", -0.1),
    ("sft.adam_beta2", 1.0),
    ("sft.adam_epsilon", 0.0),
    ("sft.weight_decay", -0.1),
    ("sft.max_grad_norm", -1.0),
    ("sft.warmup_ratio", -0.1),
    ("sft.warmup_ratio", 1.0),
    ("sft.warmup_steps", -1),
    ("sft.neftune_alpha", 0.0),
    ("sft.log_every", 0),
    ("sft.eval_every", -1),
    ("sft.save_every", -1),
    ("sft.keep_checkpoints", 0),
    ("sft.samples", -1),
    ("sft.sample_tokens", 0),
    *((f"{group}.{key}", value) for group in ("reward", "dpo", "ppo") for key, value in BAD_TRAINING),
    ("reward.margin", -0.1),
    ("reward.l2", -0.001),
    ("reward.l2", float("nan")),
    ("reward.center", -0.01),
    ("reward.ensemble", 0),
    ("reward.ensemble", 17),
    ("reward.gate.confidence", 0.49),
    ("reward.gate.confidence", 1.0),
    ("reward.gate.min_accuracy", -0.1),
    ("reward.gate.min_accuracy", 1.1),
    ("reward.gate.max_length_correlation", -0.1),
    ("reward.gate.max_length_correlation", 1.1),
    ("dpo.beta", 0.0),
    ("dpo.beta", float("nan")),
    ("dpo.label_smoothing", -0.1),
    ("dpo.label_smoothing", 0.5),
    ("dpo.gamma", -0.1),
    ("dpo.discopop_tau", 0.0),
    ("dpo.desirable_weight", 0.0),
    ("dpo.undesirable_weight", 0.0),
    ("dpo.sft_weight", -0.1),
    ("dpo.r", 0),
    ("dpo.alpha", 0),
    ("dpo.samples", -1),
    ("dpo.sample_tokens", 0),
    *((f"ppo.{key}", 0) for key in ("max_new_tokens", "ppo_epochs", "minibatches", "kl_horizon")),
    *((f"ppo.{key}", -0.1) for key in ("beta", "value_weight", "entropy_weight", "ptx_weight")),
    *((f"ppo.{key}", 0.0) for key in ("value_learning_rate", "value_clip", "kl_target", "target_kl")),
    *((f"ppo.{key}", float("nan")) for key in ("value_learning_rate", "value_clip", "kl_target")),
    *((f"ppo.{key}", value) for key in ("gamma", "lam") for value in (-0.1, 1.1)),
    *((f"ppo.{key}", value) for key in ("clip", "top_p") for value in (0.0, 1.1)),
    ("ppo.clip", 1.0),
    ("ppo.temperature", 0.0),
    ("ppo.samples", -1),
    ("ppo.generation_batch_size", 0),
    ("ppo.missing_eos_penalty", -1.0),
    ("ppo.missing_eos_penalty", float("nan")),
    ("ppo.score_clip", 0.0),
    ("ppo.group_by_length", True),
    ("ppo.minibatches", 5),
    ("ppo.answers_per_prompt", 0),
    ("ppo.health.max_kl", 0.0),
    ("ppo.health.min_entropy", 1.0),
    ("ppo.health.min_eos_rate", 0.0),
    ("ppo.health.patience", 0),
    ("launch.processes", 0),
    ("launch.nodes", 0),
    ("launch.timeout_minutes", 0.0),
    ("launch.timeout_minutes", float("inf")),
    ("launch.gpu_price", -0.5),
    ("launch.utilization", 0.0),
    ("launch.utilization", 1.5),
    ("launch.slurm.gpus", -1),
    ("launch.slurm.cpus", 0),
    ("launch.slurm.warning_seconds", -1),
    ("launch.slurm.stages.sft.nodes", 0),
    ("launch.slurm.stages.sft.gpus", -1),
    ("launch.slurm.stages.sft.cpus", 0),
    ("launch.micro_batch_size", 0),
    ("launch.threads", 0),
    ("launch.workers", 0),
    ("launch.sharding.bucket", 999),
]

FINE: list[tuple[str, Any]] = [
    ("seed", 0),
    ("seed", 2**32 - 1),
    ("name", "é_b-c.d+1"),
    ("model.revision", COMMIT),
    ("model.tokenizer_revision", COMMIT),
    ("adapter.r", 1),
    ("adapter.alpha", 1),
    ("adapter.dropout", 0.0),
    ("adapter.dropout", 0.999),
    ("adapter.quantization", "fp4"),
    ("adapter.targets", ["q_proj"]),
    ("adapter.dtype", Dtype.bfloat16),
    ("data.sources.mine.revision", COMMIT),
    ("data.sources.mine.rows", 1),
    ("data.sources.mine.top_k", 1),
    ("data.sources.mine.count", 1),
    ("data.sources.mine.weight", 0.01),
    ("data.sources.mine.weight", 100.0),
    ("data.sources.mine.use", [Use.prompts, Use.demonstrations]),
    ("data.max_skipped", 0.0),
    ("data.max_skipped", 1.0),
    ("data.near_duplicates", None),
    ("data.near_duplicates", 1.0),
    ("data.ngram", 5),
    ("data.ngram", 100),
    ("data.max_lost", None),
    ("launch.workers", 1),
    ("data.max_length", 8),
    ("data.max_lost", 0.0),
    ("data.max_lost", 1.0),
    ("data.validation", 0.0),
    ("data.validation", 0.999),
    ("data.validation", 1.0),
    ("data.validation", 2000.0),
    ("data.learn", [Role.system]),
    ("sft.learning_rate", 1e-12),
    ("sft.epochs", 0.1),
    ("sft.max_steps", 1),
    ("sft.max_steps", None),
    ("sft.batch_size", 4),
    ("sft.adam_beta1", 0.0),
    ("sft.adam_beta2", 0.9999),
    ("sft.adam_epsilon", 1e-12),
    ("sft.weight_decay", 0.0),
    ("sft.max_grad_norm", 0.0),
    ("sft.warmup_ratio", 0.0),
    ("sft.warmup_steps", 0),
    ("sft.neftune_alpha", 5.0),
    ("sft.log_every", 1),
    ("sft.eval_every", 0),
    ("sft.save_every", 0),
    ("sft.keep_checkpoints", 1),
    ("sft.samples", 0),
    ("sft.sample_tokens", 1),
    ("sft.optimizer", Optimizer.sgd),
    ("reward.margin", 0.0),
    ("reward.l2", 0.001),
    ("reward.ensemble", 16),
    ("reward.gate.confidence", 0.5),
    ("reward.gate.min_accuracy", 1.0),
    ("reward.gate.max_length_correlation", 0.0),
    ("dpo.beta", 1e-3),
    ("dpo.label_smoothing", 0.499),
    ("dpo.gamma", 0.0),
    ("dpo.sft_weight", 1.0),
    ("dpo.r", 1),
    ("dpo.r", None),
    ("dpo.alpha", None),
    ("dpo.samples", 0),
    ("launch.processes", 2),
    ("launch.nodes", 2),
    ("launch.timeout_minutes", 0.1),
    ("launch.slurm.gpus", 0),
    ("launch.slurm.cpus", 1),
    ("launch.slurm.warning_seconds", 0),
    ("launch.micro_batch_size", 1),
    ("launch.threads", 1),
    ("launch.sharding.bucket", 1000),
]


def put(cfg: RunConfig, key: str, value: Any) -> None:
    """Set a dotted key."""
    *path, last = key.split(".")
    part: Any = cfg
    for name in path:
        part = part[name] if isinstance(part, dict) else getattr(part, name)
    setattr(part, last, value)


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{key}={value}" for key, value in BAD])
def test_a_value_that_cannot_work_is_refused_by_its_key(cfg: RunConfig, key: str, value: Any) -> None:
    cfg.launch.slurm.stages = {"sft": StageJobConfig()}
    cfg.check()
    put(cfg, key, value)
    with pytest.raises(ConfigError) as refused:
        cfg.check()
    assert str(refused.value).startswith(f"{key}={value}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("key", "value"), FINE, ids=[f"{key}={value}" for key, value in FINE])
def test_a_value_at_the_edge_is_accepted(cfg: RunConfig, key: str, value: Any) -> None:
    put(cfg, key, value)
    cfg.check()


def test_every_number_of_the_schema_has_a_bad_value_above() -> None:
    numbers = {int, float, int | None, float | None}
    named = (("sources.mine", "sources.<name>"), ("stages.sft", "stages.<name>"))
    tried = {functools.reduce(lambda key, one: key.replace(*one), named, key) for key, _ in BAD}
    groups = {key.split(".")[0] for key in tried}  # a later stage's group has tests of its own
    untried = [
        key
        for key in all_keys()
        if schema.field_type(key) in numbers and key not in tried and key.split(".")[0] in groups
    ]
    assert untried == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../b", "a b", "a\n", "$(a)", "a\x00"]
)
def test_a_name_is_that_of_one_folder(cfg: RunConfig, name: str) -> None:
    cfg.name = name
    with pytest.raises(ConfigError) as refused:
        cfg.check()
    assert str(refused.value).startswith(f"name={name!r} ")


@pytest.mark.parametrize(
    ("scheduler", "ratio", "steps", "fits"),
    [
        (Scheduler.constant, 0.0, None, True),
        (Scheduler.constant, 0.1, 0, True),  # the steps count, not the ratio
        (Scheduler.constant, 0.1, None, False),
        (Scheduler.constant, 0.0, 5, False),
        (Scheduler.constant_with_warmup, 0.1, None, True),
        (Scheduler.linear, 0.0, 5, True),
    ],
)
def test_a_warm_up_that_the_schedule_would_ignore_is_refused(
    cfg: RunConfig, scheduler: Scheduler, ratio: float, steps: int | None, fits: bool
) -> None:
    # transformers, optimization.py: get_scheduler takes no warm-up for CONSTANT
    cfg.sft.scheduler, cfg.sft.warmup_ratio, cfg.sft.warmup_steps = scheduler, ratio, steps
    if fits:
        cfg.check()
        return
    with pytest.raises(ConfigError, match=r"^sft\.scheduler=constant .*constant_with_warmup"):
        cfg.check()


READS_SMOOTHING = {PreferenceLoss.sigmoid, PreferenceLoss.robust, PreferenceLoss.exo_pair}


@pytest.mark.parametrize("loss", PreferenceLoss)
def test_a_value_that_a_loss_does_not_read_is_refused(cfg: RunConfig, loss: PreferenceLoss) -> None:
    cfg.dpo.loss, cfg.dpo.label_smoothing = loss, 0.1
    if loss in READS_SMOOTHING:
        cfg.check()
    else:
        said = rf"^dpo\.label_smoothing=0\.1 .*0 for {loss}, which does not read it"
        with pytest.raises(ConfigError, match=said):
            cfg.check()
    cfg.dpo.label_smoothing = 0.0
    if loss is PreferenceLoss.exo_pair:  # its logarithm of 0
        with pytest.raises(ConfigError, match=r"^dpo\.label_smoothing=0\.0 .*in \(0, 0\.5\)"):
            cfg.check()
        cfg.dpo.label_smoothing = 1e-3
    cfg.check()
    cfg.dpo.sft_weight = 1.0
    if loss is PreferenceLoss.kto:
        with pytest.raises(ConfigError, match=r"^dpo\.sft_weight=1\.0 .*no chosen reply"):
            cfg.check()
    else:
        cfg.check()


@pytest.mark.parametrize("group", ["reward", "dpo"])
def test_the_batch_of_a_stage_that_is_run_is_shared_out(cfg: RunConfig, group: str) -> None:
    part = getattr(cfg, group)
    part.batch_size, cfg.launch.micro_batch_size = 6, 4
    cfg.check()  # it is not among the stages
    cfg.stages = ["prepare", group]
    with pytest.raises(ConfigError, match=rf"^{group}\.batch_size=6 is not a multiple of "):
        cfg.check()


@pytest.mark.parametrize(("packing", "grouped"), [(True, True), (True, False), (False, True)])
def test_packed_sequences_have_no_lengths_to_group_by(
    cfg: RunConfig, packing: bool, grouped: bool
) -> None:
    cfg.data.packing, cfg.sft.group_by_length = packing, grouped
    if packing and grouped:
        with pytest.raises(ConfigError, match=r"^sft\.group_by_length=True .*data\.packing"):
            cfg.check()
    else:
        cfg.check()


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "fits"),
    [(16, 4, 1, True), (16, 4, 4, True), (16, 3, 1, False), (16, 4, 3, False), (4, 8, 1, False)],
)
def test_the_batch_is_made_of_whole_micro_batches(
    cfg: RunConfig, batch: int, micro: int, processes: int, fits: bool
) -> None:
    cfg.sft.batch_size, cfg.launch.micro_batch_size, cfg.launch.processes = batch, micro, processes
    if fits:
        cfg.check()
        return
    with pytest.raises(ConfigError, match=r"sft\.batch_size") as refused:
        cfg.check()
    for said in (f"={batch} ", f"launch.micro_batch_size={micro} ", f"launch.processes={processes};"):
        assert said in str(refused.value)


def test_a_batch_is_shared_out_over_nodes(cfg: RunConfig) -> None:
    cfg.sft.batch_size, cfg.launch.micro_batch_size, cfg.launch.processes = 16, 2, 4
    cfg.launch.nodes = 2
    cfg.check()
    cfg.launch.slurm.stages = {"sft": StageJobConfig(nodes=3)}
    with pytest.raises(ConfigError, match=r"^sft\.batch_size=16 .* x launch\.processes=4 x 3 nodes; "):
        cfg.check()
    cfg.sft.batch_size = 24
    cfg.check()
    cfg.stages = ["prepare", "ppo"]
    cfg.ppo.batch_size, cfg.ppo.minibatches = 14, 2
    with pytest.raises(ConfigError, match=r"^ppo\.batch_size=14 .*at least 16"):  # 2 nodes, not 3
        cfg.check()


def test_a_model_needs_a_path_or_an_architecture(cfg: RunConfig) -> None:
    cfg.model.init = Init.pretrained
    with pytest.raises(ConfigError, match=r"^model\.path is not set"):
        cfg.check()
    cfg.model.init = Init.random
    del cfg.model.architecture["model_type"]
    with pytest.raises(ConfigError, match=r"^model\.init=random needs model\.architecture\.model_type"):
        cfg.check()


def test_data_needs_a_source(cfg: RunConfig) -> None:
    cfg.data.sources = {}
    with pytest.raises(ConfigError, match=r"^data\.sources is empty"):
        cfg.check()


@pytest.mark.parametrize("key", ["format", "path"])
def test_a_source_needs_its_format_and_its_path(cfg: RunConfig, key: str) -> None:
    setattr(cfg.data.sources["mine"], key, None)
    with pytest.raises(ConfigError, match=rf"^data\.sources\.mine\.{key} is not set"):
        cfg.check()


@pytest.mark.parametrize(
    ("tokens", "fit"),
    [
        ([], True),
        (["<|prompter|>", "<|assistant|>"], True),
        (["<|prompter|>", ""], False),
        ([" "], False),
        (["<a>", "<b>", "<a>"], False),
    ],
)
def test_new_tokens_are_texts_each_once(cfg: RunConfig, tokens: list[str], fit: bool) -> None:
    cfg.model.new_tokens = tokens
    if fit:
        cfg.check()
    else:
        with pytest.raises(ConfigError, match=r"^model\.new_tokens=\[.* none empty or twice"):
            cfg.check()


@pytest.mark.parametrize(
    ("revision", "is_one"),
    [
        (COMMIT, True),
        ("0" * 40, True),
        ("main", False),
        ("", False),
        (COMMIT.upper(), False),
        (COMMIT[:-1], False),
        (COMMIT + "a", False),
        (f"{COMMIT[:-1]} ", False),
    ],
)
def test_a_commit_is_forty_hex_digits(revision: str, is_one: bool) -> None:
    assert is_commit(revision) is is_one


def test_no_two_configurations_share_a_list() -> None:
    # dataclass defaults that are shared would leak one run's values into the next of a sweep
    one, two = RunConfig(), RunConfig()
    for key in all_keys():
        if typing.get_origin(schema.field_type(key)) in (list, dict):
            parts = key.split(".")
            first: Any = one
            second: Any = two
            for part in parts:
                first, second = getattr(first, part, None), getattr(second, part, None)
            assert first is None or first is not second, key


def test_a_reward_is_named_where_it_is_a_function_and_nowhere_else(cfg: RunConfig) -> None:
    cfg.ppo.reward = RewardKind.function
    with pytest.raises(ConfigError, match=r"^ppo\.function\.name is not set"):
        cfg.check()
    cfg.ppo.function.name = "length"
    cfg.check()
    cfg.ppo.value_start = ValueStart.reward
    with pytest.raises(ConfigError, match=r"^ppo\.value_start=reward .*auto or policy"):
        cfg.check()
    cfg.ppo.reward = RewardKind.model
    with pytest.raises(ConfigError, match=r"^ppo\.function\.name=length .*ppo\.watch\.name"):
        cfg.check()


def test_the_kl_controller_cannot_reach_0(cfg: RunConfig) -> None:
    # Ziegler et al. 2019: beta <- beta (1 + e answers / horizon), e from -0.2
    cfg.ppo.batch_size, cfg.ppo.kl_target, cfg.ppo.kl_horizon = 500, 6.0, 100
    with pytest.raises(ConfigError, match=r"^ppo\.kl_horizon=100 .*above 100, a fifth"):
        cfg.check()
    cfg.ppo.kl_horizon = 101
    cfg.check()
    cfg.ppo.beta = 0.0
    with pytest.raises(ConfigError, match=r"^ppo\.beta=0\.0 .*kl_target"):
        cfg.check()
    cfg.ppo.kl_target = None
    cfg.check()


def test_a_rollout_has_an_answer_for_every_rank(cfg: RunConfig) -> None:
    cfg.stages = ["prepare", "ppo"]
    cfg.ppo.batch_size, cfg.ppo.minibatches, cfg.launch.processes = 6, 3, 2
    cfg.check()
    cfg.launch.processes = 3
    with pytest.raises(ConfigError, match=r"^ppo\.batch_size=6 .*at least 9"):
        cfg.check()


@pytest.mark.parametrize("algorithm", [Algorithm.rloo, Algorithm.grpo])
def test_answers_are_compared_where_there_is_no_value_function(
    cfg: RunConfig, algorithm: Algorithm
) -> None:
    cfg.ppo.algorithm = algorithm
    with pytest.raises(ConfigError, match=rf"^ppo\.answers_per_prompt=1 .*at least 2 for {algorithm}"):
        cfg.check()
    cfg.ppo.answers_per_prompt = 4
    cfg.check()
    cfg.ppo.whiten_rewards = True
    with pytest.raises(ConfigError, match=rf"^ppo\.whiten_rewards=True .*false for {algorithm}"):
        cfg.check()
    cfg.ppo.whiten_rewards, cfg.ppo.value_start = False, ValueStart.policy
    with pytest.raises(ConfigError, match=rf"^ppo\.value_start=policy .*auto for {algorithm}"):
        cfg.check()


def test_answers_of_a_rollout_make_whole_groups(cfg: RunConfig) -> None:
    cfg.ppo.batch_size, cfg.ppo.answers_per_prompt = 64, 3
    with pytest.raises(ConfigError, match=r"^ppo\.answers_per_prompt=3 .*a divisor of ppo\.batch_size"):
        cfg.check()


def test_halves_are_too_coarse_for_ratios(cfg: RunConfig) -> None:
    cfg.launch.precision = Precision.fp16
    cfg.check()
    cfg.stages = ["prepare", "ppo"]
    with pytest.raises(ConfigError, match=r"^launch\.precision=fp16 .*bf16 or fp32"):
        cfg.check()
