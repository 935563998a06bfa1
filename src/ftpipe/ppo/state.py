"""Checkpoints at the end of a rollout's updates. Whole or not there; nothing in them is executable.

All that is random in PPO is a function of the seed and the rollout (``generation.uniforms``, the order
of minibatches), and so is the learning rate; so weights, optimiser, KL controller and counters are all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LRScheduler

from ftpipe import checkpoints, sharding
from ftpipe.artifacts import sync, write_atomic
from ftpipe.errors import ConfigError

WEIGHTS, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
CHECKPOINT = "checkpoint"  # and the number of finished rollouts


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        rollouts: finished.
        tokens: drawn so far.
        updates: optimiser steps so far.
        kl: state of the KL controller.
        health: state of ``health.Watch``.
        first, last: measures of the first and the last rollout.
    """

    rollouts: int = 0
    tokens: int = 0
    updates: int = 0
    kl: dict[str, float] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


def save(
    folder: Path,
    progress: Progress,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    schedule: LRScheduler,
    keep: int,
) -> None:
    """Write a state, sealed or not at all, and leave the newest so many checkpoints. Call on one rank.

    Args:
        folder: its own; one that is not named ``checkpoint-N`` is for a person, nothing resumes from it.
        weights: all that is trained, by name.
        optimizer: its state.
        schedule: of the learning rate.
    """
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors, rest = _apart(optimizer)
    save_file(_whole(weights), str(partial / WEIGHTS))
    save_file(_whole(tensors), str(partial / OPTIMIZER))
    told = {"optimizer": rest, "schedule": schedule.state_dict(), "progress": asdict(progress)}
    write_atomic(partial / STATE, json.dumps(told))
    checkpoints.seal(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    checkpoints.keep_newest(folder.parent, keep)


def last(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None; a damaged one is passed over with a warning."""
    return checkpoints.newest_whole(folder)


def restore(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
) -> Progress:
    """Put weights, optimiser and schedule in place; return how far the run was.

    Raises:
        ConfigError: if a value function lay in shards then and does not now, or the other way round.
    """
    told = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if len(told["optimizer"]["param_groups"]) != len(optimizer.param_groups):
        raise ConfigError(
            f"{checkpoint} was written under another launch.strategy; set the one that the run began "
            f"with, or delete {checkpoint.parent} to begin anew."
        )
    held = load_file(str(checkpoint / WEIGHTS))
    assert held.keys() == weights.keys(), "the fingerprint lets no other model come here"
    with torch.no_grad():
        for name, weight in weights.items():
            sharding.put(held[name], weight)
    tensors = load_file(str(checkpoint / OPTIMIZER))
    optimizer.load_state_dict(_together(tensors, told["optimizer"]))
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    for path, value in tensors.items():  # torch has rounded them to the weights' own dtype
        at, *_, name = path.split("/")
        state = optimizer.state[trained[int(at)]]
        state[name] = value.to(state[name].device)
        weight = trained[int(at)]
        if isinstance(weight, DTensor) and value.dim():
            state[name] = distribute_tensor(state[name], weight.device_mesh, weight.placements)
    schedule.load_state_dict(told["schedule"])
    return Progress(**told["progress"])


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}


def _apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimiser's state by ``weight/name``, and the rest as JSON takes it."""
    values = dict(_leaves(state["state"]))
    tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
    numbers = {path: value for path, value in values.items() if path not in tensors}
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def _leaves(state: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its path; bitsandbytes has its tensors in a dict of their own."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _together(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**tensors, **rest["numbers"]}.items():
        weight, *around, name = path.split("/")
        held = state.setdefault(int(weight), {})
        for each in around:
            held = held.setdefault(each, {})
        held[name] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
