"""The score of a reply: where it is read, what it starts from, and what it is normalised by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from ftpipe import modeling
from ftpipe.choices import Dtype, Method, Precision
from ftpipe.config import RunConfig
from ftpipe.errors import ModelError
from ftpipe.policy import Incoming
from ftpipe.reward import head, model
from ftpipe.reward.model import Held, Normalization, RewardModel
from ftpipe.tokenizer import byte_level

VOCABULARY, UNUSED, EOS = 40, 38, 39
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt_neox": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # no position_ids
}
ROWS = [[5, 6, 7, EOS], [8, EOS, 9, 10, 11, EOS], [12, EOS], [13] * 9 + [EOS]]


def config(kind: str, **more: Any) -> Any:
    special = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": UNUSED}
    sizes = ARCHITECTURES.get(kind, LLAMA)
    return AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_labels=1, initializer_range=0.2, **special, **sizes, **more
    )


def untouched(kind: str, pad: int = UNUSED) -> Any:
    """Return transformers' own model; the same weights each time."""
    set_seed(0)
    made = AutoModelForSequenceClassification.from_config(config(kind)).eval()
    made.config.pad_token_id = pad  # afterwards: the row of the padding token starts at zero
    head.initialise(made, 3)
    return made


def pooled(kind: str, pad: int = UNUSED) -> Any:
    made = untouched(kind, pad)
    head.pool_by_mask(made)
    return made


def score(one: Any, ids: Tensor, mask: Tensor | None = None) -> list[float]:
    with torch.no_grad():
        found: list[float] = one(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return found


def padded(rows: list[list[int]], side: str, pad: int, more: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows)) + more
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append(row + [pad] * gap if side == "right" else [pad] * gap + row)
        mask.append([1] * len(row) + [0] * gap if side == "right" else [0] * gap + [1] * len(row))
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("pad", [EOS, 1, UNUSED])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [*ARCHITECTURES])
def test_a_score_is_that_of_the_row_alone(kind: str, side: str, pad: int) -> None:
    plain = untouched(kind)  # its pad is in no row, so its score is that of the last token
    alone = [score(plain, torch.tensor([row]))[0] for row in ROWS]
    assert max(alone) - min(alone) > 0.5
    ours = pooled(kind, pad)
    for order, more in (((0, 1, 2, 3), 0), ((3, 1, 0, 2), 5), ((2,), 3), ((2, 0), 0)):
        rows = [ROWS[n] for n in order]
        found = score(ours, *padded(rows, side, pad, more))
        assert found == pytest.approx([alone[n] for n in order], abs=1e-5)


@pytest.mark.parametrize("kind", [*ARCHITECTURES])
def test_where_eos_pads_transformers_leaves_out_the_end_of_turn(kind: str) -> None:
    row = ROWS[0]
    assert row[-1] == EOS and EOS not in row[:-1]
    plain = untouched(kind)
    at_end, before_end = (score(plain, torch.tensor([ids]))[0] for ids in (row, row[:-1]))
    assert abs(at_end - before_end) > 0.1
    ids, mask = padded([row], "right", EOS, 2)
    assert score(untouched(kind, EOS), ids, mask) == pytest.approx([before_end], abs=1e-5)
    assert score(pooled(kind, EOS), ids, mask) == pytest.approx([at_end], abs=1e-5)


def test_without_a_mask_every_token_counts() -> None:
    ids = torch.tensor([ROWS[0]])
    assert score(pooled("llama", EOS), ids) == pytest.approx(score(untouched("llama"), ids))


def test_the_head_computes_in_float32_on_a_model_of_halves() -> None:
    halves = untouched("llama").to(torch.bfloat16)
    head.initialise(halves, 3)
    head.pool_by_mask(halves)
    ids = torch.tensor([ROWS[1]])
    weight_H = halves.score.weight[0].detach()
    assert weight_H.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_H = halves.model(ids).last_hidden_state[0, -1]
        found = halves(ids).logits
    assert found.dtype == torch.float32
    by_hand = sum(float(x) * float(w) for x, w in zip(hidden_H, weight_H, strict=True))
    assert found.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_head_is_drawn_from_the_seed_alone() -> None:
    wide = AutoModelForSequenceClassification.from_config(config("llama", max_position_embeddings=8))
    wide.score = torch.nn.Linear(4096, 1)
    drawn = []
    for before, seed in ((0, 1), (7, 1), (0, 2)):
        torch.manual_seed(before)
        head.initialise(wide, seed)
        drawn.append(wide.score.weight.detach().clone())
        assert torch.equal(wide.score.bias, torch.zeros(1))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # 4096 draws: their deviation is within 5 of its own standard errors, 1 / sqrt(2 * 4096)
    assert drawn[0].std().item() * math.sqrt(4097) == pytest.approx(1, abs=5 / math.sqrt(8192))
    assert drawn[0].mean().item() * math.sqrt(4097) == pytest.approx(0, abs=5 / math.sqrt(4096))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_head_of_another_layout_is_refused(kind: str) -> None:
    sizes: dict[str, Any] = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4}
    made = AutoModelForSequenceClassification.from_config(
        config(kind, **sizes) if kind == "distilbert" else config(kind)
    )
    with pytest.raises(ModelError, match="does not score a text by one linear layer on its last token"):
        head.initialise(made, 0)
        head.pool_by_mask(made)


def test_looking_at_the_layout_leaves_the_mode_as_it_was() -> None:
    for mode in (True, False):
        made = untouched("gpt2").train(mode)
        head.pool_by_mask(made)
        assert made.training is mode and not made.score._forward_pre_hooks


def test_an_architecture_without_a_score_is_refused(tmp_path: Path) -> None:
    mamba = AutoConfig.for_model(
        "mamba", vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="transformers has no class with a score"):
        modeling.open_weights(str(tmp_path), {}, scored=True)


def test_weights_that_are_missing_are_no_silence(tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_config(config("llama"))
    whole = made.state_dict()
    kept = {name: weight for name, weight in whole.items() if "layers.1.mlp.up" not in name}
    made.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ModelError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        modeling.open_weights(str(tmp_path), {}, scored=True)
    made.save_pretrained(tmp_path)
    modeling.open_weights(str(tmp_path), {}, scored=True)  # the score alone may be missing


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Incoming]:
    """Save a random policy of an architecture, for the byte-level tokenizer."""

    def saved(kind: str, **more: Any) -> Incoming:
        set_seed(0)
        tokenizer = byte_level()
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        made = AutoConfig.for_model(
            kind,
            vocab_size=len(tokenizer),
            initializer_range=0.2,
            **special,
            **ARCHITECTURES[kind],
            **more,
        )
        AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / kind)
        return Incoming(str(tmp_path / kind))

    return saved


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # GPT-2's Conv1D
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dropout_is_off_but_for_the_adapters(
    kind: str, cfg: RunConfig, base: Callable[..., Incoming]
) -> None:
    more = {"attention_dropout": 0.5} if kind == "llama" else {"resid_pdrop": 0.5, "attn_pdrop": 0.5}
    start = base(kind, **more)
    ids = torch.tensor([ROWS[1]])
    for method, dropout, same in (
        (Method.full, 0.0, True),
        (Method.lora, 0.0, True),
        (Method.lora, 0.5, False),
    ):
        cfg.adapter.method, cfg.adapter.dropout = method, dropout
        made = model.make(cfg, start, byte_level(), 0).train()
        for name, weight in made.named_parameters():  # a fresh adapter adds nothing yet
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        assert (score(made, ids) == score(made, ids)) is same


def test_members_start_from_heads_of_their_own(cfg: RunConfig, base: Callable[..., Incoming]) -> None:
    start = base("llama")
    cfg.adapter.method = Method.lora
    first, again, other = (model.make(cfg, start, byte_level(), seed) for seed in (0, 0, 1))
    assert torch.equal(of_head(first), of_head(again)) and not torch.equal(
        of_head(first), of_head(other)
    )
    assert of_head(first).requires_grad


def of_head(one: Any) -> Tensor:
    weight: Tensor = one.base_model.model.score.modules_to_save["default"].weight
    return weight


class Fixed(torch.nn.Module):
    """Scores a row by its first token, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.factor * input_ids[:, :1].float())


def test_the_reward_is_the_mean_of_the_members_normalised_each_by_its_own() -> None:
    members = RewardModel(
        (Fixed(1.0), Fixed(-10.0)),
        (Normalization(2.0, 0.5, 3, "chosen"), Normalization(-10.0, 20.0, 3, "chosen")),
    )
    ids_NL = torch.tensor([[3, 0], [7, 0]])
    by_hand = [[(3 - 2) / 0.5, (7 - 2) / 0.5], [(-30 + 10) / 20, (-70 + 10) / 20]]
    mask_NL = torch.ones_like(ids_NL)
    assert members.members(ids_NL, mask_NL).tolist() == by_hand
    assert members.score(ids_NL, mask_NL).tolist() == [(2 - 1) / 2, (10 - 3) / 2]
    # two values lie half their difference from their mean
    assert members.disagreement(ids_NL, mask_NL).tolist() == [(2 + 1) / 2, (10 + 3) / 2]


def test_normalised_rewards_have_mean_zero_and_deviation_one() -> None:
    raw = [3.0, -1.0, 4.0, 1.5, 9.25]
    found = Normalization.measured(raw, "chosen")
    assert found.rows == 5
    normalised = found.apply(torch.tensor(raw, dtype=torch.float64)).tolist()
    assert sum(normalised) == pytest.approx(0, abs=1e-12)
    assert sum(value**2 for value in normalised) / 5 == pytest.approx(1)


@pytest.mark.parametrize("raw", [[2.5, 2.5, 2.5], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_a_constant_reward_is_refused(raw: list[float]) -> None:
    with pytest.raises(ModelError, match=rf"the reward of all {len(raw)} replies \(chosen\) is "):
        Normalization.measured(raw, "chosen")


def test_an_adapter_that_lacks_a_weight_is_refused(
    cfg: RunConfig, base: Callable[..., Incoming], tmp_path: Path
) -> None:
    start = base("llama")
    folder = tmp_path / "policy"
    cfg.adapter.method = Method.lora
    policy = AutoModelForCausalLM.from_pretrained(start.weights)
    adapter = modeling.adapter_config(cfg.adapter, policy)
    assert adapter is not None
    get_peft_model(policy, adapter).save_pretrained(str(folder))
    going_on = replace(start, adapter=folder)
    made = model.make(cfg, going_on, byte_level(), 0)  # whole, it goes on
    assert any("lora_B" in name for name, weight in made.named_parameters() if weight.requires_grad)
    whole = load_file(folder / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: weight for name, weight in whole.items() if name != gone}, folder / model.WEIGHTS)
    with pytest.raises(ModelError, match=rf"lacks weights: {gone}; delete the folder"):
        model.make(cfg, going_on, byte_level(), 0)


def test_how_the_weights_were_held_is_stated_and_read_again(cfg: RunConfig, tmp_path: Path) -> None:
    cfg.adapter.method, cfg.adapter.quantization = Method.qlora, "fp4"
    cfg.adapter.double_quantization, cfg.launch.precision = False, Precision.bf16
    one = {".": Normalization(0.0, 1.0, 2, "chosen")}
    model.state(tmp_path, one, byte_level(), Held.by(cfg))
    stated = json.loads((tmp_path / "reward.json").read_text())["held"]
    assert stated == {
        "method": "qlora",
        "dtype": "bfloat16",
        "precision": "bf16",
        "quantization": "fp4",
        "double_quantization": False,
    }
    read = Held.read(stated)
    assert read == Held.by(cfg)
    four_bits = read.four_bits()
    assert four_bits is not None
    assert four_bits.to_dict() == modeling.quantization(cfg).to_dict()
    assert (four_bits.bnb_4bit_quant_type, four_bits.bnb_4bit_use_double_quant) == ("fp4", False)
    assert four_bits.bnb_4bit_compute_dtype is torch.bfloat16
    cfg.adapter.method = Method.full
    assert Held.by(cfg).dtype is Dtype.float32 and Held.by(cfg).four_bits() is None


def test_another_vocabulary_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    one = {".": Normalization(0.0, 1.0, 2, "chosen")}
    model.state(tmp_path, one, byte_level(), Held.by(cfg))
    other = byte_level()
    other.add_tokens(["<|more|>"])
    with pytest.raises(ModelError, match="another vocabulary than the tokenizer at hand"):
        model.load(tmp_path, other)
    stated = json.loads((tmp_path / "reward.json").read_text())
    assert stated["pooling"] == "last attended token"
    for name in ("members", "held"):
        lacking = {key: value for key, value in stated.items() if key != name}
        (tmp_path / "reward.json").write_text(json.dumps(lacking))
        with pytest.raises(ModelError, match=rf"reward\.json cannot be read: KeyError '{name}'"):
            model.load(tmp_path, byte_level())
