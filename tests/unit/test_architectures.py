"""Each architecture of conf/model as a tiny model: layers, masks, packs; and types without a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ftpipe import compose, smoke
from ftpipe.choices import Attention, Device, Init, Method, Precision
from ftpipe.config import AdapterConfig, LaunchConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.isolation import find_layout
from ftpipe.modeling import adapter_config, attended, load, random_model, text_config
from ftpipe.sequences import Layout, Row, collate
from ftpipe.tokenizer import byte_level

MODELS = sorted((compose.shipped("conf") / "model").glob("*.yaml"))

# Hub id, commit (None: none is known), number of weights: the models' cards or papers; LLaMA's by its
# shapes (arXiv:2302.13971, table 2); within a share for StableLM, whose README and card count the parts
# of GPT-NeoX's model parallelism.
PUBLISHED: dict[str, tuple[str, str | None, int]] = {
    "falcon-7b": (
        "tiiuae/falcon-7b",
        "ec89142b67d748a1865ea4451372db8313ada0d8",
        6_921_720_704,
    ),
    "gpt2-medium": (
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        354_823_168,
    ),
    "llama-13b": ("huggyllama/llama-13b", "bf57045473f207bb1de1ed035ace226f4d9f9bba", 13_015_864_320),
    "llama-2-7b": (
        "meta-llama/Llama-2-7b-hf",
        "01c7f73d771dfac7d292323805ebc428287df4f9",
        6_738_415_616,
    ),
    "llama-3.1-8b-instruct": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "0e9e39f249a16976918f6564b8830bc894c89659",
        8_030_261_248,
    ),
    "llama-30b": ("huggyllama/llama-30b", "2b1edcdb3c7ced7bce6c1aa75c94545777c3118b", 32_528_943_616),
    "llama-65b": ("huggyllama/llama-65b", "49707c5313d34d1c5a846e29cf2a2a650c22c8ee", 65_285_660_672),
    "llama-7b": ("huggyllama/llama-7b", "4782ad278652c7c71b72204d462d6d01eaaf7549", 6_738_415_616),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.1",
        "27d67f1b5f57dc0953326b2601d68371d40ea8da",
        7_241_732_096,
    ),
    "mpt-7b": ("mosaicml/mpt-7b", "ada218f9a93b5f1c6dce48a4cc9ff01fcba431e7", 6_649_286_656),
    "open-llama-3b-v2": (
        "openlm-research/open_llama_3b_v2",
        "bce5d60d3b0c68318862270ec4e794d83308d80a",
        3_426_473_600,
    ),
    "open-llama-7b": (
        "openlm-research/open_llama_7b",
        "6fb184ff23774c25bf84b3628e49c8b78372c7be",
        6_738_415_616,
    ),
    "pythia-1.4b": (
        "EleutherAI/pythia-1.4b",
        "fedc38a16eea3bd36a96b906d78d11d2ce18ed79",
        1_414_647_808,
    ),
    "pythia-12b": ("EleutherAI/pythia-12b-deduped", None, 11_846_072_320),
    "pythia-1b": (
        "EleutherAI/pythia-1b-deduped",
        "7199d8fc61a6d565cd1f3c62bf11525b563e13b2",
        1_011_781_632,
    ),
    "pythia-2.8b": (
        "EleutherAI/pythia-2.8b",
        "2a259cdd96a4beb1cdf467512e3904197345f6a9",
        2_775_208_960,
    ),
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        134_515_008,
    ),
    "stablelm-2-1.6b": ("stabilityai/stablelm-2-1_6b", None, 1_644_417_024),
    "stablelm-alpha-3b": (
        "stabilityai/stablelm-base-alpha-3b",
        "99567ccfe45fabe467c71393aa6716106edb83c2",
        3_638_525_952,
    ),
    "stablelm-alpha-7b": (
        "stabilityai/stablelm-base-alpha-7b",
        "38366357b5a45e002af2d254ff3d559444ec2147",
        7_869_358_080,
    ),
    "starcoder": ("bigcode/starcoder", None, 15_517_456_384),
    "starcoder2-3b": (
        "bigcode/starcoder2-3b",
        "733247c55e3f73af49ce8e9c7949bf14af205928",
        3_030_371_328,
    ),
    "tinyllama-1.1b": (
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "59f6f375b26bde864a6ca194a9a3044570490064",
        1_100_048_384,
    ),
}
ROUGH = {"stablelm-2-1.6b": 1e-4, "stablelm-alpha-3b": 1e-3, "stablelm-alpha-7b": 1e-3}

# The linear layers of a block, by the names that the papers' code and transformers' documentation use.
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
LINEAR = {
    "falcon": NEOX,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_bigcode": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mpt": {"Wqkv", "out_proj", "up_proj", "down_proj"},
    "stablelm": LLAMA,
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
}


def stated(name: str) -> dict[str, Any]:
    file = compose.shipped("conf") / "model" / f"{name}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def one_of_each() -> dict[str, dict[str, Any]]:
    """Return a tiny configuration of each type in conf/model, and of variants that take other paths."""
    kinds: dict[str, dict[str, Any]] = {}
    for file in MODELS:
        architecture = stated(file.stem)["architecture"]
        kinds.setdefault(architecture["model_type"], smoke.tiny(architecture))
    falcon, mistral, starcoder2 = kinds["falcon"], kinds["mistral"], kinds["starcoder2"]
    return {
        **kinds,
        # Falcon-40B: groups of heads share a key, and the MLP has a norm of its own
        "falcon-40b": {**falcon, "new_decoder_architecture": True, "num_kv_heads": 2},
        "falcon-rw": {**falcon, "multi_query": False, "parallel_attn": False, "alibi": True},
        "llama-3.1": smoke.tiny(stated("llama-3.1-8b-instruct")["architecture"]),
        # windows that are shorter than the rows
        "mistral-window": {**mistral, "sliding_window": 5},
        "starcoder2-window": {**starcoder2, "sliding_window": 5},
        "gpt_bigcode-heads": {**kinds["gpt_bigcode"], "multi_query": False, "n_inner": None},
    }


TINY = one_of_each()
SLIDES = ("mistral-window", "starcoder2-window")
UNPACKABLE = ("falcon-rw",)  # ALiBi by a mask of two dimensions, so none that keeps rows apart


def made(name: str) -> PreTrainedModel:
    model = ModelConfig(init=Init.random, architecture=dict(TINY[name]), tokenizer="bytes")
    built = random_model(model, byte_level(), seed=0)
    built.eval()
    return built


def logits(model: PreTrainedModel, ids: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**attended(model, torch.tensor(ids), torch.tensor(mask))).logits
    return found


def words(start: int, length: int) -> list[int]:
    return [(start + 7 * at) % 250 for at in range(length)]


# --- the published models ---


def test_every_published_model_is_listed_here() -> None:
    assert {file.stem for file in MODELS} == {*PUBLISHED, "tiny-llama"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_is_the_published_one(name: str) -> None:
    model = stated(name)
    path, revision, weights = PUBLISHED[name]
    assert (model["path"], model["revision"]) == (path, revision)
    shape = dict(model["architecture"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, special, None)
    with torch.device("meta"):  # shapes alone
        whole = AutoModelForCausalLM.from_config(config)
    whole.tie_weights()
    counted = sum(weight.numel() for weight in whole.parameters())
    assert counted == pytest.approx(weights, rel=ROUGH.get(name, 0), abs=0)


def test_a_model_without_a_commit_says_so() -> None:
    for name, (_, revision, _) in PUBLISHED.items():
        text = (compose.shipped("conf") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
        assert ("no commit is known for certain" in text) == (revision is None), name


# --- the tiny models ---


@pytest.mark.parametrize("name", TINY)
def test_all_linear_means_every_layer_of_a_block(name: str) -> None:
    base = made(name)
    settings = adapter_config(AdapterConfig(method=Method.lora, r=2), base)
    assert settings is not None
    policy = get_peft_model(base, settings)
    assert isinstance(policy, PeftModel)
    adapted = {
        part.rsplit(".lora_A", 1)[0]
        for part, _ in policy.named_parameters()
        if part.endswith("lora_A.default.weight")
    }
    assert {part.rsplit(".", 1)[-1] for part in adapted} == LINEAR[str(base.config.model_type)]
    # in both blocks, and each hears of the loss once B is no longer zero
    with torch.no_grad():
        for part, weight in policy.named_parameters():
            if ".lora_B." in part:
                weight.fill_(0.01)
    ids = torch.tensor([words(3, 16)])
    policy(input_ids=ids, labels=ids).loss.backward()
    for part, weight in policy.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().max() > 0, part
    blocks = {int(number) for part in adapted for number in part.split(".") if number.isdigit()}
    assert blocks == {0, 1}


@pytest.mark.parametrize("name", TINY)
def test_the_head_gets_no_adapter(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.targets: lm_head is the output head"):
        adapter_config(AdapterConfig(method=Method.lora, targets=["lm_head"]), made(name))


@pytest.mark.parametrize("name", TINY)
def test_no_token_sees_a_later_one(name: str) -> None:
    model, row = made(name), words(3, 14)
    changed = [*row[:9], *words(40, 5)]
    before, after = logits(model, [row, changed], [[1] * 14] * 2)
    assert torch.allclose(before[:9], after[:9], atol=1e-5)
    assert not torch.allclose(before[9:], after[9:], atol=1e-2)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, row, pad = made(name), words(3, 9), [256] * 5
    alone = logits(model, [row], [[1] * 9])[0]
    if side == "right":
        padded = logits(model, [row + pad], [[1] * 9 + [0] * 5])[0, :9]
    else:
        padded = logits(model, [pad + row], [[0] * 5 + [1] * 9])[0, 5:]
    assert torch.allclose(padded, alone, atol=1e-4)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_an_architecture_that_cannot_keep_rows_apart_is_not_packed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"lets packed rows see each other .*set data\.packing=false"):
        find_layout(made(name), pad=256)


@pytest.mark.parametrize("name", sorted(set(TINY) - set(UNPACKABLE)))
def test_a_pack_predicts_what_its_rows_do(name: str) -> None:
    model = made(name)
    layout = find_layout(model, pad=256)
    assert layout in (Layout.positions, Layout.blocks)
    rows: list[Row] = [(ids, list(ids)) for ids in (words(3, 13), words(90, 8), words(50, 11))]
    batch = collate([rows], 256, layout, model.dtype)
    assert batch["input_ids"].shape == (1, 32)  # one sequence
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "tokens")}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
    start = 0
    for ids, _ in rows:  # against transformers alone, each row by itself
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0]
        assert torch.allclose(packed[start : start + len(ids)], alone, atol=1e-4)
        start += len(ids)


@pytest.mark.parametrize("name", SLIDES)
def test_a_window_ends_what_a_token_sees(name: str) -> None:
    model, row = made(name), words(3, 30)
    changed = [*words(120, 4), *row[4:]]
    before, after = logits(model, [row, changed], [[1] * 30] * 2)
    reach = 4 + 2 * 5  # two layers hand on what lies within five tokens
    assert torch.allclose(before[reach:], after[reach:], atol=1e-5)
    assert not torch.allclose(before[4:6], after[4:6], atol=1e-2)


# --- what transformers has no class of ---


def folder_of(config: dict[str, Any], tmp_path: Path) -> str:
    """Write a model folder without weights, whose own code would end the test if it ran."""
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("configuration_theirs.py", "modeling_theirs.py"):
        (tmp_path / file).write_text("raise SystemExit('their code ran')\n", encoding="utf-8")
    return str(tmp_path)


THEIRS = {
    "AutoConfig": "configuration_theirs.TheirConfig",
    "AutoModelForCausalLM": "modeling_theirs.TheirModel",
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # replit/replit-code-v1-3b
    "own code": (
        {"model_type": "replit_lm", "auto_map": THEIRS},
        "'replit_lm', which transformers has no class of: it comes as code in the model's own repo",
    ),
    # early commits of tiiuae/falcon-7b
    "renamed": (
        {"model_type": "RefinedWebModel", "auto_map": THEIRS},
        "is unknown to transformers. Later commits of such models say 'falcon', which it knows",
    ),
    "misspelled": (
        {"model_type": "lama"},
        "is of the type 'lama', which is unknown to transformers. Did you mean 'llama'?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_type_without_a_class_is_one_sentence_and_its_code_does_not_run(
    case: str, tmp_path: Path
) -> None:
    config, said = REFUSED[case]
    where = folder_of(config, tmp_path)
    cfg = RunConfig(launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32))
    for read in (
        lambda: load(cfg, where),
        lambda: load(cfg, where, scored=True),
        lambda: text_config(where, None, False),
    ):
        with pytest.raises(ModelError) as refused:
            read()
        assert str(refused.value).startswith(f"the model {where} is of the type")
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_architecture_without_a_class_is_refused_with_the_nearest() -> None:
    def refusal(kind: str) -> str:
        with pytest.raises(ModelError) as refused:
            random_model(
                ModelConfig(init=Init.random, architecture={"model_type": kind}), byte_level(), 0
            )
        return str(refused.value)

    assert refusal("gpt_neo_x") == (
        "model.architecture.model_type=gpt_neo_x is unknown to transformers. Did you mean 'gpt_neox'?"
    )
    assert "Later commits of such models say 'stablelm'" in refusal("stablelm_epoch")


def test_a_type_that_writes_no_text_or_gives_no_score_is_refused_by_purpose(tmp_path: Path) -> None:
    cfg = RunConfig(launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32))
    pictures = folder_of({"model_type": "vit"}, tmp_path)
    with pytest.raises(ModelError, match="is of a type of which transformers has no language model"):
        load(cfg, pictures)
    code = folder_of({"model_type": "codegen"}, tmp_path)
    with pytest.raises(ModelError, match="no class with a score, so it can be neither a reward model"):
        load(cfg, code, scored=True)


def test_a_folder_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    cfg = RunConfig(launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(cfg, str(tmp_path))


def test_a_kernel_that_an_architecture_lacks_is_refused(tmp_path: Path) -> None:
    made("mpt").save_pretrained(str(tmp_path))
    cfg = RunConfig(
        model=ModelConfig(attention=Attention.sdpa),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32),
    )
    with pytest.raises(ModelError, match="MptForCausalLM does not support"):
        load(cfg, str(tmp_path))
    cfg.model.attention = Attention.eager
    assert load(cfg, str(tmp_path)).config.model_type == "mpt"


# --- the documentation ---


def test_the_documentation_lists_each_model_and_its_layers() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    layers, _, tuned = text.partition("| `model=` | context |")
    for file in MODELS:
        head, _, tail = file.stem.rpartition("-")
        for table in (layers, tuned) if file.stem != "tiny-llama" else (layers,):
            short = f"`-{tail}`" in table and f"`{head}-" in table  # `llama-7b` `-13b`
            assert f"`{file.stem}`" in table or short, file.stem
    for kind, names in LINEAR.items():
        (row,) = [line for line in layers.splitlines() if line.startswith(f"| `{kind}` |")]
        twin = {"mistral": "as llama", "stablelm": "as llama", "falcon": "as gpt_neox"}.get(kind)
        assert twin in row if twin else all(name in row for name in names)
