"""The smoke form of a recipe: the same settings on a tiny random model and a few sample rows.

Kept: architecture, adapter, template, mask, optimiser, schedule, packing, precision. Swapped: sizes
of the model, weights, tokenizer, rows, the number of steps, and fp16, which needs a GPU, for bf16. Needs
no download and runs in seconds.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from ftpipe.benchmark_config import HarnessConfig, MmluConfig
from ftpipe.choices import Format, Init, Part, Precision
from ftpipe.config import EvolveConfig, RunConfig, SeedsConfig, SourceConfig, TrackingConfig
from ftpipe.errors import ConfigError
from ftpipe.evaluate_config import EvaluateConfig, JudgeConfig, TextsConfig
from ftpipe.pins import BYTES
from ftpipe.samples import PREFIX

STEPS = 4
SEEDS = 12  # instructions to evolve
ROWS_PER_STEP = 8
QUESTIONS = PREFIX + "questions.jsonl"
PACKS_PER_STEP = 2  # of packed rows, each of the recipe's whole length

# Sizes by the names that architectures give them. Head counts keep their ratio (grouped queries).
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "head_dim": 8,
    # at the usual 0.02 a network this narrow hardly passes a signal, and LoRA cannot visibly learn
    "initializer_range": 0.2,
}
HEADS = ("num_attention_heads", "n_head", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")

SAMPLES = {
    Format.alpaca: "alpaca.json",
    Format.dolly: "dolly.jsonl",
    Format.evol_instruct: "evol_instruct_70k.json",
    Format.guanaco: "guanaco.jsonl",
    Format.hh_rlhf: "hh_rlhf.jsonl",
    Format.messages: "messages.jsonl",
    Format.oasst: "oasst1.jsonl",
    Format.preference: "preference.jsonl",
    Format.prompt_completion: "prompt_completion.jsonl",
    Format.prompts: "prompts.jsonl",
    Format.sharegpt: "sharegpt.json",
    Format.ultrafeedback: "ultrafeedback.jsonl",
    Format.unpaired: "unpaired.jsonl",
}


def smoke_form(cfg: RunConfig) -> RunConfig:
    """Return the smoke form of a configuration; the original is left alone.

    Raises:
        ConfigError: if the recipe does not say which architecture its model has.
    """
    small = copy.deepcopy(cfg)
    model = small.model
    if "model_type" not in model.architecture:
        raise ConfigError(
            "smoke=true needs model.architecture.model_type to know which tiny model stands in; "
            "conf/model/ has complete examples."
        )
    model.architecture = tiny(model.architecture)
    model.init = Init.random
    model.path = model.revision = model.tokenizer_revision = None
    model.tokenizer = BYTES
    small.data.sources = {
        name: SourceConfig(
            format=source.format,
            path=PREFIX + SAMPLES[source.format],
            use=list(source.use),
            languages=list(source.languages),
            top_k=source.top_k,
            ties=source.ties,
        )
        for name, source in cfg.data.sources.items()
        if source.part in (Part.auto, Part.train)  # a published test split would be the same sample
    }
    small.data.decontaminate = {}
    small.evolve = small_evolution(cfg.evolve)
    small.data.validation = 4
    _few_small_steps(small)
    for answers in (small.sft, small.dpo):
        answers.samples = min(answers.samples, 1)
        answers.sample_tokens = min(answers.sample_tokens, 8)
    small.ppo.max_new_tokens = min(small.ppo.max_new_tokens, 8)
    small.ppo.samples = min(small.ppo.samples, 1)
    small.ppo.ignore_gate = True  # a few steps of a tiny model pass no gate
    small.ppo.health.min_eos_rate = None  # and its answers end by chance alone
    small.reward.ensemble = min(small.reward.ensemble, 2)
    small.evaluate = small_evaluation(cfg.evaluate)
    # GGUF has no form for a tokenizer of bytes, llmcompressor is an environment of its own, and nothing
    # leaves the machine
    small.export = replace(
        small.export, gguf=[], converter=None, quantize=[], quantizer=None, push=None, public=False
    )
    small.tracking = TrackingConfig()
    return small


def small_evaluation(evaluate: EvaluateConfig) -> EvaluateConfig:
    """Return an evaluation on a few sample questions, judged by the run's reward model if there is one.

    Published answers are left out, since they belong to other questions, and so are the benchmarks,
    whose files are not shipped.
    """
    pairs = [pair for pair in evaluate.judge.pairs if not set(pair.split(":")) & set(evaluate.answers)]
    questions = {name: TextsConfig(path=QUESTIONS, rows=2) for name in evaluate.prompts}
    return replace(
        evaluate,
        prompts=questions,
        answers={},
        max_new_tokens=min(evaluate.max_new_tokens, 8),
        judge=JudgeConfig(reward=evaluate.judge.reward, pairs=pairs),
        harness=HarnessConfig(),
        mmlu=MmluConfig(),
    )


def _few_small_steps(small: RunConfig) -> None:
    """Cut steps and batches of all that trains, so that every rank still has its share of each."""
    launch = small.launch
    for job in launch.slurm.stages.values():
        job.nodes = None  # all stages have as many ranks
    if launch.precision is Precision.fp16:
        launch.precision = Precision.bf16
    if launch.threads is None:
        launch.threads = 1  # products so small are done before a second thread has started
    ranks = launch.nodes * launch.processes
    trained = (small.sft, small.reward, small.dpo, small.ppo)
    used = [stage for stage in trained if stage.group in small.stages]
    most = {stage.group: ROWS_PER_STEP for stage in trained}
    if small.data.packing:
        most[small.sft.group] = PACKS_PER_STEP
    large = [most[stage.group] for stage in used if stage.batch_size > most[stage.group]]
    if large:
        launch.micro_batch_size = min(launch.micro_batch_size, max(1, min(large) // ranks))
    at_once = launch.micro_batch_size * ranks
    for stage in trained:
        if stage.max_steps is None or stage.max_steps > STEPS:
            stage.max_steps = STEPS
        if stage.batch_size > most[stage.group]:
            stage.batch_size = at_once * max(1, most[stage.group] // at_once)
        stage.log_every = 1
    # Two forward passes a step show that gradients add up. Each has a length of its own, and for each
    # length products in 16 bits are compiled anew.
    share = math.gcd(*(stage.batch_size // ranks for stage in used))
    if share and share % 2 == 0:
        launch.micro_batch_size = max(launch.micro_batch_size, share // 2)
    # a smaller rollout still has as many updates as divide what each rank has of it
    small.ppo.minibatches = math.gcd(small.ppo.minibatches, small.ppo.batch_size // ranks)
    small.ppo.answers_per_prompt = math.gcd(small.ppo.answers_per_prompt, small.ppo.batch_size)


def small_evolution(evolve: EvolveConfig) -> EvolveConfig:
    """Return one short round over sample seeds by the tiny model itself.

    Random weights write nothing that survives, so no share is asked for; the seeds stay as rows. The
    rules are those of the recipe.
    """
    seeds = SeedsConfig(
        format=evolve.seeds.format,
        path=PREFIX + SAMPLES[evolve.seeds.format],
        # a thread of OASST is made of many rows
        rows=None if evolve.seeds.format is Format.oasst else SEEDS,
    )
    return replace(
        evolve,
        seeds=seeds,
        rounds=1,
        keep_seeds=True,
        min_kept=0.0,
        url=None,
        model=None,
        api_key_env=None,
        max_tokens=min(evolve.max_tokens, 16),
        concurrency=min(evolve.concurrency, 4),
    )


def tiny(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return an architecture's configuration with its sizes shrunk, all else as it was."""
    shrunk = {key: TINY.get(key, value) for key, value in architecture.items() if key != "vocab_size"}
    shrunk["initializer_range"] = TINY["initializer_range"]
    heads = next((architecture[key] for key in HEADS if key in architecture), None)
    for key in HEADS:
        if key in shrunk:
            shrunk[key] = 4
    for key in KEY_VALUE_HEADS:
        if shrunk.get(key) is not None and heads:
            shrunk[key] = max(1, 4 * architecture[key] // heads)
    return shrunk
