"""Adapters written into their base, tensor by tensor, against what PEFT makes of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from ftpipe.choices import Device, Method, Precision
from ftpipe.config import AdapterConfig, LaunchConfig, RunConfig
from ftpipe.errors import ModelError
from ftpipe.export import merging, source
from ftpipe.policy import Incoming

TOKENS = 64
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama(tied: bool = False) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=TOKENS, tie_word_embeddings=tied, **sizes, **heads, **SPECIAL)
    )


def gpt2() -> Any:  # its matrices map inputs to outputs by their columns, its head is tied
    return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, **SPECIAL))


def gpt_neox() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=TOKENS, num_attention_heads=4, **sizes, **SPECIAL)
    )


def settings(method: Method = Method.lora, precision: Precision = Precision.fp32) -> RunConfig:
    launch = LaunchConfig(device=Device.cpu, precision=precision)
    return RunConfig(adapter=AdapterConfig(method=method), launch=launch)


def adapted(base: Any, folder: Path, **lora: Any) -> None:
    """Save an adapter in which no weight is where it began."""
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=3, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                weight.add_(0.3 * torch.rand_like(weight))
    policy.save_pretrained(str(folder), save_embedding_layers=False)


def by_peft(where: Path, adapter: Path, rows: int | None = None, **options: Any) -> dict[str, Any]:
    """Return the weights of the merged model as PEFT merges it, all of it in memory, in float32."""
    base = AutoModelForCausalLM.from_pretrained(str(where), **{"dtype": torch.float32, **options})
    if options:
        base = torch.nn.Module.to(base.dequantize(dtype=torch.float32), torch.float32)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


def ours(
    cfg: RunConfig, where: Path, adapter: Path, new: tuple[int, ...] = (), tokens: int = TOKENS
) -> merging.Merged:
    return merging.merged(cfg, Incoming(str(where), None, adapter, new), torch.float32, tokens)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (llama, {"target_modules": LINEAR}),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True}),
    "dora": (llama, {"target_modules": LINEAR, "use_dora": True}),
    "dora and rslora": (llama, {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "tied head": (lambda: llama(tied=True), {"target_modules": LINEAR, "use_dora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "gpt_neox": (gpt_neox, {"target_modules": ["query_key_value", "dense"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding dora": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("case", CASES)
def test_merged_tensor_by_tensor_it_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, lora = CASES[case]
    make().save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted(base, tmp_path / "adapter", **lora)
    expected = by_peft(tmp_path / "base", tmp_path / "adapter")
    made = ours(settings(), tmp_path / "base", tmp_path / "adapter")
    assert set(made.names()) <= set(expected)
    moved = 0
    for name in made.names():
        got = made.tensor(name)
        assert tuple(got.shape) == made.shape(name)
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6)
        moved += not torch.allclose(got, before[name], atol=1e-3)
    assert moved >= (1 if case == "embedding dora" else 2)
    left = set(expected) - set(made.names())
    assert left <= {"lm_head.weight"} and (not left or case in ("tied head", "gpt2", "gpt2 dora"))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_those_of_the_adapter(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(tied).save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    grown, new = TOKENS + 3, (TOKENS, TOKENS + 1, TOKENS + 2)
    base.resize_token_embeddings(grown, mean_resizing=False)
    rows = {"model.embed_tokens": list(new), "lm_head": list(new)}
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=rows)
    made = ours(settings(), tmp_path / "base", tmp_path / "adapter", new, grown)
    expected = by_peft(tmp_path / "base", tmp_path / "adapter", rows=grown)
    assert ("lm_head.weight" in made.names()) is not tied
    for name in made.names():
        assert made.shape(name) == tuple(expected[name].shape)
        torch.testing.assert_close(made.tensor(name), expected[name])
    assert made.config.vocab_size == grown
    assert made.tensor("model.embed_tokens.weight")[TOKENS:].abs().min() > 0


def test_rows_that_the_base_has_already_keep_its_size(tmp_path: Path) -> None:
    llama().save_pretrained(str(tmp_path / "base"))  # its matrices are padded: 60 tokens have 64 rows
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    rows = {"model.embed_tokens": [61], "lm_head": [61]}
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=rows)
    made = ours(settings(), tmp_path / "base", tmp_path / "adapter", (61,), 62)
    expected = by_peft(tmp_path / "base", tmp_path / "adapter")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(made.tensor(name), expected[name])


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("dora", [False, True])
def test_of_qlora_it_is_what_the_four_bits_stand_for(
    precision: Precision, dora: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    adapted(base, tmp_path / "adapter", target_modules=LINEAR, use_dora=dora)
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    where = (tmp_path / "base", tmp_path / "adapter")
    expected = by_peft(*where, dtype=dtype, quantization_config=bits)
    made = ours(settings(Method.qlora, precision), *where)
    whole = ours(settings(Method.lora, precision), *where)
    for name in made.names():
        torch.testing.assert_close(made.tensor(name), expected[name], rtol=1e-5, atol=1e-6)
    in_bits = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(made.tensor(in_bits), whole.tensor(in_bits), atol=1e-4)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().to(torch.bfloat16).save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"), dtype=torch.float32)
    adapted(base, tmp_path / "adapter", target_modules=LINEAR)
    start = Incoming(str(tmp_path / "base"), None, tmp_path / "adapter")
    made = merging.merged(settings(), start, torch.bfloat16, TOKENS)
    expected = by_peft(tmp_path / "base", tmp_path / "adapter")
    for name in made.names():
        assert torch.equal(made.tensor(name), expected[name].to(torch.bfloat16)), name


def test_a_whole_policy_is_copied(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(str(tmp_path / "base"), max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    made = merging.merged(
        settings(Method.qlora), Incoming(str(tmp_path / "base")), torch.float32, TOKENS
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(made.tensor(name), weight)


def test_names_without_the_part_that_holds_them_are_found(tmp_path: Path) -> None:
    # as GPT-2's own file on the hub has them
    model = gpt2()
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    short = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    save_file(short, file, {"format": "pt"})
    made = merging.merged(settings(), Incoming(str(tmp_path)), torch.float32, TOKENS)
    state = model.state_dict()
    assert all(torch.equal(made.tensor(name), state[name]) for name in made.names())
    assert len(made.names()) == len(short)


def spoilt(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(str(tmp_path / "tied"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "tied"))
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    where = (tmp_path / "tied", tmp_path / "adapter")
    spoilt(tmp_path / "adapter", lambda told: told.update(rank_pattern={"q_proj": 2}))
    with pytest.raises(ModelError, match=r"ranks of its own for some modules, which cannot be merged"):
        ours(settings(), *where)
    spoilt(tmp_path / "adapter", lambda told: told.update(rank_pattern={}))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "base_model.model.lm_head.lora_new.weight": torch.ones(2)}, file)
    with pytest.raises(
        ModelError, match=r"has .*lora_new.weight, which cannot be merged here; put 'mer"
    ):
        ours(settings(), *where)
    renamed = {name.replace("q_proj", "z_proj"): weight for name, weight in weights.items()}
    save_file(renamed, file)
    with pytest.raises(
        ModelError, match=r"weights for model.layers.0.self_attn.z_proj, for which Llama"
    ):
        ours(settings(), *where)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_embedding_would_change_the_head(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(str(tmp_path / "tied"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "tied"))
    adapted(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(
        ModelError, match=r"model.embed_tokens, whose matrix is the output head's as well"
    ):
        ours(settings(), tmp_path / "tied", tmp_path / "adapter")


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    llama().save_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"has model.norm.weight, which is not stored as one weight; put"
    ):
        merging.merged(settings(), Incoming(str(tmp_path)), torch.float32, TOKENS)
    file.unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors; weights have to be in safetensors"):
        merging.merged(settings(), Incoming(str(tmp_path)), torch.float32, TOKENS)
    file.write_bytes(b"12345678")
    with pytest.raises(ModelError, match=r"cannot be read"):
        merging.merged(settings(), Incoming(str(tmp_path)), torch.float32, TOKENS)


def test_one_file_is_read_before_many_as_transformers_does(tmp_path: Path) -> None:
    llama().save_pretrained(str(tmp_path), max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    torch.manual_seed(1)
    llama().save_pretrained(str(tmp_path / "later"))
    (tmp_path / "later/model.safetensors").rename(tmp_path / "model.safetensors")
    stored = source.opened(Incoming(str(tmp_path)))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path)).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stored.read(name), loaded[name])
