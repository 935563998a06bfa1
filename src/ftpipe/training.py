"""From the configuration to a Trainer's arguments: what every stage that trains has in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from ftpipe import checkpoints, launch_settings, modeling
from ftpipe.checkpoints import CHECKPOINTS, tokens_seen
from ftpipe.choices import Device, Optimizer, Precision, Strategy
from ftpipe.errors import ConfigError
from ftpipe.logs import on_terminal, say
from ftpipe.stopping import Stopped
from ftpipe.trainer_callbacks import Beginning, Continuity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

    from ftpipe.config import LaunchConfig
    from ftpipe.trace import Trace
    from ftpipe.trainer import Ordered
    from ftpipe.training_config import TrainingConfig

# Our word -> transformers' OptimizerNames
OPTIMIZERS = {
    Optimizer.adamw: "adamw_torch_fused",
    Optimizer.adamw_8bit: "adamw_bnb_8bit",
    Optimizer.paged_adamw_32bit: "paged_adamw_32bit",
    Optimizer.paged_adamw_8bit: "paged_adamw_8bit",
    Optimizer.adafactor: "adafactor",
    Optimizer.rmsprop: "rmsprop",
    Optimizer.sgd: "sgd",
}


def arguments(training: TrainingConfig, launch: LaunchConfig, seed: int, out: Path) -> dict[str, Any]:
    """Return transformers' TrainingArguments; nothing is left to their defaults silently."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = launch.device is Device.cuda
    zero = world > 1 and launch.strategy in launch_settings.STAGES
    return {
        "output_dir": str(out / CHECKPOINTS),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not on_gpu,
        # what is optimised
        "learning_rate": training.learning_rate,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": launch.micro_batch_size,
        "gradient_accumulation_steps": training.batch_size // (launch.micro_batch_size * world),
        "optim": OPTIMIZERS[training.optimizer],
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler_type": str(training.scheduler),
        "warmup_steps": (
            training.warmup_ratio if training.warmup_steps is None else training.warmup_steps
        ),
        "average_tokens_across_devices": True,
        # rows
        "remove_unused_columns": False,  # the collators fetch rows by the columns they are given
        "dataloader_pin_memory": on_gpu,
        # number formats and memory
        "bf16": launch.precision is Precision.bf16 and not zero,  # DeepSpeed has an autocast of its own
        "fp16": launch.precision is Precision.fp16,
        "tf32": launch.tf32 if on_gpu else None,
        "gradient_checkpointing": training.gradient_checkpointing,
        "activation_checkpointing_kwargs": checkpointing(launch),
        # what is shown and kept
        "logging_steps": training.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": not on_terminal(),
        "eval_strategy": "no",
        "save_strategy": "steps" if training.save_every else "no",
        "save_steps": training.save_every or 1,
        "save_total_limit": training.keep_checkpoints,
    }


def checkpointing(launch: LaunchConfig) -> dict[str, bool]:
    """Return how activations are computed again in the backward pass, and where inputs lie meanwhile.

    Under ZeRO-3 by PyTorch's older way, which computes a layer again as a whole: the newer one compares
    what it saved with frozen weights that are gone by then (github.com/huggingface/trl/issues/2514).
    """
    older = launch.strategy is Strategy.zero3
    return {"use_reentrant": older, "offload": launch.offload_activations}


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Refuse rows longer than the positions the model knows: it would answer with noise, silently.

    Raises:
        ConfigError: naming the length that fits.
    """
    known = modeling.positions(model.config.get_text_config())
    if known is not None and longest > known:
        raise ConfigError(
            f"the longest row has {longest:,} tokens, but the model knows {known:,} positions; "
            f"set data.max_length={known} or lower."
        )


def grouping(training: TrainingConfig) -> int | None:
    """Return how many rows an ``Order`` sorts together by length; None: rows come as drawn."""
    return training.batch_size if training.group_by_length else None


def last_checkpoint(out: Path, launch: LaunchConfig) -> Path | None:
    """Return what a stage goes on from, or None. Call on every rank: the first one looks, for all.

    Raises:
        ConfigError: if this training is shared out in a way that cannot go on from it.
    """
    strategy, ranks = launch_settings.in_force(launch)
    found: list[Path | ConfigError | None] = [None]
    if os.environ.get("RANK", "0") == "0":
        try:
            found = [checkpoints.last_checkpoint(out / CHECKPOINTS, strategy, ranks)]
        except ConfigError as error:
            found = [error]
    if ranks > 1:
        broadcast_object_list(found)
    if isinstance(found[0], ConfigError):
        raise found[0]
    return found[0]


def train(
    trainer: Ordered, checkpoint: Path | None, trace: Trace, first: Callable[[], object]
) -> dict[str, float]:
    """Train to the end, from a checkpoint if there is one; return what ``summary`` says of it.

    Args:
        trace: takes what the steps did.
        first: called on every rank before the first step, when the model is where it is trained, and in
            shards if it is to be.

    Raises:
        Stopped: if it was asked to stop, and has saved a checkpoint.
    """
    if trainer.is_world_process_zero():
        checkpoints.drop_torn(Path(str(trainer.args.output_dir)), checkpoint)
    trace.begin(checkpoints.step_of(checkpoint) if checkpoint else 0)
    trainer.trace = trace

    def begin() -> None:
        if checkpoint is None:
            trace.initial(trainer.weights())
        first()

    beginning = Beginning(begin)
    trainer.add_callback(beginning)
    if checkpoint is not None:
        say(f"continuing from {checkpoint.name}")
        trainer.tokens_seen = tokens_seen(checkpoint)
    before = trainer.tokens_seen
    continuity = Continuity(trainer, checkpoint)
    trainer.add_callback(continuity)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if continuity.stopped:
        raise Stopped(f"after step {trainer.state.global_step} of {trainer.state.max_steps}")
    seconds = result.metrics["train_runtime"] - beginning.seconds
    return summary(trainer.state, trainer.tokens_seen, before, seconds)


def summary(state: TrainerState, tokens: int, before: int, seconds: float) -> dict[str, float]:
    """Return first and last loss, tokens seen, speed and, on a GPU, peak memory.

    Args:
        tokens: seen in all.
        before: seen by the attempts that this one continues, in ``seconds`` that are not counted.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    metrics = {
        "steps": float(state.global_step),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "tokens": float(tokens),
        "tokens_per_second": (tokens - before) / seconds,
    }
    return metrics | peak_gpu_memory()


def peak_gpu_memory() -> dict[str, float]:
    """Return the most memory this rank held on its GPU, if it has one."""
    if not torch.cuda.is_available():
        return {}
    return {"peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30}
