"""What accelerate and DeepSpeed are told, from one typed configuration.

Both files lie beside ``run.yaml``. ``auto`` in DeepSpeed's is what transformers fills in from the
stage's own settings: batch sizes and the norm at which gradients are clipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.artifacts import write_atomic
from ftpipe.choices import Device, Method, Offload, Precision, Strategy

if TYPE_CHECKING:
    from ftpipe.config import LaunchConfig, RunConfig

DEEPSPEED = "deepspeed.json"
STAGES = {Strategy.zero1: 1, Strategy.zero2: 2, Strategy.zero3: 3}


def in_force(launch: LaunchConfig) -> tuple[Strategy, int]:
    """Return how this training is shared out, and between how many ranks; one shares out nothing."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Strategy.ddp if ranks == 1 else launch.strategy, ranks


def shared_out(cfg: RunConfig, processes: int, folder: Path) -> dict[str, Any]:
    """Return what accelerate's settings say of a strategy that shards; write DeepSpeed's to ``folder``.

    Args:
        processes: ranks; a single one shards nothing.

    Returns:
        keys and values; None where a key must be missing.
    """
    strategy = cfg.launch.strategy
    if processes == 1 or strategy not in STAGES:  # sharding.py shards by FSDP2, on top of plain ranks
        return {}
    file = folder / DEEPSPEED
    write_atomic(file, json.dumps(deepspeed(cfg), indent=1) + "\n")
    settings = {
        "deepspeed_config_file": str(file),
        "deepspeed_multinode_launcher": "standard",  # torch's own
        "zero3_init_flag": False,  # weights are loaded as for one process: quantised, grown, adapted
    }
    # the precision is in DeepSpeed's file, and accelerate refuses to be told twice
    return {"distributed_type": "DEEPSPEED", "mixed_precision": None, "deepspeed_config": settings}


def deepspeed(cfg: RunConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings (deepspeed.ai/docs/config-json).

    The weights keep their dtypes, as without DeepSpeed, and products are computed in the run's precision
    by autocast; DeepSpeed's own ``bf16`` would round every trained weight of a step to 16 bits.
    """
    launch = cfg.launch
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": _zero(cfg),
        "zero_allow_untested_optimizer": True,  # combinations.py says which ones
        # DeepSpeed's Adam is compiled on the machine; torch's is needed there too, and knows both places
        "zero_force_ds_cpu_optimizer": False,
    }
    if launch.precision is not Precision.fp32:
        dtype = {Precision.bf16: "bfloat16"}[launch.precision]
        # by default DeepSpeed rounds what linear layers send, weights and gradients, to this dtype too
        safe: list[str] = []
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype,
            "lower_precision_safe_modules": safe,
        }
    if Offload.nvme in (launch.sharding.offload_optimizer, launch.sharding.offload_parameters):
        settings["aio"] = {"block_size": 2**20, "queue_depth": 8, "overlap_events": True}
    return settings


def _zero(cfg: RunConfig) -> dict[str, Any]:
    launch = cfg.launch
    sharding, stage = launch.sharding, STAGES[launch.strategy]
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": launch.device is Device.cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": sharding.bucket,
        "allgather_bucket_size": sharding.bucket,
    }
    for name, where in (
        ("offload_optimizer", sharding.offload_optimizer),
        ("offload_param", sharding.offload_parameters),
    ):
        if where is not Offload.none:
            zero[name] = {"device": str(where), "pin_memory": launch.device is Device.cuda}
        if where is Offload.nvme:
            zero[name]["nvme_path"] = sharding.nvme
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": sharding.bucket,
            "stage3_max_live_parameters": 10 * sharding.bucket,
            # Weights below this stay whole on every rank, gathered together after a step: they must be
            # of one dtype then, which those of an adapter or a score on a 16-bit base are not
            "stage3_param_persistence_threshold": 0 if cfg.adapter.method is not Method.full else 10_000,
            "stage3_gather_16bit_weights_on_model_save": False,  # sharding.py writes the weights
        }
    return zero
