"""Base models as they are loaded, and the rows that new tokens get in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, set_seed

from ftpipe.choices import Device, Method, Precision
from ftpipe.config import AdapterConfig, LaunchConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError
from ftpipe.modeling import adapter_config, add_rows, cast_once, load_base
from ftpipe.sequences import Layout, collate
from ftpipe.tokenizer import add_tokens, byte_level

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
NEW = ["<|prompter|>", "<|assistant|>"]


def tiny(kind: str = "llama", **more: Any) -> PreTrainedModel:
    set_seed(0)
    config = CONFIG_MAPPING[kind](**{"vocab_size": 258, **SIZES, **more})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part.weight for part in parts if isinstance(part.weight, torch.Tensor)]


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_others_and_nothing_else_changes(tied: bool) -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    assert ids == {"<|prompter|>": 258, "<|assistant|>": 259}
    model = tiny(tie_word_embeddings=tied)
    before = [matrix.detach().clone() for matrix in matrices(model)]
    assert add_rows(model, tokenizer, ids.values()) == [258, 259]
    assert model.config.vocab_size == 260
    for matrix, old in zip(matrices(model), before, strict=True):
        assert matrix.shape == (260, 16)
        assert torch.equal(matrix[:258], old)
        mean = torch.tensor([[sum(column) / 258 for column in zip(*old.tolist(), strict=True)]])
        torch.testing.assert_close(matrix[258:].detach(), mean.expand(2, -1))
    inputs, head = matrices(model)
    assert (inputs is head) is tied
    assert model(input_ids=torch.tensor([[258, 65, 259]])).logits.shape == (1, 3, 260)


def test_a_padded_vocabulary_keeps_its_size_and_its_padding_out_of_the_mean() -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    model = tiny(vocab_size=320)
    with torch.no_grad():
        for matrix in matrices(model):
            matrix[258:] = 1e6  # what nobody trained
    before = [matrix.detach().clone() for matrix in matrices(model)]
    assert add_rows(model, tokenizer, ids.values()) == [258, 259]
    assert model.config.vocab_size == 320
    for matrix, old in zip(matrices(model), before, strict=True):
        assert matrix.shape == (320, 16)
        assert torch.equal(matrix[:258], old[:258]) and torch.equal(matrix[260:], old[260:])
        torch.testing.assert_close(matrix[258].detach(), old[:258].mean(0))
        assert torch.equal(matrix[259], matrix[258])


def test_the_rows_do_not_depend_on_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would draw them around the mean, and decompose a covariance for it
    drawn = "_init_added_embeddings_weights_with_mean"
    monkeypatch.setattr(PreTrainedModel, drawn, lambda *_: pytest.fail("drawn"))
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    grown = []
    for seed in (1, 2):
        model = tiny()
        set_seed(seed)
        add_rows(model, tokenizer, ids.values())
        grown.append([matrix.detach().clone() for matrix in matrices(model)])
    assert all(map(torch.equal, *grown))


def test_sixteen_bit_rows_are_averaged_in_thirty_two() -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    model = tiny().bfloat16()
    mean = matrices(model)[0].double().mean(0)
    add_rows(model, tokenizer, ids.values())
    assert torch.equal(matrices(model)[0][258], mean.to(torch.bfloat16))


def test_the_bias_of_a_head_grows_too() -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    model = tiny("phi")
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.bias.copy_(torch.arange(258.0))
    add_rows(model, tokenizer, ids.values())
    grown: Any = model.get_output_embeddings()
    assert grown.bias[257:].tolist() == [257.0, 128.5, 128.5]


def test_without_new_tokens_nothing_is_touched() -> None:
    model = tiny()
    before = matrices(model)[0]
    assert add_rows(model, byte_level(), []) == []
    assert matrices(model)[0] is before


def test_a_text_that_is_a_token_already_adds_none() -> None:
    tokenizer = byte_level()
    assert add_tokens(tokenizer, ["<|endoftext|>", "<|new|>"]) == {"<|new|>": 258}
    assert len(tokenizer) == 259
    assert add_tokens(tokenizer, ["<|new|>"]) == {}
    assert len(tokenizer) == 259


def test_a_new_token_is_one_token_everywhere_in_a_text() -> None:
    tokenizer = byte_level()
    add_tokens(tokenizer, NEW)
    ids = tokenizer("<|prompter|>a <|assistant|> <|assistan|>")["input_ids"]
    assert (ids.count(258), ids.count(259)) == (1, 1)
    assert tokenizer.decode(ids) == "<|prompter|>a <|assistant|> <|assistan|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  <|assistan|>"
    assert tokenizer.added_tokens_decoder[258] == AddedToken(
        "<|prompter|>", special=True, normalized=False
    )


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_trains_the_new_rows_and_no_other(tied: bool) -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    model = tiny(tie_word_embeddings=tied)
    fresh = add_rows(model, tokenizer, ids.values())
    settings = adapter_config(AdapterConfig(method=Method.lora), model, fresh=fresh)
    assert settings is not None
    policy = get_peft_model(model, settings)
    shapes = [
        tuple(weight.shape)
        for name, weight in policy.named_parameters()
        if weight.requires_grad and "lora" not in name
    ]
    assert shapes == [(2, 16)] * (1 if tied else 2)


def test_a_head_with_a_bias_is_refused_for_an_adapter() -> None:
    tokenizer = byte_level()
    ids = add_tokens(tokenizer, NEW)
    model = tiny("phi")
    fresh = add_rows(model, tokenizer, ids.values())
    adapter = AdapterConfig(method=Method.lora)
    assert adapter_config(adapter, model) is not None
    with pytest.raises(ConfigError, match=r"^model\.new_tokens: the output head of PhiForCausalLM"):
        adapter_config(adapter, model, fresh=fresh)


def test_an_adapter_on_the_embeddings_and_new_rows_are_refused() -> None:
    model = tiny()
    adapter = AdapterConfig(method=Method.lora, targets=["q_proj", "embed_tokens"])
    assert adapter_config(adapter, model) is not None
    with pytest.raises(ConfigError, match=r"^adapter\.targets: model\.embed_tokens has trained rows"):
        adapter_config(adapter, model, fresh=[3])


def test_a_token_that_pads_is_learned_where_it_is_no_padding(tmp_path: Path) -> None:
    end = 2
    tiny(pad_token_id=end, eos_token_id=end).save_pretrained(tmp_path)
    cfg = RunConfig(
        model=ModelConfig(path=str(tmp_path)),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32),
    )
    model = load_base(cfg, None)
    two_turns = ([5, 6, end, 7, 8, end], [-100, 6, end, -100, 8, end])
    batch = collate([[two_turns], [([9, end], [-100, end])]], end, Layout.padded)
    labels, _ = batch.pop("labels"), batch.pop("tokens")
    logits = model(**batch).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    grad = matrices(model)[0].grad
    assert grad is not None
    # by hand: without the first row's end of its first turn, nothing would reach that embedding
    assert grad[end].abs().max() > 0
    model.zero_grad()
    batch["inputs_embeds"] = matrices(model)[0].detach()[batch.pop("input_ids")].requires_grad_()
    again = model(**batch).logits[:, :-1]
    cross_entropy(again.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    places = batch["inputs_embeds"].grad
    assert places[0, 2].abs().max() > 0  # the end of a turn
    assert places[1, 2:].abs().max() == 0  # padding
    torch.testing.assert_close(places[0, [2, 5]].sum(0) + places[1, 1], grad[end])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_an_adapter_takes_its_input_as_it_comes_and_computes_the_same(
    checkpointing: bool,
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    base = tiny()
    torch.nn.Module.to(base, torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.enable_input_require_grads()
        base.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    taken: list[torch.dtype] = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            assert module.weight.dtype is torch.float32
            module.register_forward_pre_hook(lambda _, given: taken.append(given[0].dtype))

    def computed() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        return logits, [w.grad.clone() for w in model.parameters() if w.grad is not None]

    logits, gradients = computed()
    assert set(taken) == {torch.float32}  # PEFT's own way
    passes = len(taken)
    taken.clear()
    cast_once(model, "cpu")
    again, same = computed()
    assert set(taken) == {torch.bfloat16} and len(taken) == passes
    assert torch.equal(again, logits)
    assert all(map(torch.equal, gradients, same)) and len(same) == len(gradients) > 0
    taken.clear()
    model.eval()
    with torch.no_grad():  # without autocast there is nothing else that would bring dtypes together
        model(input_ids=ids)
    assert set(taken) == {torch.float32}
