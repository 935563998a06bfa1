"""The weights of a model by its configuration alone: a table of linear layers for each architecture.

Names and shapes are those of transformers' own modules, and so are the defaults of keys that a
configuration leaves out. Nothing is loaded, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ftpipe.errors import ConfigError, nearest

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Linear:
    """A linear layer by its name within its block; ``outs`` x ``ins`` weights."""

    name: str
    ins: int
    outs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.ins * self.outs + (self.outs if self.bias else 0)


@dataclass(frozen=True)
class Shape:
    """A decoder: its sizes, and what is in one of its equal layers.

    Attributes:
        inner: width within the MLP.
        linears: of one layer.
        norms: weights of one layer's norms.
        last: weights of the norm behind the last layer.
        places: rows of a learned embedding of positions; 0: there is none.
        within: name of the list of layers.
        embedding, head: names of the token embedding and the output head.
        rms: norms are RMSNorm, which transformers computes in float32 out of elementary operations.
        gated: the MLP multiplies two branches.
        gelu: the activation is written out of elementary operations (``gelu_new``).
        rotary: "whole" or "part" of each head is rotated by position; "": none.
        parallel: attention and MLP read the same input and are added at once; 2: by a norm each.
        kernel: "flash": PyTorch's fused attention; "math": written out in float32, since heads of keys
            are fewer than those of queries, or padded rows need it; "eager": by the model's own code.
        fused: queries, keys and values come from one linear layer.
        rounded: attention written out takes its softmax in the dtype of the scores, not in float32.
        dropout: share that is dropped in training, of the residual stream and of attention.
    """

    kind: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head: int
    inner: int
    linears: tuple[Linear, ...]
    norms: int
    last: int
    within: str
    embedding: str
    output: str = "lm_head"
    tied: bool = False
    places: int = 0
    place_name: str = ""
    positions: int = 0  # that it knows
    rms: bool = False
    gated: bool = False
    gelu: bool = False
    rotary: str = "whole"
    parallel: int = 0
    kernel: str = "flash"
    fused: bool = False
    rounded: bool = False
    dropout: tuple[float, float] = (0.0, 0.0)

    @property
    def attention(self) -> int:
        """Return the width of all heads of queries."""
        return self.heads * self.head

    @property
    def layer(self) -> int:
        """Return the weights of one layer."""
        return sum(one.weights for one in self.linears) + self.norms

    @property
    def layer_linears(self) -> int:
        """Return the weights of one layer's linear layers, without biases: those that 4 bits take."""
        return sum(one.ins * one.outs for one in self.linears)

    @property
    def body(self) -> int:
        """Return all weights but those of an output head of its own."""
        tables = (self.vocabulary + self.places) * self.hidden
        return tables + self.layers * self.layer + self.last

    @property
    def total(self) -> int:
        """Return all weights; a tied head is counted once."""
        return self.body + (0 if self.tied else self.vocabulary * self.hidden)

    def rows(self, count: int) -> int:
        """Return the weights that so many tokens more have in the embedding and the head."""
        return count * self.hidden * (1 if self.tied else 2)


def adapted(shape: Shape, targets: Collection[str]) -> list[Linear]:
    """Return every module of the model that an adapter on ``targets`` attaches to, by its full name.

    ``all-linear``: every linear layer but the output head (PEFT's rule); else a module whose name is a
    target or ends in ``.target``.

    Raises:
        ConfigError: if a target names no module.
    """
    every = [
        Linear(f"{shape.within}.{number}.{one.name}", one.ins, one.outs, one.bias)
        for number in range(shape.layers)
        for one in shape.linears
    ]
    if list(targets) == [ALL_LINEAR]:
        return every
    every.append(Linear(shape.embedding, shape.vocabulary, shape.hidden))
    if shape.places:
        every.append(Linear(shape.place_name, shape.places, shape.hidden))
    for target in targets:
        if not any(_means(one.name, target) for one in every):
            leaves = sorted({one.name.rsplit(".", 1)[-1] for one in every})
            raise ConfigError(
                f"adapter.targets: {shape.kind} has no module '{target}'.{nearest(target, leaves)} "
                f"It has {', '.join(leaves)}."
            )
    return [one for one in every if any(_means(one.name, target) for target in targets)]


def _means(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora(shape: Shape, targets: Collection[str], r: int) -> int:
    """Return the weights of a LoRA: r (ins + outs) for each module (arXiv:2106.09685, section 4.1)."""
    return sum(r * (one.ins + one.outs) for one in adapted(shape, targets))


class _Keys:
    """The keys of a configuration; what is left out is the architecture's default."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._found = {**defaults, **{key: value for key, value in given.items() if value is not None}}

    def of(self, *names: str) -> int:
        """Return the first of some names that is there: architectures have synonyms."""
        return int(next(self._found[name] for name in names if name in self._found))

    def maybe(self, name: str, otherwise: int) -> int:
        return int(self._found.get(name) or otherwise)

    def says(self, name: str) -> bool:
        return bool(self._found.get(name))

    def number(self, name: str) -> float:
        return float(self._found.get(name) or 0.0)

    def word(self, name: str) -> str:
        return str(self._found[name])


def _attention(keys: _Keys, bias: bool, out_bias: bool, within: str) -> tuple[int, int, list[Linear]]:
    hidden, heads = keys.of("hidden_size"), keys.of("num_attention_heads")
    key_heads = keys.maybe("num_key_value_heads", heads)
    head = keys.maybe("head_dim", hidden // heads)
    every = [
        Linear(f"{within}.q_proj", hidden, heads * head, bias),
        Linear(f"{within}.k_proj", hidden, key_heads * head, bias),
        Linear(f"{within}.v_proj", hidden, key_heads * head, bias),
        Linear(f"{within}.o_proj", heads * head, hidden, out_bias),
    ]
    return key_heads, head, every


def _decoder(keys: _Keys, **differs: Any) -> Shape:
    """Return a shape whose keys and modules have the names that most architectures took from LLaMA."""
    return Shape(
        vocabulary=keys.of("vocab_size"),
        hidden=keys.of("hidden_size"),
        layers=keys.of("num_hidden_layers"),
        heads=keys.of("num_attention_heads"),
        inner=keys.of("intermediate_size"),
        within="model.layers",
        embedding="model.embed_tokens",
        tied=keys.says("tie_word_embeddings"),
        positions=keys.of("max_position_embeddings"),
        **differs,
    )


def _llama(keys: _Keys, kind: str = "llama") -> Shape:
    """LLaMA and what is built as it: Mistral has no bias, Qwen2 has one on queries, keys and values."""
    hidden, inner = keys.of("hidden_size"), keys.of("intermediate_size")
    bias = keys.says("attention_bias") or kind == "qwen2"
    key_heads, head, linears = _attention(keys, bias, bias and kind != "qwen2", "self_attn")
    mlp = keys.says("mlp_bias")
    linears += [
        Linear("mlp.gate_proj", hidden, inner, mlp),
        Linear("mlp.up_proj", hidden, inner, mlp),
        Linear("mlp.down_proj", inner, hidden, mlp),
    ]
    return _decoder(
        keys,
        kind=kind,
        key_heads=key_heads,
        head=head,
        linears=tuple(linears),
        norms=2 * hidden,
        last=hidden,
        rms=True,
        gated=True,
        dropout=(0.0, keys.number("attention_dropout")),
    )


def _stablelm(keys: _Keys) -> Shape:
    hidden, inner = keys.of("hidden_size"), keys.of("intermediate_size")
    key_heads, head, linears = _attention(keys, keys.says("use_qkv_bias"), False, "self_attn")
    linears += [
        Linear("mlp.gate_proj", hidden, inner),
        Linear("mlp.up_proj", hidden, inner),
        Linear("mlp.down_proj", inner, hidden),
    ]
    parallel, heads = keys.says("use_parallel_residual"), keys.of("num_attention_heads")
    by_head = (heads + key_heads) * head if keys.says("qk_layernorm") else 0
    return _decoder(
        keys,
        kind="stablelm",
        key_heads=key_heads,
        head=head,
        linears=tuple(linears),
        norms=(2 if parallel else 4) * hidden + by_head,
        last=2 * hidden,
        gated=True,
        rotary="part",
        parallel=int(parallel),
        dropout=(keys.number("hidden_dropout"), keys.number("attention_dropout")),
    )


def _starcoder2(keys: _Keys) -> Shape:
    hidden, inner, bias = keys.of("hidden_size"), keys.of("intermediate_size"), keys.says("use_bias")
    key_heads, head, linears = _attention(keys, bias, bias, "self_attn")
    linears += [
        Linear("mlp.c_fc", hidden, inner, bias),
        Linear("mlp.c_proj", inner, hidden, bias),
    ]
    return _decoder(
        keys,
        kind="starcoder2",
        key_heads=key_heads,
        head=head,
        linears=tuple(linears),
        norms=4 * hidden,
        last=2 * hidden,
        dropout=(keys.number("residual_dropout"), keys.number("attention_dropout")),
    )


def _gpt_neox(keys: _Keys) -> Shape:
    hidden, inner, heads = (
        keys.of(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    bias = keys.says("attention_bias")
    return Shape(
        kind="gpt_neox",
        vocabulary=keys.of("vocab_size"),
        hidden=hidden,
        layers=keys.of("num_hidden_layers"),
        heads=heads,
        key_heads=heads,
        head=hidden // heads,
        inner=inner,
        linears=(
            Linear("attention.query_key_value", hidden, 3 * hidden, bias),
            Linear("attention.dense", hidden, hidden, bias),
            Linear("mlp.dense_h_to_4h", hidden, inner, True),
            Linear("mlp.dense_4h_to_h", inner, hidden, True),
        ),
        norms=4 * hidden,
        last=2 * hidden,
        within="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        tied=keys.says("tie_word_embeddings"),
        positions=keys.of("max_position_embeddings"),
        rotary="part",
        parallel=2 if keys.says("use_parallel_residual") else 0,
        fused=True,
        dropout=(keys.number("hidden_dropout"), keys.number("attention_dropout")),
    )


def _gpt2(keys: _Keys, kind: str = "gpt2") -> Shape:
    """GPT-2 and GPTBigCode (StarCoder), whose heads may share one key and value."""
    hidden, heads = keys.of("n_embd", "hidden_size"), keys.of("n_head", "num_attention_heads")
    inner = keys.maybe("n_inner", 4 * hidden)
    shared = kind == "gpt_bigcode" and keys.says("multi_query")
    key_heads, head = (1 if shared else heads), hidden // heads
    places = keys.of("n_positions", "max_position_embeddings")
    dropped = (keys.number("resid_pdrop"), keys.number("attn_pdrop"))
    return Shape(
        kind=kind,
        vocabulary=keys.of("vocab_size"),
        hidden=hidden,
        layers=keys.of("n_layer", "num_hidden_layers"),
        heads=heads,
        key_heads=key_heads,
        head=head,
        inner=inner,
        linears=(
            Linear("attn.c_attn", hidden, hidden + 2 * key_heads * head, True),
            Linear("attn.c_proj", hidden, hidden, True),
            Linear("mlp.c_fc", hidden, inner, True),
            Linear("mlp.c_proj", inner, hidden, True),
        ),
        norms=4 * hidden,
        last=2 * hidden,
        within="transformer.h",
        embedding="transformer.wte",
        tied=keys.says("tie_word_embeddings"),
        places=places,
        place_name="transformer.wpe",
        positions=places,
        gelu=keys.word("activation_function") == "gelu_new",
        rotary="",
        fused=True,
        rounded=kind == "gpt2",
        dropout=dropped,
    )


def _falcon(keys: _Keys) -> Shape:
    hidden, heads = keys.of("hidden_size"), keys.of("num_attention_heads")
    head, bias = hidden // heads, keys.says("bias")
    inner = keys.maybe("ffn_hidden_size", 4 * hidden)
    fresh, shared = keys.says("new_decoder_architecture"), keys.says("multi_query")
    key_heads = keys.maybe("num_kv_heads", heads) if fresh else 1 if shared else heads
    parallel = keys.says("parallel_attn")
    norms = 1 if parallel and not (fresh and keys.maybe("num_ln_in_parallel_attn", 2) == 2) else 2
    return Shape(
        kind="falcon",
        vocabulary=keys.of("vocab_size"),
        hidden=hidden,
        layers=keys.of("num_hidden_layers"),
        heads=heads,
        key_heads=key_heads,
        head=head,
        inner=inner,
        linears=(
            Linear("self_attention.query_key_value", hidden, hidden + 2 * key_heads * head, bias),
            Linear("self_attention.dense", hidden, hidden, bias),
            Linear("mlp.dense_h_to_4h", hidden, inner, bias),
            Linear("mlp.dense_4h_to_h", inner, hidden, bias),
        ),
        norms=2 * norms * hidden,
        last=2 * hidden,
        within="transformer.h",
        embedding="transformer.word_embeddings",
        tied=keys.says("tie_word_embeddings"),
        positions=keys.of("max_position_embeddings"),
        rotary="" if keys.says("alibi") else "whole",
        parallel=norms if parallel else 0,
        kernel="math" if shared and not fresh else "flash",
        fused=True,
        rounded=True,
        dropout=(keys.number("hidden_dropout"), keys.number("attention_dropout")),
    )


def _mpt(keys: _Keys) -> Shape:
    hidden, heads = keys.of("d_model", "hidden_size"), keys.of("n_heads", "num_attention_heads")
    inner = 4 * hidden  # whatever expansion_ratio says, modeling_mpt.py
    return Shape(
        kind="mpt",
        vocabulary=keys.of("vocab_size"),
        hidden=hidden,
        layers=keys.of("n_layers", "num_hidden_layers"),
        heads=heads,
        key_heads=heads,
        head=hidden // heads,
        inner=inner,
        linears=(
            Linear("attn.Wqkv", hidden, 3 * hidden),
            Linear("attn.out_proj", hidden, hidden),
            Linear("ffn.up_proj", hidden, inner),
            Linear("ffn.down_proj", inner, hidden),
        ),
        norms=2 * hidden,
        last=hidden,
        within="transformer.blocks",
        embedding="transformer.wte",
        tied=keys.says("tie_word_embeddings"),
        positions=keys.of("max_seq_len"),
        rotary="",
        kernel="eager",
        fused=True,
    )


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_GPT2 = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "tie_word_embeddings": True,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
# model_type -> how its shape is read, and the defaults of its configuration class
KINDS: dict[str, tuple[Callable[[_Keys], Shape], dict[str, Any]]] = {
    "llama": (_llama, _LLAMA),
    "mistral": (
        lambda keys: _llama(keys, "mistral"),
        {
            **_LLAMA,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2": (
        lambda keys: _llama(keys, "qwen2"),
        {
            **_LLAMA,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    ),
    "stablelm": (
        _stablelm,
        {
            **_LLAMA,
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "starcoder2": (
        _starcoder2,
        {
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        _gpt_neox,
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "max_position_embeddings": 2048,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
    ),
    "gpt2": (_gpt2, _GPT2),
    "gpt_bigcode": (
        lambda keys: _gpt2(keys, "gpt_bigcode"),
        {**_GPT2, "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
    ),
    "falcon": (
        _falcon,
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "max_position_embeddings": 2048,
            "multi_query": True,
            "parallel_attn": True,
            "tie_word_embeddings": True,
        },
    ),
    "mpt": (
        _mpt,
        {
            "vocab_size": 50368,
            "d_model": 2048,
            "n_layers": 24,
            "n_heads": 16,
            "max_seq_len": 2048,
            "tie_word_embeddings": True,
        },
    ),
}


def shape_of(architecture: Mapping[str, Any]) -> Shape:
    """Return the shape of a model by the keys of its ``config.json``.

    Raises:
        ConfigError: if its architecture is not in the table, or a key is no number.
    """
    kind = str(architecture.get("model_type"))
    if kind not in KINDS:
        raise ConfigError(
            f"the architecture '{kind}' is not in the table of shapes.{nearest(kind, list(KINDS))} "
            f"It has {', '.join(KINDS)}."
        )
    read, defaults = KINDS[kind]
    try:
        return read(_Keys(architecture, defaults))
    except (TypeError, ValueError, StopIteration, ZeroDivisionError) as error:
        raise ConfigError(f"the configuration of this {kind} cannot be read: {error}.") from None
