"""Weights counted by the table, against the models of transformers and PEFT on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ftpipe.errors import ConfigError
from ftpipe.fit import shapes

LLAMA: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2: dict[str, Any] = {"vocab_size": 260, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
FALCON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama, grouped and tied": {
        "model_type": "llama",
        **LLAMA,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama, biases and wide heads": {
        "model_type": "llama",
        **LLAMA,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 32,
    },
    "mistral": {"model_type": "mistral", **LLAMA, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2},
    "stablelm": {"model_type": "stablelm", **LLAMA, "num_key_value_heads": 2},
    "stablelm, the other ways": {
        "model_type": "stablelm",
        **LLAMA,
        "num_key_value_heads": 4,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "starcoder2": {"model_type": "starcoder2", **LLAMA, "num_key_value_heads": 2},
    "starcoder2, no bias": {"model_type": "starcoder2", **LLAMA, "use_bias": False},
    "gpt_neox": {"model_type": "gpt_neox", **LLAMA},
    "gpt_neox, tied": {"model_type": "gpt_neox", **LLAMA, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2, untied": {"model_type": "gpt2", **GPT2, "tie_word_embeddings": False, "n_inner": 100},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT2},
    "gpt_bigcode, many keys": {"model_type": "gpt_bigcode", **GPT2, "multi_query": False},
    "falcon": {"model_type": "falcon", **FALCON},
    "falcon, many keys": {"model_type": "falcon", **FALCON, "multi_query": False, "bias": True},
    "falcon, in turn": {"model_type": "falcon", **FALCON, "parallel_attn": False},
    "falcon, the new one": {
        "model_type": "falcon",
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "mpt": {"model_type": "mpt", "vocab_size": 260, "d_model": 64, "n_layers": 3, "n_heads": 4},
    "mpt, untied": {
        "model_type": "mpt",
        **{"vocab_size": 260, "d_model": 64, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2},
        "tie_word_embeddings": False,
    },
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def on_meta(architecture: dict[str, Any]) -> PreTrainedModel:
    keys = dict(architecture)
    config = AutoConfig.for_model(keys.pop("model_type"), **keys, **SPECIAL)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_are_counted(name: str) -> None:
    model, shape = on_meta(MODELS[name]), shapes.shape_of(MODELS[name])
    assert shape.total == sum(weight.numel() for weight in model.parameters())
    assert shape.body == sum(weight.numel() for weight in model.base_model.parameters())
    assert shape.tied is (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT, of the embedding
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["all-linear", "two", "embedding"])
def test_the_weights_of_an_adapter_are_counted(name: str, targets: str) -> None:
    from peft import LoraConfig, get_peft_model

    shape = shapes.shape_of(MODELS[name])
    ends = (shape.linears[0].name.rsplit(".", 1)[-1], shape.linears[-1].name.rsplit(".", 1)[-1])
    chosen = {
        "all-linear": ["all-linear"],
        "two": list(ends),
        "embedding": [shape.embedding.rsplit(".", 1)[-1], shape.linears[1].name],
    }[targets]
    config = LoraConfig(
        r=5,
        target_modules="all-linear" if targets == "all-linear" else chosen,
        fan_in_fan_out=name.startswith("gpt2"),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(on_meta(MODELS[name]), config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert shapes.lora(shape, chosen, 5) == trained


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_what_a_configuration_leaves_out_is_transformers_default(kind: str) -> None:
    stated = AutoConfig.for_model(kind).to_dict()
    assert shapes.shape_of({"model_type": kind}) == shapes.shape_of(stated)


@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        # arXiv:2302.13971, table 2 (6.7B), and what its authors' files hold
        ({"model_type": "llama"}, 6_738_415_616),
        # Mistral-7B: 7.24B by its hub page
        ({"model_type": "mistral"}, 7_241_732_096),
        # arXiv:2304.01373, table 1: Pythia-2.8B has 2,775,208,960 weights
        (
            {
                **{"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2560},
                **{"intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
            },
            2_775_208_960,
        ),
        ({"model_type": "gpt2"}, 124_439_808),  # the small GPT-2
    ],
)
def test_known_models_have_their_known_sizes(keys: dict[str, Any], weights: int) -> None:
    assert shapes.shape_of(keys).total == weights


def test_rows_of_new_tokens_are_in_the_embedding_and_a_head_of_its_own() -> None:
    assert shapes.shape_of({"model_type": "llama"}).rows(2) == 2 * 2 * 4096
    assert shapes.shape_of({"model_type": "gpt2"}).rows(2) == 2 * 768


def test_an_unknown_architecture_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lama' is not in the table.*Did you mean 'llama'"):
        shapes.shape_of({"model_type": "lama"})


def test_a_target_that_names_no_module_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no module 'q_prj'.*Did you mean 'q_proj'"):
        shapes.lora(shapes.shape_of({"model_type": "llama"}), ["q_prj"], 4)


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        shapes.shape_of({"model_type": "llama", "hidden_size": "wide"})
