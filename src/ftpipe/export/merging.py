"""What a policy's weights are once its adapter is written into them, tensor by tensor.

LoRA (arXiv:2106.09685): W + s B A, where s is alpha / r, or alpha / sqrt(r) under rsLoRA
(arXiv:2312.03732). DoRA (arXiv:2402.09353, eq. 5): m (W + s B A) / ||W + s B A||, of each row of the
matrix that maps inputs to outputs. Computed in float32 and rounded once, to the format of the output.
Of QLoRA's base, W is what its 4 bits stand for (arXiv:2305.14314): the adapter was trained on that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ftpipe import modeling
from ftpipe.choices import Method
from ftpipe.errors import ModelError
from ftpipe.export import shards, source
from ftpipe.export.source import Source
from ftpipe.policy import ADAPTER, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ftpipe.config import RunConfig
    from ftpipe.policy import Incoming

PREFIX = "base_model.model."  # of PEFT's names
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDED = {"lora_embedding_A": A, "lora_embedding_B": B}  # of an embedding
ROWS = "token_adapter.trainable_tokens_delta"  # whole rows, whatever their name says


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and weights, by the module they belong to.

    Attributes:
        weights: of each module the weights, by their names in it.
        rows: of a module which of its rows the adapter holds whole.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Return s: alpha / r, or alpha / sqrt(r)."""
        r = self.settings["r"]
        return float(self.settings["lora_alpha"] / (math.sqrt(r) if self.settings["use_rslora"] else r))


def read_adapter(start: Incoming) -> Adapter | None:
    """Return the policy's adapter, or None where it is a whole model.

    Raises:
        ModelError: if it has weights of a kind that is not merged here.
    """
    if start.adapter is None:
        return None
    settings = json.loads((start.adapter / ADAPTER).read_text(encoding="utf-8"))
    rows: dict[str, list[int]] = settings.get("trainable_token_indices") or {}
    weights: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(start.adapter / ADAPTER_WEIGHTS), "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            kind = next((k for k in (A, B, MAGNITUDE, ROWS, *EMBEDDED) if name.endswith(f".{k}")), None)
            if kind is None or settings.get("rank_pattern") or settings.get("alpha_pattern"):
                what = "ranks of its own for some modules" if kind else name
                raise ModelError(
                    f"the adapter {start.adapter} has {what}, which cannot be merged here; "
                    f"{source.REMEDY}."
                )
            module = name.removeprefix(PREFIX).removesuffix(f".{kind}")
            weights.setdefault(module, {})[EMBEDDED.get(kind, kind)] = file.get_tensor(name)
    return Adapter(settings, weights, rows)


def added(weight_OI: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return W + s B A in float32, with DoRA's lengths where there are any.

    Args:
        weight_OI: the matrix from I inputs to O outputs.
        parts: ``A`` (r, I), ``B`` (O, r), and DoRA's ``MAGNITUDE`` (O).
    """
    merged_OI = weight_OI.float() + scale * (parts[B].float() @ parts[A].float())
    if MAGNITUDE in parts:
        length_O1 = torch.linalg.norm(merged_OI, dim=1, keepdim=True)
        merged_OI = merged_OI * (parts[MAGNITUDE].float()[:, None] / length_O1)
    return merged_OI


@dataclass
class Merged:
    """The weights of a merged policy: each is computed when it is asked for, and none is kept.

    Attributes:
        stored: under which name the base has each of them.
        config: of the merged model.
        dtype: of what comes out.
        frozen: the dtype that the base was trained in, where it was rounded to it first: under QLoRA.
        turned: weights that map inputs to outputs by their columns: embeddings, and GPT-2's.
        bits: QLoRA's 4-bit weights, as empty ones that know their settings.
    """

    base: Source
    adapter: Adapter | None
    stored: Mapping[str, str]
    config: PreTrainedConfig
    dtype: torch.dtype
    frozen: torch.dtype | None = None
    turned: frozenset[str] = frozenset()
    bits: Mapping[str, nn.Parameter] = field(default_factory=dict)
    device: str = "cpu"
    vocabulary: Mapping[str, int] = field(default_factory=dict)  # of a grown matrix its rows

    def names(self) -> list[str]:
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        rows, *others = self.base.sizes[self.stored[name]]
        return (self.vocabulary.get(name, rows), *others)

    def tensor(self, name: str) -> Tensor:
        """Return one merged weight, in the dtype that comes out."""
        weight = self.base.read(self.stored[name])
        if self.frozen is not None:
            weight = self._as_trained(name, weight.to(self.frozen))
        parts: Mapping[str, Tensor] = {}
        if self.adapter is not None and name.endswith(".weight"):
            parts = self.adapter.weights.get(name.removesuffix(".weight"), {})
        if B in parts:
            assert self.adapter is not None
            turned = name in self.turned
            merged = added(weight.T if turned else weight, parts, self.adapter.scale)
            weight = merged.T if turned else merged
        grown = self.vocabulary.get(name, len(weight)) - len(weight)
        if grown:
            weight = torch.cat([weight, weight.new_zeros(grown, *weight.shape[1:])])
        if ROWS in parts:
            assert self.adapter is not None
            rows = torch.tensor(self.adapter.rows[name.removesuffix(".weight")])
            weight = weight.float().index_copy(0, rows, parts[ROWS].float())
        return weight.to(self.dtype).contiguous()

    def write(self, folder: Path, most: int) -> list[str]:
        """Write all weights under the names that the base has them by; return the files' names.

        Args:
            most: bytes of one file.
        """
        named = {own: name for name, own in self.stored.items()}
        shapes = {own: self.shape(name) for own, name in named.items()}
        return shards.write(folder, shapes, lambda own: self.tensor(named[own]), self.dtype, most)

    def _as_trained(self, name: str, weight: Tensor) -> Tensor:
        """Return what the 4 bits of a weight stand for; itself where it was never in 4 bits."""
        if name not in self.bits:
            return weight
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn.modules import Params4bit

        turned = name in self.turned  # transformers turns GPT-2's before it quantises them
        given = self.bits[name].__dict__
        packed: Any = Params4bit(weight.T if turned else weight, requires_grad=False, **given)
        packed = packed.to(self.device)
        unpacked: Tensor = dequantize_4bit(packed.data, packed.quant_state).cpu()
        return unpacked.T if turned else unpacked


def merged(cfg: RunConfig, start: Incoming, dtype: torch.dtype, tokens: int) -> Merged:
    """Return the weights of a policy with its adapter in them, none of them computed yet.

    Args:
        dtype: of the output.
        tokens: of the policy's tokenizer: an embedding with fewer rows grows to as many.

    Raises:
        ModelError: if the base cannot be read weight by weight, or the adapter does not fit it.
    """
    config = modeling.whole_config(start.weights, start.revision, cfg.model.trust_remote_code)
    stored, adapter = source.opened(start), read_adapter(start)
    model = source.skeleton(config, cfg.model.trust_remote_code)
    found = source.names(model, stored)
    quantised = adapter is not None and cfg.adapter.method is Method.qlora
    turned = _turned(model)
    grown = _grown(model, start, tokens)
    if adapter is not None:
        _check(adapter, model, found)
    bits = source.in_four_bits(model, modeling.quantization(cfg)) if quantised else {}
    made = Merged(
        base=stored,
        adapter=adapter,
        stored=found,
        config=config,
        dtype=dtype,
        frozen=modeling.base_dtype(cfg) if quantised else None,
        turned=turned,
        bits=bits,
        device=str(modeling.device(cfg)),
        vocabulary=grown,
    )
    text = config.get_text_config()
    text.vocab_size = max([text.vocab_size, *grown.values()])
    config.dtype = dtype
    return made


def _turned(model: PreTrainedModel) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Embedding, Conv1D)
    return frozenset(f"{name}.weight" for name, part in model.named_modules() if isinstance(part, kinds))


def _grown(model: PreTrainedModel, start: Incoming, tokens: int) -> dict[str, int]:
    """Return the rows that embeddings and head have with the tokens new to them.

    As ``modeling.add_rows`` has it: a matrix that has the rows already keeps its size.
    """
    before = len(modeling.weight_of(model.get_input_embeddings()))
    if not start.new_tokens or start.adapter is None or tokens <= before:
        return {}
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    return {
        f"{name}.{own}": tokens
        for name, part in model.named_modules(remove_duplicate=True)
        if part in parts
        for own, _ in part.named_parameters(recurse=False)
    }


def _check(adapter: Adapter, model: PreTrainedModel, found: Mapping[str, str]) -> None:
    """Refuse an adapter with parts for which the base has no weight of its own."""
    head = model.get_output_embeddings()
    shared = head is not None and model.get_input_embeddings().weight is head.weight
    both = {id(model.get_input_embeddings()), id(head)} if shared else set()
    known = dict(model.named_modules())
    for module, parts in adapter.weights.items():
        if module not in known or (f"{module}.weight" not in found and id(known[module]) not in both):
            raise ModelError(
                f"the adapter has weights for {module}, for which {type(model).__name__} has none; "
                "delete its folder to build it again."
            )
        if B in parts and id(known[module]) in both:
            raise ModelError(
                f"the adapter changes {module}, whose matrix is the output head's as well, so written "
                "into it it would change both; leave it out of adapter.targets."
            )
