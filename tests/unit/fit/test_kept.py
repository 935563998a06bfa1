"""What a layer keeps, against what autograd saves in real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftpipe.choices import Attention
from ftpipe.fit import kept, shapes

B, L, HIDDEN, R = 2, 24, 64, 8
LLAMA: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 160, "num_attention_heads": 4},
    **{"num_key_value_heads": 2},
}
GPT2: dict[str, Any] = {"vocab_size": 96, "n_embd": HIDDEN, "n_head": 4, "n_positions": 32}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
FALCON: dict[str, Any] = {"vocab_size": 96, "hidden_size": HIDDEN, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "qwen2": {"model_type": "qwen2", **LLAMA},
    "stablelm": {"model_type": "stablelm", **LLAMA},
    "starcoder2": {"model_type": "starcoder2", **LLAMA, "intermediate_size": 256},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{"vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": 256},
        "num_attention_heads": 4,
    },
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2, no dropout": {"model_type": "gpt2", **GPT2, **NO_DROPOUT},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT2},
    "falcon": {"model_type": "falcon", **FALCON},
    "mpt": {"model_type": "mpt", "vocab_size": 96, "d_model": HIDDEN, "n_heads": 4},
}
LAYERS = {"mpt": "n_layers", "gpt2": "n_layer", "gpt_bigcode": "n_layer"}
INDICES = 16  # bytes of two numbers, by which Falcon's heads are picked
WAYS = {
    "float32": kept.Numbers(compute=4, stored=4, trained=True),
    "autocast": kept.Numbers(compute=2, stored=4, trained=True),
    "adapter": kept.Numbers(compute=2, stored=2, trained=False, r=R),
    "adapter with dropout": kept.Numbers(compute=2, stored=2, trained=False, r=R, dropout=True),
    "adapter in 16 bits": kept.Numbers(compute=2, stored=2, trained=False, r=R, adapter=2),
    "adapter in float32": kept.Numbers(compute=4, stored=4, trained=False, r=R),
}


def saved(name: str, layers: int, numbers: kept.Numbers) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once, weights left out."""
    keys = dict(MODELS[name])
    kind = keys.pop("model_type")
    keys[LAYERS.get(kind, "num_hidden_layers")] = layers
    config = AutoConfig.for_model(kind, **keys, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    dtype = {2: torch.bfloat16, 4: torch.float32}[numbers.stored]
    attention = "eager" if kind == "mpt" else str(numbers.attention)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if numbers.adapted:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=R,
            target_modules="all-linear",
            lora_dropout=0.1 if numbers.dropout else 0.0,
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, settings)
        model.enable_input_require_grads()
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to({2: torch.bfloat16, 4: torch.float32}[numbers.adapter])
        model = model.base_model.model
    model.train()
    ids_BL = torch.full((B, L), 5)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, -3:] = 0 if numbers.masked else 1
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other can lie there
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=numbers.compute == 2):
        model.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


def counted(name: str, numbers: kept.Numbers) -> float:
    return kept.layer(shapes.shape_of(MODELS[name]), numbers).of(B, L)


def numbers(way: str, name: str, **changed: Any) -> kept.Numbers:
    linears = shapes.shape_of(MODELS[name]).linears
    adapted = tuple(one.name for one in linears) if WAYS[way].r else ()
    return kept.Numbers(**{**vars(WAYS[way]), "adapted": adapted, **changed})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_keeps_what_autograd_saves(name: str, way: str) -> None:
    now = numbers(way, name)
    # the difference of two depths is one layer
    assert counted(name, now) == pytest.approx(saved(name, 3, now) - saved(name, 2, now), abs=INDICES)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2, no dropout", "falcon"])
@pytest.mark.parametrize("way", ["autocast", "adapter"])
@pytest.mark.parametrize("changed", [{"masked": False}, {"attention": Attention.eager}])
def test_without_a_mask_and_with_attention_written_out(
    name: str, way: str, changed: dict[str, Any]
) -> None:
    now = numbers(way, name, **changed)
    assert counted(name, now) == pytest.approx(saved(name, 3, now) - saved(name, 2, now), abs=INDICES)
