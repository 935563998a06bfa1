"""The run's own model: what is drawn has the right distribution, and hangs on no neighbour."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.evolve.calls import Call, Said
from ftpipe.evolve.local import LocalModel, OwnDraws
from ftpipe.modeling import random_model
from ftpipe.tokenizer import EOS, byte_level


@pytest.fixture
def base(cfg: RunConfig, empty_folder: Path) -> Path:
    """Return the folder of a tiny model whose words are loud enough to differ."""
    cfg.model.architecture |= {"initializer_range": 0.2, "max_position_embeddings": 256}
    tokenizer = byte_level()
    model = random_model(cfg.model, tokenizer, seed=0)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    return empty_folder / "base"


def local(cfg: RunConfig, base: Path, together: int = 4) -> LocalModel:
    cfg.evolve.concurrency = together
    return LocalModel(cfg, base)


def call(prompt: str, seed: int = 0, temperature: float = 1.0, **more: int) -> Call:
    return Call(prompt, temperature, 0.9, **{"max_tokens": 12, "seed": seed, **more})


def ask(model: LocalModel, calls: Sequence[Call]) -> list[Said]:
    answered = list(model.complete(calls))
    assert [asked for asked, _ in answered] == list(calls)
    return [said for _, said in answered]


# --- the draws ---


def draws(scores: list[float], calls: Sequence[Call]) -> list[int]:
    scores_BV = torch.tensor([scores] * len(calls))
    ids_BT = torch.zeros((len(calls), 1), dtype=torch.long)
    return OwnDraws(calls)(ids_BT, scores_BV).argmax(-1).tolist()


def test_a_draw_has_the_probability_that_its_score_says() -> None:
    scores, temperature, count = [0.0, 1.0, 2.0, -1.0], 2.0, 8000
    calls = [Call("x", temperature, 1.0, 1, seed) for seed in range(count)]
    found = Counter(draws(scores, calls))
    weights = [math.exp(score / temperature) for score in scores]
    expected = [count * weight / sum(weights) for weight in weights]
    # chi-squared with three degrees of freedom; 16.27 is its 0.999 quantile (any table)
    assert sum((found[at] - want) ** 2 / want for at, want in enumerate(expected)) < 16.27


def test_only_the_nucleus_is_drawn_from() -> None:
    # probabilities 0.5, 0.3, 0.15, 0.05: the smallest set with at least 0.75 is the first two
    scores = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    found = Counter(draws(scores, [Call("x", 1.0, 0.75, 1, seed) for seed in range(2000)]))
    assert set(found) == {0, 1}
    assert found[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)


def test_at_temperature_zero_nothing_is_drawn() -> None:
    assert set(draws([0.0, 0.1, 0.0], [Call("x", 0.0, 0.5, 1, seed) for seed in range(50)])) == {1}


def test_each_step_draws_anew() -> None:
    one = OwnDraws([Call("x", 1.0, 1.0, 1, 5)])
    ids_BT, scores_BV = torch.zeros((1, 1), dtype=torch.long), torch.zeros((1, 1000))
    assert len({int(one(ids_BT, scores_BV).argmax()) for _ in range(20)}) > 15


# --- the model ---


def test_what_it_says_hangs_on_the_seed_and_on_no_neighbour(cfg: RunConfig, base: Path) -> None:
    model = local(cfg, base)
    calls = [call("Hi", 1), call("Name a colour, please.", 2), call("Hi", 3), call("?", 4)]
    together = ask(model, calls)
    alone = [ask(model, [one])[0] for one in calls]
    backwards = ask(model, calls[::-1])[::-1]
    assert together == alone == backwards
    assert together == ask(local(cfg, base), calls)
    assert together[0] != together[2]  # only their seeds differ


def test_without_draws_it_says_what_plain_generation_says(cfg: RunConfig, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    plain = AutoModelForCausalLM.from_pretrained(str(base), use_safetensors=True).eval()
    prompts = ["Hi", "Name a colour, please."]
    said = ask(local(cfg, base), [call(prompt, temperature=0.0) for prompt in prompts])
    for prompt, one in zip(prompts, said, strict=True):
        ids_BT = torch.tensor([tokenizer(f"<|user|>\n{prompt}{EOS}\n<|assistant|>\n")["input_ids"]])
        with torch.no_grad():
            whole_BT = plain.generate(ids_BT, do_sample=False, max_new_tokens=12)
        text = tokenizer.decode(whole_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)
        assert one.text == str(text).strip()


def test_where_it_ends_and_where_it_is_cut(cfg: RunConfig, base: Path) -> None:
    model = local(cfg, base)
    eos = byte_level().eos_token_id
    ids = [byte_level()(text)["input_ids"] for text in ("ab", "abcdef")]
    one = call("x", max_tokens=4)
    assert model._said(one, [*ids[0], eos, eos], {eos}) == Said("ab", cut=False)
    assert model._said(one, [*ids[1]], {eos}) == Said("abcd", cut=True)
    # of a batch with a longer neighbour: what comes after its own limit was not asked for
    assert model._said(one, [*ids[1], eos], {eos}) == Said("abcd", cut=True)
    assert model._said(one, [eos], {eos}) == Said("", cut=False)


def test_a_prompt_that_leaves_no_room_is_refused_alone(cfg: RunConfig, base: Path) -> None:
    model = local(cfg, base)
    # <|user|>\n, eos, \n<|assistant|>\n are 9 + 1 + 15 tokens of bytes; the model has 256 positions
    fits, too_long = "x" * (256 - 25 - 12), "x" * (256 - 25 - 12 + 1)
    said = ask(model, [call("Hi"), call(too_long), call(fits)])
    assert [one.refused is None for one in said] == [True, False, True]
    assert said[1].refused == "245 tokens and the answer exceed its positions"
    assert said[0] == ask(model, [call("Hi")])[0]


def test_a_model_that_knows_no_turns_cannot_be_asked(cfg: RunConfig, base: Path) -> None:
    (base / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"base has no chat template; choose a model that follows"):
        local(cfg, base)
