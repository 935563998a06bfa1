"""The smoke form: the same settings on a model of the same architecture, tiny in every size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ftpipe import cli, compose, schema, smoke
from ftpipe.choices import Format, Init, Precision, WandbMode
from ftpipe.config import RunConfig, SourceConfig
from ftpipe.errors import ConfigError
from ftpipe.pins import local_data
from ftpipe.schema import all_keys
from ftpipe.slurm_config import StageJobConfig

# Sizes as published: config.json of each model's hub repository.
PUBLISHED: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32000,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "EleutherAI/pythia-6.9b": {
        "model_type": "gpt_neox",
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": 50432,
    },
    "tiiuae/falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
        "alibi": False,
        "vocab_size": 65024,
    },
    "tiiuae/falcon-40b": {
        "model_type": "falcon",
        "hidden_size": 8192,
        "ffn_hidden_size": 32768,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "bias": False,
        "alibi": False,
        "vocab_size": 65024,
    },
    "mosaicml/mpt-7b": {
        "model_type": "mpt",
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8},
        "no_bias": True,
        "vocab_size": 50432,
    },
    "openai-community/gpt2-xl": {
        "model_type": "gpt2",
        "n_embd": 1600,
        "n_head": 25,
        "n_layer": 48,
        "n_positions": 1024,
        "n_inner": None,
        "vocab_size": 50257,
    },
    "bigcode/starcoder": {
        "model_type": "gpt_bigcode",
        "n_embd": 6144,
        "n_head": 48,
        "n_inner": 24576,
        "n_layer": 40,
        "n_positions": 8192,
        "multi_query": True,
        "vocab_size": 49152,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "stabilityai/stablelm-3b-4e1t": {
        "model_type": "stablelm",
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "vocab_size": 50304,
    },
    "facebook/opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tiny_model_of_each_architecture_runs_forward(name: str) -> None:
    import torch

    from ftpipe.config import ModelConfig
    from ftpipe.modeling import random_model
    from ftpipe.tokenizer import byte_level

    architecture = smoke.tiny(PUBLISHED[name])
    model = random_model(ModelConfig(init=Init.random, architecture=architecture), byte_level(), seed=0)
    assert model.config.model_type == PUBLISHED[name]["model_type"]
    parameters = sum(weight.numel() for weight in model.parameters())
    assert parameters < 500_000, f"{parameters:,}"
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    assert logits.shape == (2, 12, 258)  # 256 bytes, pad and eos
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_sizes_change(name: str) -> None:
    whole = PUBLISHED[name]
    before = copy.deepcopy(whole)
    small = smoke.tiny(whole)
    assert whole == before
    assert set(small) == (set(whole) - {"vocab_size"}) | {"initializer_range"}
    sizes = {
        *("hidden_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "word_embed_proj_dim"),
        *("num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "num_kv_heads"),
        *("d_model", "n_heads", "n_layers", "n_embd", "n_head", "n_layer", "n_inner"),
    }
    for key, value in whole.items():
        if key in sizes:
            assert value is None or small[key] < value, key
        elif key != "vocab_size":
            assert small[key] == value, key


@pytest.mark.parametrize(
    ("heads", "groups", "small"),
    # keys and values are shared by heads / groups heads; four heads are left
    [(32, 32, 4), (32, 16, 2), (32, 8, 1), (128, 8, 1), (9, 3, 1), (28, 4, 1), (4, 2, 2), (16, 1, 1)],
)
def test_grouped_queries_keep_their_ratio_as_far_as_four_heads_allow(
    heads: int, groups: int, small: int
) -> None:
    for key in smoke.KEY_VALUE_HEADS:
        made = smoke.tiny({"model_type": "x", "num_attention_heads": heads, key: groups})
        assert (made["num_attention_heads"], made[key]) == (4, small)
        assert 4 % made[key] == 0


def test_key_value_heads_left_to_the_architecture_stay_so() -> None:
    made = smoke.tiny({"model_type": "x", "num_attention_heads": 32, "num_key_value_heads": None})
    assert made["num_key_value_heads"] is None


# --- the whole configuration ---


@pytest.fixture
def big(cfg: RunConfig) -> RunConfig:
    """Return a run of a large model on hub data."""
    cfg.model.init, cfg.model.path, cfg.model.tokenizer = Init.pretrained, "huggyllama/llama-7b", None
    cfg.model.revision = "4782ad278652c7c71b72204d462d6d01eaaf7549"
    cfg.model.architecture = dict(PUBLISHED["huggyllama/llama-7b"])
    cfg.data.sources = {
        format.value: SourceConfig(format=format, path=f"hub/{format}", revision="0" * 40, top_k=1)
        for format in Format
    }
    cfg.sft.batch_size, cfg.launch.micro_batch_size, cfg.sft.epochs = 128, 16, 3
    cfg.model.new_tokens, cfg.data.packing = ["<|prompter|>"], True
    cfg.tracking.wandb = WandbMode.online
    return cfg


def test_the_smoke_form_downloads_nothing_and_sends_nothing(big: RunConfig) -> None:
    small = smoke.smoke_form(big)
    assert small.model.init is Init.random
    assert (small.model.path, small.model.revision, small.model.tokenizer) == (None, None, "bytes")
    assert small.tracking.wandb is WandbMode.disabled
    assert set(small.data.sources) == set(big.data.sources) == set(Format)
    for name, source in small.data.sources.items():
        file = local_data(source.path)
        assert file is not None and file.is_file()
        assert source.format is big.data.sources[name].format
        assert source.top_k == 1
    small.check()


def test_the_smoke_form_is_short(big: RunConfig) -> None:
    small = smoke.smoke_form(big)
    assert small.sft.max_steps is not None and small.sft.max_steps <= 4
    assert small.sft.batch_size <= 8
    assert small.launch.micro_batch_size <= small.sft.batch_size
    assert small.sft.samples <= 1 and small.sft.sample_tokens <= 8
    big.sft.max_steps, big.sft.batch_size, big.launch.micro_batch_size = 2, 2, 1
    small = smoke.smoke_form(big)
    assert (small.sft.max_steps, small.sft.batch_size, small.launch.micro_batch_size) == (2, 2, 1)


def test_the_smoke_form_runs_where_there_is_no_gpu(big: RunConfig) -> None:
    for precision, small in (
        (Precision.fp16, Precision.bf16),
        (Precision.bf16, Precision.bf16),
        (Precision.fp32, Precision.fp32),
        (Precision.auto, Precision.auto),
    ):
        big.launch.precision = precision
        assert smoke.smoke_form(big).launch.precision is small
    assert smoke.smoke_form(big).launch.threads == 1
    big.launch.threads = 3
    assert smoke.smoke_form(big).launch.threads == 3


@pytest.mark.parametrize(
    ("stages", "batches", "micro", "share"),
    # a step of 8 rows in two passes; as many rows each as divide the batch of every stage that runs
    [
        (["sft"], (16, 64), 1, 4),
        (["sft"], (128, 64), 16, 8),
        (["sft"], (4, 64), 1, 2),
        (["sft"], (2, 64), 2, 2),
        (["sft"], (3, 64), 1, 1),
        (["sft"], (5, 64), 1, 1),
        (["sft", "dpo"], (16, 6), 1, 1),
        (["sft", "dpo"], (8, 4), 2, 2),
        (["sft", "dpo"], (8, 3), 1, 1),
        (["evolve"], (8, 8), 2, 2),
    ],
)
def test_a_step_of_the_smoke_form_has_two_passes_where_it_can(
    big: RunConfig, stages: list[str], batches: tuple[int, int], micro: int, share: int
) -> None:
    big.stages, big.data.packing = stages, False
    (big.sft.batch_size, big.dpo.batch_size), big.launch.micro_batch_size = batches, micro
    small = smoke.smoke_form(big)
    assert small.launch.micro_batch_size == share
    for stage in stages:
        if stage != "evolve":
            assert getattr(small, stage).batch_size % share == 0


def test_a_step_of_packed_rows_has_two_sequences(big: RunConfig) -> None:
    big.sft.batch_size, big.launch.micro_batch_size = 64, 4
    small = smoke.smoke_form(big)
    assert (small.sft.batch_size, small.launch.micro_batch_size) == (2, 2)
    big.launch.micro_batch_size = 1
    assert smoke.smoke_form(big).launch.micro_batch_size == 1
    big.data.packing, big.launch.micro_batch_size = False, 4
    small = smoke.smoke_form(big)
    assert (small.sft.batch_size, small.launch.micro_batch_size) == (8, 4)


@pytest.mark.parametrize(
    ("batch", "micro", "processes"),
    [(128, 16, 1), (128, 4, 4), (128, 1, 16), (12, 3, 2), (9, 3, 3), (6, 3, 2), (1, 1, 1), (96, 3, 4)],
)
def test_the_smoke_form_of_what_fits_fits(
    big: RunConfig, batch: int, micro: int, processes: int
) -> None:
    big.sft.batch_size, big.launch.micro_batch_size, big.launch.processes = batch, micro, processes
    big.check()
    small = smoke.smoke_form(big)
    small.check()
    assert small.launch.processes == processes
    assert small.sft.batch_size <= max(8, processes)


def test_the_smoke_form_of_several_nodes_fits_on_them(big: RunConfig) -> None:
    big.launch.processes, big.launch.nodes, big.launch.micro_batch_size = 4, 2, 4
    big.launch.slurm.stages = {"sft": StageJobConfig(nodes=4)}
    small = smoke.smoke_form(big)
    small.check()
    assert (small.launch.nodes_of("sft"), small.launch.micro_batch_size) == (2, 1)
    assert small.sft.batch_size == 8
    assert big.launch.nodes_of("sft") == 4


@pytest.mark.parametrize(
    ("minibatches", "processes", "left"), [(16, 1, 8), (6, 1, 2), (3, 1, 1), (8, 4, 2), (16, 16, 1)]
)
def test_a_smaller_rollout_is_still_divided(
    big: RunConfig, minibatches: int, processes: int, left: int
) -> None:
    # 8 answers, or one for each of more ranks; every minibatch needs an answer of every rank
    big.stages = ["prepare", "ppo"]
    big.launch.processes, big.launch.micro_batch_size = processes, 1
    big.ppo.batch_size, big.ppo.minibatches = 48 * minibatches, minibatches
    small = smoke.smoke_form(big)
    assert (small.ppo.batch_size, small.ppo.minibatches) == (max(8, processes), left)
    small.check()


def test_the_original_is_left_alone_and_all_else_is_kept(big: RunConfig) -> None:
    before = copy.deepcopy(big)
    small = smoke.smoke_form(big)
    assert big == before
    swapped = {
        *("model.path", "model.revision", "model.init", "model.tokenizer", "model.architecture"),
        *("data.sources", "data.validation", "tracking.wandb"),
        *(
            f"{stage}.{key}"
            for stage in ("sft", "reward", "dpo")
            for key in ("max_steps", "batch_size", "log_every", "samples", "sample_tokens")
        ),
        *("launch.micro_batch_size", "launch.threads", "reward.ensemble"),
        *(f"ppo.{key}" for key in ("max_steps", "batch_size", "log_every", "samples")),
        *("ppo.max_new_tokens", "ppo.ignore_gate", "ppo.health.min_eos_rate", "ppo.minibatches"),
    }

    def value(tree: Any, key: str) -> Any:
        for name in key.split("."):
            tree = tree[name]
        return tree

    kept, was = schema.plain(small), schema.plain(before)
    for key in all_keys():
        # test_evolve_plan.py, evaluation/test_plan.py
        checked_elsewhere = "<name>" in key or key.startswith(("evolve.", "evaluate."))
        if key not in swapped and not checked_elsewhere:
            assert value(kept, key) == value(was, key), key


def test_an_unknown_architecture_is_refused(big: RunConfig) -> None:
    big.model.architecture = {}
    with pytest.raises(ConfigError, match=r"^smoke=true needs model\.architecture\.model_type"):
        smoke.smoke_form(big)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted(compose.shipped("recipes").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_recipe_has_a_smoke_form(
    file: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftpipe.provenance.gpus", list)  # it needs no GPU, whatever the recipe does
    (small,) = cli.configurations([f"recipe={file.stem}", "smoke=true"])
    monkeypatch.setattr("ftpipe.provenance.gpus", lambda: ["A100"])
    (whole,) = cli.configurations([f"recipe={file.stem}"])
    assert small.adapter == whole.adapter
    assert (small.data.template, small.data.learn) == (whole.data.template, whole.data.learn)
    assert (small.sft.optimizer, small.sft.scheduler, small.data.packing) == (
        whole.sft.optimizer,
        whole.sft.scheduler,
        whole.data.packing,
    )
    assert small.model.architecture["model_type"] == whole.model.architecture["model_type"]
