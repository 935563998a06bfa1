"""A training stage reduced to what its memory depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftpipe.choices import (
    Algorithm,
    Attention,
    Device,
    Dtype,
    Method,
    Offload,
    Optimizer,
    Precision,
    PreferenceLoss,
    RewardKind,
    Start,
    Strategy,
)
from ftpipe.config import RunConfig
from ftpipe.fit.kept import FLOAT, HALF, Numbers
from ftpipe.fit.model import Model
from ftpipe.fit.shapes import Linear, Shape, adapted, lora
from ftpipe.training_config import REFERENCE_FREE

TRAINED = ("sft", "reward", "reference", "dpo", "ppo")
OF_DTYPE = {Dtype.float32: FLOAT, Dtype.bfloat16: HALF, Dtype.float16: HALF}
BLOCK, BLOCKS = (
    64,
    256,
)  # weights that share a scale; scales that share one (arXiv:2305.14314, section 3)
REPLIES = 2  # of a pair; a reward model takes as many of a prompt, or more where they are ranked


def optimizer_bytes(optimizer: Optimizer, gpu: bool, width: int = FLOAT) -> float:
    """Return what an optimiser keeps of a weight of ``width`` bytes, in bytes of the GPU's own memory.

    Adam: two moments, PyTorch's as wide as the weight (torch.optim, zeros_like), those of bitsandbytes
    in float32 (optim/optimizer.py, get_state_buffer), or in 8 bits with a float32 scale for each 256
    (arXiv:2110.02861). Paged states lie in host memory and come when there is room (arXiv:2305.14314,
    section 3), so they count for nothing on a GPU; a processor has no pages, and bitsandbytes makes them
    plain there. RMSprop keeps one moment; Adafactor rows and columns (arXiv:1804.04235), next to
    nothing; SGD nothing.
    """
    eight = 2 * (1 + FLOAT / BLOCKS)
    return {
        Optimizer.adamw: 2.0 * width,
        Optimizer.adamw_8bit: eight,
        Optimizer.paged_adamw_32bit: 0.0 if gpu else 2.0 * FLOAT,
        Optimizer.paged_adamw_8bit: 0.0 if gpu else eight,
        Optimizer.adafactor: 0.0,
        Optimizer.rmsprop: 1.0 * width,
        Optimizer.sgd: 0.0,
    }[optimizer]


def four_bit(double: bool) -> float:
    """Return bytes of a weight in 4 bits with its scales.

    A float32 scale for each 64 weights: half a bit a weight. Quantised again, each in 8 bits with a
    float32 for 256 of them: 0.127 bits (arXiv:2305.14314, section 3).
    """
    scales = (1 / BLOCK + FLOAT / (BLOCK * BLOCKS)) if double else FLOAT / BLOCK
    return 0.5 + scales


@dataclass(frozen=True)
class Training:
    """What a stage holds and how it goes through its rows, on one rank.

    Attributes:
        rows: that go through the model at once.
        length: tokens of each.
        copies: adapters that are held.
        learned: adapters that are trained, or models.
        frozen: models that are held whole and not trained, beside the one that is.
        accumulated: micro-batches of a step.
        answers: ppo: answers drawn at once, and ``new``, tokens of each.
        others: weights that other models of the stage hold, in bytes.
    """

    name: str
    shape: Shape
    numbers: Numbers
    method: Method
    rows: int
    length: int
    ranks: int
    strategy: Strategy
    optimizer: Optimizer
    checkpointing: bool
    accumulated: int = 1
    copies: int = 1
    learned: int = 1
    frozen: int = 0
    asks_reference: bool = False  # dpo: in every step, for want of an artifact that has its answers
    headed: bool = True  # has an output head, not a score
    adapter: int = 0  # weights of one adapter
    fresh: int = 0  # of rows of new tokens, trained beside an adapter
    linear_bytes: float = 0.0  # of a weight of a layer's linear modules
    answers: int = 0
    new: int = 0
    trains: bool = True
    offload: tuple[Offload, Offload] = (Offload.none, Offload.none)  # of the optimiser, of weights
    offloaded_activations: bool = False
    reshard: bool = True
    bucket: int = 0

    @property
    def body(self) -> int:
        """Return the weights of the model without adapters, its score head included."""
        return self.shape.total if self.headed else self.shape.body + self.shape.hidden

    @property
    def trained(self) -> int:
        """Return how many weights are trained."""
        if not self.trains:
            return 0
        if self.method is Method.full:
            # the value function has a head of its own, and no output head
            return self.body + self.shape.body * (self.learned - 1) + self._value_heads
        head = self.shape.hidden if not self.headed else 0
        return self.learned * self.adapter + self.fresh + head + self._value_heads

    @property
    def whole(self) -> int:
        """Return all weights of the models that are trained, their adapters included."""
        if self.method is Method.full:
            return self.trained or self.body
        return self.body + self.learned * self.adapter + self.fresh + self._value_heads

    @property
    def _value_heads(self) -> int:
        return (self.shape.hidden + 1) * (self.learned - 1)

    @property
    def base_bytes(self) -> float:
        """Return the bytes of the base's weights on one rank that holds all of them."""
        linears = self.shape.layers * self.shape.layer_linears
        others = self.body - linears
        return linears * self.linear_bytes + others * self.numbers.stored


def ranks_of(cfg: RunConfig, stage: str) -> int:
    return cfg.launch.nodes_of(stage) * cfg.launch.processes


def training_of(cfg: RunConfig, stage: str, model: Model, gpu: bool | None = None) -> Training:
    """Return what decides a stage's memory.

    Args:
        stage: one of ``TRAINED``.
        gpu: as on a GPU; None: as ``launch.device`` says.
    """
    launch, adapter, shape = cfg.launch, cfg.adapter, model.shape
    on_gpu = launch.device is Device.cuda if gpu is None else gpu
    method = adapter.method
    settings = cfg.dpo if stage == "reference" else getattr(cfg, stage)
    full = method is Method.full
    precision = launch.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if on_gpu else Precision.fp32
    compute = FLOAT if precision is Precision.fp32 else HALF
    stored = (
        OF_DTYPE[cfg.model.dtype] if cfg.model.dtype is not Dtype.auto else FLOAT if full else compute
    )
    fresh = stage == "dpo" and not (_comes_adapted(cfg, stage) and cfg.dpo.start is Start.policy)
    rank = (cfg.dpo.r or adapter.r) if fresh else adapter.r
    names = {one.name.removeprefix(f"{shape.within}.0.") for one in _first(shape, cfg)}
    ranks = ranks_of(cfg, stage)
    micro = launch.micro_batch_size
    rows = micro * (REPLIES if _paired(cfg, stage) else 1)
    length = cfg.data.max_length + (cfg.ppo.max_new_tokens if stage == "ppo" else 0)
    if shape.positions:
        length = min(length, shape.positions)
    numbers = Numbers(
        compute=compute,
        stored=stored,
        trained=full,
        adapted=() if full else tuple(sorted(names)),
        r=rank,
        adapter=OF_DTYPE[adapter.dtype],
        dropout=adapter.dropout > 0 and stage in ("sft", "reward"),
        drops=stage in ("sft", "reward"),
        masked=rows > 1,
        gpu=on_gpu,
        attention=cfg.model.attention if isinstance(cfg.model.attention, Attention) else Attention.sdpa,
    )
    found = Training(
        name=stage,
        shape=shape,
        numbers=numbers,
        method=method,
        rows=rows,
        length=length,
        ranks=ranks,
        strategy=Strategy.ddp if ranks == 1 else launch.strategy,
        optimizer=settings.optimizer,
        checkpointing=settings.gradient_checkpointing,
        accumulated=max(1, math.ceil(settings.batch_size / (micro * ranks))),
        headed=stage != "reward",
        adapter=0 if full else lora(shape, adapter.targets, rank),
        fresh=0 if full else shape.rows(model.new),
        linear_bytes=four_bit(adapter.double_quantization) if method is Method.qlora else stored,
        offload=(launch.sharding.offload_optimizer, launch.sharding.offload_parameters),
        offloaded_activations=launch.offload_activations,
        reshard=launch.sharding.reshard,
        bucket=launch.sharding.bucket,
    )
    return replace(found, **_several(cfg, stage))


def _first(shape: Shape, cfg: RunConfig) -> list[Linear]:
    """Return the modules of the first layer that the adapter attaches to."""
    inside = f"{shape.within}.0."
    return [one for one in adapted(shape, cfg.adapter.targets) if one.name.startswith(inside)]


def _paired(cfg: RunConfig, stage: str) -> bool:
    if stage == "dpo":
        return cfg.dpo.loss is not PreferenceLoss.kto
    return stage in ("reward", "reference")  # stages/reference.py: as many replies, whatever the loss


def _comes_adapted(cfg: RunConfig, stage: str) -> bool:
    """Say whether the policy that comes to a stage is an adapter."""
    before = cfg.stages[: cfg.stages.index(stage)] if stage in cfg.stages else cfg.stages
    last = next((name for name in reversed(before) if name in ("sft", "dpo", "merge")), "merge")
    return cfg.adapter.method is not Method.full and last != "merge"


def _several(cfg: RunConfig, stage: str) -> Mapping[str, Any]:
    """Return how many models or adapters a stage holds, and what else it does by them."""
    full = cfg.adapter.method is Method.full
    comes_adapted = _comes_adapted(cfg, stage)
    if stage == "reference":
        return {"trains": False, "checkpointing": False}
    if stage == "dpo":
        needed = cfg.dpo.loss not in REFERENCE_FREE and "reference" not in cfg.stages
        second = comes_adapted and cfg.dpo.start is Start.policy
        return {
            "frozen": int(full and needed),
            "copies": 1 + int(second),
            "asks_reference": needed,
        }
    if stage != "ppo":
        return {}
    valued = cfg.ppo.algorithm is Algorithm.ppo
    rewarded = cfg.ppo.reward is RewardKind.model
    share = math.ceil(cfg.ppo.batch_size / ranks_of(cfg, stage))
    drawn = {
        "answers": min(share, cfg.ppo.generation_batch_size or share),
        "new": cfg.ppo.max_new_tokens,
        "learned": 1 + int(valued),
        "accumulated": max(1, math.ceil(share / cfg.ppo.minibatches / cfg.launch.micro_batch_size)),
    }
    members = cfg.reward.ensemble if rewarded else 0
    if full:
        return {**drawn, "frozen": 1 + members}
    reference = int(comes_adapted and cfg.ppo.start is Start.policy)
    return {**drawn, "copies": 1 + int(valued) + reference + members}
