"""GGUF files for llama.cpp and Ollama, written tensor by tensor.

Llama's layout, which Mistral shares. Names and keys are those of llama.cpp's convert_hf_to_gguf.py, by
the gguf package. Matrices are stored in the type asked for, vectors in float32. In files of 4 and 5 bits
embeddings and head have 8, since an error there reaches every token; llama.cpp gives the head 6
(llama-quant.cpp). A row that is no multiple of a block of 32 stays in float16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftpipe.choices import Gguf
from ftpipe.errors import ModelError
from ftpipe.export import program, source, vocabulary
from ftpipe.export.source import Source
from ftpipe.policy import Incoming

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KNOWN = ("llama", "mistral")  # model types that are written as llama.cpp's architecture "llama"
COARSE = (Gguf.q5_1, Gguf.q5_0, Gguf.q4_1, Gguf.q4_0)
EXACT = (Gguf.f32, Gguf.f16, Gguf.bf16, Gguf.q8_0)  # what has to pass export.max_kl
BLOCK = 32
ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Written:
    """A tensor as a GGUF file holds it."""

    name: str
    stored: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


def check(config: PreTrainedConfig) -> None:
    """Refuse a model that is not written here.

    Raises:
        ModelError: naming what is in the way, and what to do.
    """
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ModelError("export.gguf needs the gguf package: pip install 'ftpipe[gguf]'.")
    text = config.get_text_config()
    if text.model_type not in KNOWN:
        raise ModelError(
            f"GGUF files of {text.model_type} are not written here, only of {', '.join(KNOWN)}; "
            f"{vocabulary.OTHER}."
        )
    rope = text.rope_parameters["rope_type"]
    for holds, what in (
        (rope == "default", f"rope_type={rope}"),
        (text.hidden_act == "silu", f"hidden_act={text.hidden_act}"),
        (not getattr(text, "attention_bias", False), "attention_bias=true"),
        (not getattr(text, "mlp_bias", False), "mlp_bias=true"),
    ):
        if not holds:
            kind = f"{text.model_type} with {what}"
            raise ModelError(f"GGUF files of a {kind} are not written here; {vocabulary.OTHER}.")


def write(
    folder: Path,
    file: Path,
    kind: Gguf,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    name: str,
) -> None:
    """Write an exported folder as one GGUF file.

    Args:
        kind: how matrices are stored.
        ends: the tokens that end an answer, eos first.
        name: of the model, for people.

    Raises:
        ModelError: if the model or its tokenizer is none that is written here.
    """
    import gguf
    import numpy
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder)).get_text_config()
    check(config)
    weights = source.opened(Incoming(str(folder)))
    told = vocabulary.of(tokenizer, config.vocab_size)
    tensors = plan(weights, config, kind)
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, config, kind, name)
    vocabulary.write(writer, told, tokenizer, str(tokenizer.chat_template), ends)
    for one in tensors:
        size = prod(gguf.quant_shape_to_byte_shape(one.shape, one.kind))
        writer.add_tensor_info(one.name, one.shape, numpy.dtype(numpy.float32), size, raw_dtype=one.kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in tensors:
        writer.write_tensor_data(
            _packed(_turned(weights.read(one.stored), one.stored, config), one.kind)
        )
    writer.close()


def plan(weights: Source, config: PreTrainedConfig, kind: Gguf) -> list[Written]:
    """Return the tensors of a GGUF file in order, each with the type that it is stored in."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = []
    for stored, shape in weights.sizes.items():
        name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"GGUF has no name for the tensor {stored}; {vocabulary.OTHER}.")
        tensors.append(Written(name, stored, shape, _kind(name, shape, kind)))
    return tensors


def _kind(name: str, shape: Sequence[int], kind: Gguf) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind in COARSE and name in ENDS:
        kind = Gguf.q8_0
    if kind not in (Gguf.f32, Gguf.f16, Gguf.bf16) and shape[-1] % BLOCK:
        kind = Gguf.f16
    return types[kind.upper()]


def _turned(weight: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """Return a tensor in llama.cpp's order of rows.

    Rotary positions turn pairs of dimensions: halves of a head in transformers, neighbours in llama.cpp.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if name.endswith(f"{part}.weight")), None)
    if count is None:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(count, 2, rows // count // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _packed(weight: Tensor, kind: GGMLQuantizationType) -> NDArray[Any]:
    import gguf

    return gguf.quantize(weight.to(torch.float32).contiguous().numpy(), kind)


def _describe(writer: GGUFWriter, config: PreTrainedConfig, kind: Gguf, name: str) -> None:
    import gguf

    types = gguf.LlamaFileType
    file_type = types.ALL_F32 if kind is Gguf.f32 else types[f"MOSTLY_{kind.upper()}"]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def convert(script: Path, folder: Path, file: Path, kind: Gguf) -> None:
    """Have llama.cpp's own script write a GGUF file.

    Raises:
        ModelError: with its last words, if it fails.
        NoRoom: if the disk is full.
    """
    command = [sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", str(kind)]
    why = program.failure(command, folder)
    if why is None and not file.is_file():
        why = "it wrote nothing"
    if why is not None:
        raise ModelError(f"export.converter={script} failed: {why}.")


def readable(config: PreTrainedConfig) -> bool:
    """Whether transformers can load a GGUF file of this model again."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return config.get_text_config().model_type in GGUF_SUPPORTED_ARCHITECTURES
