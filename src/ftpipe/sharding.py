"""Models whose weights are shared out between ranks: shard them, gather them, keep the ranks in step.

DeepSpeed shards a model when it makes its engine (ZeRO-3); FSDP2 shards it here. Weights that are shared
out are gathered by hooks of the modules they belong to, in every forward and backward pass, by all ranks
at once: so each rank must make as many passes as every other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftpipe.choices import Offload, Strategy
from ftpipe.modeling import SCORE_HEADS

if TYPE_CHECKING:
    from ftpipe.config import ShardingConfig


def fully_shard(
    model: nn.Module,
    sharding: ShardingConfig,
    compute: torch.dtype | None,
    hold: bool = True,
    summed: bool = False,
) -> None:
    """Share out a model's weights by FSDP2, in place: each repeated layer is a group, the rest is one.

    Embeddings, last norm and output head stay gathered from the forward pass to the backward pass. TRL's
    fused head reads the head's weight without calling its module: in a group of its own it would be
    found in pieces, and its gradient would be that of one rank alone.

    Args:
        compute: dtype of gathered weights; None: their own. Gradients are added up in float32.
        hold: keeps that last group gathered after a forward pass, for the backward pass to come.
        summed: gradients are the sum over ranks, not their mean.
    """
    from torch.distributed import fsdp

    host = (
        fsdp.CPUOffloadPolicy() if sharding.offload_parameters is Offload.cpu else fsdp.OffloadPolicy()
    )
    options: dict[str, Any] = {"offload_policy": host}
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    whole = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part in SCORE_HEADS for part in name.split(".")):
            fsdp.fully_shard(module, mp_policy=whole, **options)  # a score is computed in float32
    for layer in layers(model):
        fsdp.fully_shard(layer, mp_policy=mixed, reshard_after_forward=sharding.reshard, **options)
    fsdp.fully_shard(model, mp_policy=mixed, reshard_after_forward=not hold, **options)
    if summed:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    if hasattr(model, "generate"):
        fsdp.register_fsdp_forward_method(model, "generate")
    for part in (model, getattr(model, "get_base_model", lambda: model)()):
        part._is_fsdp_managed_module = True  # then transformers' generation keeps ranks in step


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a model, as its author names their class; all of them once."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Gather what is to be saved to the first rank's host memory, weight by weight; elsewhere nothing.

    No rank's device holds more than one whole weight at a time. Of a model with an adapter, only what is
    trained is gathered. Call on all ranks.
    """
    adapted = hasattr(model, "peft_config")
    first = dist.get_rank() == 0
    lasting = list(model.state_dict())  # on all ranks: FSDP2 frees here what it still holds gathered
    kept: dict[int, Tensor] = {}
    state = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if adapted and not weight.requires_grad:
            continue
        if id(weight) not in kept:  # a tied one is gathered once, and stays tied
            with gathered(weight) as full:
                kept[id(weight)] = full.detach().cpu().clone() if first else torch.empty(0)
        state[name] = kept[id(weight)]
    if not first:
        return {}
    buffers = {} if adapted else dict(model.named_buffers())
    return state | {name: tensor.cpu() for name, tensor in buffers.items() if name in lasting}


@contextmanager
def gathered(weight: nn.Parameter) -> Iterator[Tensor]:
    """Give a weight whole, however it is shared out. Call on all ranks."""
    from torch.distributed.tensor import DTensor

    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.data
    elif isinstance(weight.data, DTensor):
        yield weight.data.full_tensor()
    else:
        yield weight.data


def in_step(batches: Sequence[list[int]], most: int) -> Iterator[tuple[list[int], bool]]:
    """Yield batches and whether they count, as many on every rank.

    A rank that has fewer repeats the first row, for the passes that others make.

    Args:
        most: batches of the rank that has the most.
    """
    for at in range(most):
        yield (batches[at], True) if at < len(batches) else ([0], False)


def found(model: nn.Module) -> Strategy | None:
    """Return how a model was prepared for several ranks, as it shows; None: not at all.

    accelerate leaves a strategy out without a word where it thinks that it does not fit the machine.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, FSDPModule):
        return Strategy.fsdp
    if isinstance(model, DistributedDataParallel):
        return Strategy.ddp
    stage = getattr(model, "zero_optimization_stage", None)
    return {1: Strategy.zero1, 2: Strategy.zero2, 3: Strategy.zero3}[stage()] if stage else None


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what FSDP2's ranks hold of the trained weights and the optimiser's state, each its own part.

    Any number of ranks can read it. Call on all ranks.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_state(model, optimizer), checkpoint_id=str(folder))


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what ``save_shards`` wrote, each rank its own part. Call on all ranks."""
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.checkpoint.state_dict_loader import load

    held = _state(model, optimizer)
    load(held, checkpoint_id=str(folder))
    options = states.StateDictOptions(ignore_frozen_params=True, strict=False)
    states.set_state_dict(
        model,
        optimizer,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
        options=options,
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(ignore_frozen_params=True)
    weights, held = states.get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": held}


def full(value: Tensor) -> Tensor:
    """Return a tensor whole, in host memory on the first rank; elsewhere empty. Call on all ranks."""
    from torch.distributed.tensor import DTensor

    whole_ = value.full_tensor() if isinstance(value, DTensor) else value
    return whole_.detach().cpu() if dist.get_rank() == 0 else torch.empty(0)


def put(held: Tensor, into: Tensor) -> None:
    """Copy a whole tensor into one that may be in shards. Call on all ranks, each with the whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(into, DTensor):
        held = distribute_tensor(held.to(into.device), into.device_mesh, into.placements)
    into.copy_(held)


def clip(weights: Sequence[nn.Parameter], most: float) -> float:
    """Clip gradients, of which some are in shards, to a norm together; return the norm before.

    As ``torch.nn.utils.clip_grad_norm_``, which takes no mixture of both.
    """
    from torch.distributed.tensor import DTensor

    squares = {True: torch.zeros(()), False: torch.zeros(())}  # of shards, and of what every rank holds
    for weight in weights:
        assert weight.grad is not None
        parts = isinstance(weight.grad, DTensor)
        own = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        squares[parts] = squares[parts].to(own.device) + own.float().square().sum()
    shards = squares[True].to(squares[False].device)
    dist.all_reduce(shards)
    norm = float((shards + squares[False]).sqrt())
    for weight in weights:
        assert weight.grad is not None
        weight.grad.mul_(min(1.0, most / (norm + 1e-6)))
    return norm


def alike(weights: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return weights in shards and others apart: an optimiser's kernels take no mixture of both."""
    from torch.distributed.tensor import DTensor

    every = list(weights)
    parts = [[one for one in every if isinstance(one, DTensor) is kind] for kind in (True, False)]
    return [part for part in parts if part]
