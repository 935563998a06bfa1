"""Where the weights of a model lie, tensor by tensor, and what its modules make of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ftpipe.errors import ModelError
from ftpipe.tokenizer import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ftpipe.policy import Incoming

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as transformers names them
REMEDY = "put 'merge' before 'export', which takes any layout but holds the whole model in memory"


@dataclass(frozen=True)
class Source:
    """Weights on disk: nothing is read before it is asked for.

    Attributes:
        files: of each tensor the file it is in.
        sizes: and its shape.
    """

    files: dict[str, str]
    sizes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Return one tensor as it is stored."""
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def opened(start: Incoming) -> Source:
    """Return the weights of a folder or of a hub id with its commit.

    Raises:
        ModelError: if there are none in safetensors, or a file is damaged.
    """
    from transformers.utils.hub import cached_file

    def place(name: str) -> str | None:
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
        found: str | None = cached_file(start.weights, name, revision=start.revision, **options)
        return found

    try:
        index = place(INDEX) if place(ONE) is None else None  # in the order of transformers
        if index is not None:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        else:
            names = [ONE]
        found = [place(name) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the weights of {start.weights} cannot be read: {first_line(error)}."
        ) from None
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise ModelError(f"{start.weights} has no {missing[0]}; weights have to be in safetensors.")
    return listed([path for path in found if path is not None])


def listed(paths: list[str]) -> Source:
    """Return where each tensor of safetensors files lies, and its size.

    Raises:
        ModelError: if one cannot be read.
    """
    files, sizes = {}, {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {first_line(error)}.") from None
            for name in file.keys():  # noqa: SIM118  it is no mapping
                files[name] = path
                sizes[name] = tuple(file.get_slice(name).get_shape())
    return Source(files, sizes)


def skeleton(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model of this configuration whose weights take no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return made  # type: ignore[no-any-return]


def names(model: PreTrainedModel, stored: Source) -> dict[str, str]:
    """Return under which name each weight of a model is stored; tied ones once.

    Stored names may be older ones, or lack the part that holds them; transformers knows what they mean
    (``embed_out`` of GPT-NeoX is ``lm_head``, ``h.0`` of GPT-2 is ``transformer.h.0``).

    Raises:
        ModelError: if a weight is stored in parts or with others, or not at all.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state: Any = model.state_dict()
    told = {
        own: rename_source_key(own, renamings, converters, model.base_model_prefix, state)
        for own in stored.files
    }
    known = {name: own for own, (name, converted) in told.items() if converted is None}
    weights = dict(model.named_parameters(remove_duplicate=False))
    kept = [name for name in state if name not in weights]  # no weights, but saved with them
    wanted = [*dict(model.named_parameters()), *kept]
    for name in wanted:
        if name not in known or name in kept:
            raise ModelError(
                f"{type(model).__name__} has {name}, which is not stored as one weight; {REMEDY}."
            )
    return {name: known[name] for name in wanted}


def in_four_bits(model: PreTrainedModel, quantization: Any) -> dict[str, nn.Parameter]:
    """Return the weights that QLoRA holds in 4 bits, as transformers chooses them.

    Args:
        model: a skeleton, whose modules are replaced.
        quantization: the settings (``modeling.quantization``).
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(quantization).preprocess_model(model=model, device_map=None)
    return {
        name: weight
        for name, weight in model.named_parameters()
        if type(weight).__name__ == "Params4bit"
    }
