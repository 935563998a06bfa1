"""What does not go together: a row for each combination that is refused, before anything is loaded.

Each sentence says why and what to set. What is not here was tried on two ranks.
"""

from __future__ import annotations

import ctypes.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpipe.choices import Determinism, Device, Dtype, Method, Offload, Optimizer, Precision, Strategy
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.training_config import REFERENCE_FREE, TrainingConfig

TRAIN = ("sft", "reward", "dpo", "ppo")
ZERO = (Strategy.zero1, Strategy.zero2, Strategy.zero3)
BYTES = (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit, Optimizer.paged_adamw_32bit)


@dataclass(frozen=True)
class Refusal:
    """Values that do not go together in a stage.

    Attributes:
        keys: whose values the sentence begins with; ``STAGE`` stands for the stage's group.
        when: says of a configuration and a stage's name whether they are there together.
        why: what is in the way, and what to set instead.
        stages: those it concerns.
        here: it depends on the machine that runs them.
    """

    keys: tuple[str, ...]
    when: Callable[[RunConfig, str], bool]
    why: str
    stages: tuple[str, ...] = TRAIN
    here: bool = False


def check(cfg: RunConfig, names: Sequence[str], elsewhere: bool = False) -> None:
    """Refuse what does not go together in the stages of a plan.

    Args:
        elsewhere: they run on other machines, so what this one has is of no account.

    Raises:
        ConfigError: with the keys, why, and what to set.
    """
    for name in names:
        for row in REFUSED:
            if name in row.stages and not (row.here and elsewhere) and row.when(cfg, name):
                keys = [key.replace("STAGE", name) for key in row.keys]
                said = ", ".join(f"{key}={_value(cfg, key)}" for key in keys)
                raise ConfigError(f"{said} in the stage '{name}': {row.why.replace('STAGE', name)}.")


def _value(cfg: RunConfig, key: str) -> Any:
    found: Any = cfg
    for part in key.split("."):
        found = getattr(found, part)
    return str(found).lower() if isinstance(found, bool) else found


def training(cfg: RunConfig, name: str) -> TrainingConfig:
    """Return the settings of a stage that trains."""
    found: TrainingConfig = getattr(cfg, name)
    return found


def _by(*strategies: Strategy) -> Callable[[RunConfig], bool]:
    return lambda cfg: cfg.launch.strategy in strategies


def _strict(cfg: RunConfig) -> bool:
    return cfg.determinism is Determinism.strict


def _shares_out(cfg: RunConfig) -> bool:
    return cfg.launch.strategy is not Strategy.ddp


def _trained_dtypes(cfg: RunConfig) -> bool:
    """Say whether what is trained is stored in float32."""
    if cfg.adapter.method is Method.full:
        return cfg.model.dtype in (Dtype.auto, Dtype.float32)
    return cfg.adapter.dtype is Dtype.float32


def _on_disk(cfg: RunConfig) -> bool:
    sharding = cfg.launch.sharding
    return Offload.nvme in (sharding.offload_optimizer, sharding.offload_parameters)


def _aio() -> bool:
    """Say whether DeepSpeed can compile its reader of disks here (op_builder/async_io.py)."""
    return bool(ctypes.util.find_library("aio") and shutil.which("g++") and shutil.which("ninja"))


REFUSED = (
    # --- the same again ---
    Refusal(
        ("determinism", "launch.threads", "launch.device"),
        lambda cfg, _: _strict(cfg) and cfg.launch.device is Device.cpu and cfg.launch.threads is None,
        "a sum is split over threads, so their number decides how it is rounded; set launch.threads",
        ("evolve", "sft", "merge", "reward", "reference", "dpo", "ppo", "evaluate", "export"),
    ),
    Refusal(
        ("determinism", "evolve.url"),
        lambda cfg, _: _strict(cfg) and cfg.evolve.url is not None,
        "what a server answers is not in this run's hands; set determinism=seeded, or let the run's own "
        "model answer (evolve.url=null)",
        ("evolve",),
    ),
    Refusal(
        ("determinism", "evaluate.judge.url"),
        lambda cfg, _: _strict(cfg) and cfg.evaluate.judge.url is not None,
        "what a server answers is not in this run's hands; set determinism=seeded, or let the reward "
        "model alone judge (evaluate.judge.url=null)",
        ("evaluate",),
    ),
    # --- ranks ---
    Refusal(
        ("launch.strategy", "launch.processes"),
        lambda cfg, name: _shares_out(cfg) and cfg.launch.nodes_of(name) * cfg.launch.processes == 1,
        "one process has nobody to share with; set launch.processes to the number of GPUs, or "
        "launch.strategy=ddp",
    ),
    Refusal(
        ("launch.strategy", "launch.precision"),
        lambda cfg, _: _shares_out(cfg) and cfg.launch.precision is Precision.fp16,
        "the scale that fp16 needs for its losses is not shared between ranks here; set "
        "launch.precision=bf16",
    ),
    # --- 4 bits ---
    Refusal(
        ("launch.strategy", "adapter.method"),
        lambda cfg, _: _by(Strategy.zero3)(cfg) and cfg.adapter.method is Method.qlora,
        "ZeRO-3 cuts weights into flat pieces, and 4-bit ones mean nothing without the scales that lie "
        "beside them; set launch.strategy=zero2 or ddp (a 4-bit base is small), or adapter.method=lora",
    ),
    Refusal(
        ("launch.strategy", "adapter.method"),
        lambda cfg, _: _by(Strategy.fsdp)(cfg) and cfg.adapter.method is Method.qlora,
        "FSDP2 shares out floating-point weights, and 4-bit ones are stored as bytes (as bfloat16 "
        "they lose their scales when they are gathered); set launch.strategy=zero2 or ddp (a 4-bit base "
        "is small), or adapter.method=lora",
    ),
    # --- optimisers ---
    Refusal(
        ("launch.strategy", "STAGE.optimizer"),
        lambda cfg, name: _by(Strategy.fsdp)(cfg) and training(cfg, name).optimizer in BYTES,
        "the kernels of bitsandbytes do not take FSDP2's shards; set STAGE.optimizer=adamw, whose "
        "states are shared out",
    ),
    Refusal(
        ("launch.strategy", "STAGE.optimizer"),
        lambda cfg, name: _by(*ZERO)(cfg) and training(cfg, name).optimizer in BYTES,
        "ZeRO gives the optimiser flat pieces of all weights, so blocks of 8 bits would be cut "
        "elsewhere on every number of ranks, and embeddings lose their 32-bit states; set "
        "STAGE.optimizer=adamw, "
        "whose states are shared out",
    ),
    Refusal(
        ("launch.strategy", "STAGE.optimizer"),
        lambda cfg, name: _shares_out(cfg) and training(cfg, name).optimizer is Optimizer.adafactor,
        "Adafactor keeps means of whole rows and columns, and a rank would see pieces of them; set "
        "STAGE.optimizer=adamw",
    ),
    # --- dtypes ---
    Refusal(
        ("launch.strategy", "model.dtype", "adapter.dtype"),
        lambda cfg, _: _by(*ZERO)(cfg) and not _trained_dtypes(cfg),
        "DeepSpeed trains a float32 copy of weights that are stored in 16 bits, which is another "
        "training than without it; set the dtype of what is trained (model.dtype with "
        "adapter.method=full, else "
        "adapter.dtype) to float32, or launch.strategy=fsdp",
    ),
    # --- offload ---
    Refusal(
        ("launch.strategy", "launch.sharding.offload_optimizer"),
        lambda cfg, _: not _by(*ZERO)(cfg) and cfg.launch.sharding.offload_optimizer is not Offload.none,
        "only ZeRO offloads optimiser states by themselves; set launch.strategy=zero2 or zero3, or "
        "launch.sharding.offload_parameters=cpu with launch.strategy=fsdp",
    ),
    Refusal(
        ("launch.strategy", "launch.sharding.offload_parameters"),
        lambda cfg, _: (
            _by(Strategy.ddp, Strategy.zero1, Strategy.zero2)(cfg)
            and cfg.launch.sharding.offload_parameters is not Offload.none
        ),
        "every rank holds all weights under this strategy; set launch.strategy=zero3 or fsdp",
    ),
    Refusal(
        ("launch.strategy", "launch.sharding.offload_parameters"),
        lambda cfg, _: (
            _by(Strategy.fsdp)(cfg) and cfg.launch.sharding.offload_parameters is Offload.nvme
        ),
        "FSDP2 offloads to host memory alone; set it to cpu, or launch.strategy=zero3",
    ),
    Refusal(
        ("launch.strategy", "launch.sharding.offload_parameters", "launch.device"),
        lambda cfg, _: (
            _by(Strategy.fsdp)(cfg)
            and cfg.launch.sharding.offload_parameters is Offload.cpu
            and cfg.launch.device is Device.cpu
        ),
        "weights are in host memory already; set launch.sharding.offload_parameters=none",
    ),
    Refusal(
        ("launch.strategy", "launch.sharding.offload_optimizer"),
        lambda cfg, _: (
            _by(Strategy.zero1, Strategy.zero2)(cfg)
            and cfg.launch.sharding.offload_optimizer is Offload.nvme
        ),
        "DeepSpeed offloads to a disk with ZeRO-3 alone (arXiv:2104.07857); set it to cpu, or "
        "launch.strategy=zero3",
    ),
    Refusal(
        ("launch.sharding.nvme",),
        lambda cfg, _: _on_disk(cfg) and not Path(str(cfg.launch.sharding.nvme)).is_dir(),
        "there is no such folder; name one on a local NVMe disk",
        here=True,
    ),
    Refusal(
        ("launch.sharding.nvme",),
        lambda cfg, _: _on_disk(cfg) and not _aio(),
        "DeepSpeed compiles what reads and writes a disk beside the training, and libaio, g++ or ninja "
        "is missing here; install them (libaio-dev, g++, ninja-build), or offload to cpu",
        here=True,
    ),
    Refusal(
        ("launch.offload_activations",),
        lambda cfg, _: (
            cfg.launch.offload_activations
            and not any(
                training(cfg, name).gradient_checkpointing for name in TRAIN if name in cfg.stages
            )
        ),
        "what is offloaded is what gradient checkpointing keeps, and no stage of this run does it; set "
        "STAGE.gradient_checkpointing=true, or launch.offload_activations=false",
    ),
    Refusal(
        ("launch.offload_activations", "launch.device"),
        lambda cfg, _: cfg.launch.offload_activations and cfg.launch.device is Device.cpu,
        "activations are in host memory already; set launch.offload_activations=false",
    ),
    # --- adapters ---
    Refusal(
        ("launch.strategy", "adapter.method", "model.new_tokens"),
        lambda cfg, _: (
            _by(Strategy.zero3, Strategy.fsdp)(cfg)
            and cfg.adapter.method is not Method.full
            and bool(cfg.model.new_tokens)
        ),
        "PEFT writes the rows of new tokens into an embedding that lies in shards; set "
        "launch.strategy=zero2 or ddp, or adapter.method=full",
    ),
    Refusal(
        ("launch.strategy", "adapter.dora"),
        lambda cfg, _: (
            _by(Strategy.zero3, Strategy.fsdp)(cfg)
            and cfg.adapter.method is not Method.full
            and cfg.adapter.dora
        ),
        "DoRA takes the length of whole rows of the base, which lies in shards; set "
        "launch.strategy=zero2 or ddp, or adapter.dora=false",
    ),
    # --- several models ---
    Refusal(
        ("launch.strategy", "adapter.method"),
        lambda cfg, _: (
            _by(Strategy.zero3)(cfg)
            and cfg.adapter.method is Method.full
            and cfg.dpo.loss not in REFERENCE_FREE
            and "reference" not in cfg.stages
        ),
        "the reference is a second model, which would lie whole on every rank; put 'reference' before "
        "'dpo' in stages, whose log-probabilities take its place, or set launch.strategy=fsdp",
        ("dpo",),
    ),
    Refusal(
        ("launch.strategy",),
        lambda cfg, _: _by(*ZERO)(cfg),
        "PPO trains policy and value function side by side in steps of its own, and DeepSpeed's engine "
        "takes one model; set launch.strategy=fsdp with adapter.method=full, or ddp",
        ("ppo",),
    ),
    Refusal(
        ("launch.strategy", "adapter.method"),
        lambda cfg, _: _by(Strategy.fsdp)(cfg) and cfg.adapter.method is not Method.full,
        "four roles take turns as adapters on one base, and what takes turns cannot stay gathered; set "
        "launch.strategy=ddp: the base is there once in any case",
        ("ppo",),
    ),
)
