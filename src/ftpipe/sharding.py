"""Models whose weights are shared out between ranks: shard them, gather them, keep the ranks in step.

DeepSpeed shards a model when it makes its engine (ZeRO-3); FSDP2 shards it here. Weights that are shared
out are gathered by hooks of the modules they belong to, in every forward and backward pass, by all ranks
at once: so each rank must make as many passes as every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftpipe.modeling import SCORE_HEADS

if TYPE_CHECKING:
    from accelerate.utils import FullyShardedDataParallelPlugin


def fully_shard(
    model: nn.Module, plugin: FullyShardedDataParallelPlugin, compute: torch.dtype | None
) -> None:
    """Share out a model's weights by FSDP2, in place: each repeated layer is a group, the rest is one.

    Embeddings, last norm and output head stay gathered from the forward pass to the backward pass. TRL's
    fused head reads the head's weight without calling its module: in a group of its own it would be found
    in pieces, and its gradient would be that of one rank alone.

    Args:
        plugin: accelerate's, with what the run's settings say.
        compute: dtype of weights while they are gathered; None: their own. Gradients are summed in float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(model, FSDPModule):
        return
    options: dict[str, Any] = {"offload_policy": plugin.cpu_offload}
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part in SCORE_HEADS for part in name.split(".")):
            fully_shard(module, mp_policy=whole, **options)  # a score is computed in float32
    for layer in layers(model):
        fully_shard(
            layer, mp_policy=mixed, reshard_after_forward=plugin.reshard_after_forward, **options
        )
    fully_shard(model, mp_policy=mixed, reshard_after_forward=False, **options)


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
    lasting = {name for name in model.state_dict() if name not in state}
    buffers = {name: tensor.cpu() for name, tensor in model.named_buffers() if name in lasting}
    return state | ({} if adapted else buffers)


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
