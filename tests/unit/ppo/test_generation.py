"""Drawn answers against full forward passes without a cache, and their frequencies against softmax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ftpipe.ppo.generation import Draw, answers, uniforms, until_stop
from ftpipe.ppo.layout import Answer
from ftpipe.ppo_config import PpoConfig
from tests.unit.ppo.tiny import KINDS, PAD, STOP, WORDS, model

STOPS = frozenset({STOP, 8})
GENERATOR = np.random.default_rng(5)
PROMPTS = [GENERATOR.integers(WORDS, size=size).tolist() for size in (3, 9, 1, 6, 6, 2, 4)]
KEYS = [(11, 0, 2, place) for place in range(len(PROMPTS))]
CHANCE = 1e-3  # of a test that fails though nothing is wrong; the numbers are the same each time


def config(**keys: Any) -> PpoConfig:
    return PpoConfig(**{"max_new_tokens": 10, **keys})


def kept(probabilities_V: np.ndarray, top_p: float) -> Any:
    """Return the distribution over the fewest of the likeliest words that make up ``top_p``."""
    left, found = top_p, np.zeros_like(probabilities_V)
    for word in np.argsort(-probabilities_V):
        found[word] = probabilities_V[word]
        left -= probabilities_V[word]
        if left <= 0:
            break
    return found / found.sum()


def slowly(
    policy: PreTrainedModel, prompt: Sequence[int], key: Sequence[int], ppo: PpoConfig
) -> tuple[list[int], bool]:
    """Return an answer drawn by a whole forward pass for each token."""
    tokens: list[int] = []
    for number in uniforms(key, ppo.max_new_tokens).tolist():
        with torch.no_grad():
            logits_V = policy(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        probabilities_V = (logits_V.double() / ppo.temperature).softmax(-1).numpy()
        token, passed = -1, 0.0
        while passed <= number:
            token += 1
            passed += kept(probabilities_V, ppo.top_p)[token]
        tokens.append(token)
        if token in STOPS:
            return tokens, True
    return tokens, False


def test_numbers_are_uniform_and_below_1() -> None:
    found = uniforms((1, 2, 3), 20_000)
    assert found.dtype == torch.float64
    assert found.min().item() >= 0 and found.max().item() < 1
    assert stats.kstest(found.numpy(), "uniform").pvalue > CHANCE
    # no closer to 1 than its grain, so that a product with a sum near 1 stays below the sum
    assert torch.equal(found * 2**40, (found * 2**40).floor())


def test_numbers_next_to_1_are_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def random(self, count: int) -> np.ndarray:
            return np.array([1 - 2.0**-53, 2.0**-53, 0.5])

    monkeypatch.setattr(np.random, "default_rng", lambda _: Ends())
    assert uniforms((1,), 3).tolist() == [1 - 2.0**-40, 0.0, 0.5]


def test_numbers_are_their_keys_alone() -> None:
    found = uniforms((7, 0, 1, 2), 50)
    assert torch.equal(uniforms([7, 0, 1, 2], 50), found)
    assert torch.equal(uniforms((7, 0, 1, 2), 9), found[:9])  # however long answers may be
    for other in ((8, 0, 1, 2), (7, 1, 1, 2), (7, 0, 2, 1), (7, 0, 1, 3)):
        assert not set(uniforms(other, 50).tolist()) & set(found.tolist())


def test_the_first_numbers_of_neighbouring_keys_are_uniform_and_unrelated() -> None:
    first = np.array([uniforms((0, 0, 3, place), 2).numpy() for place in range(3000)])
    assert stats.kstest(first[:, 0], "uniform").pvalue > CHANCE
    for one, other in ((first[:-1, 0], first[1:, 0]), (first[:, 0], first[:, 1])):
        assert stats.pearsonr(one, other).pvalue > CHANCE


def draw(scores_V: Tensor, numbers: Iterable[float]) -> list[int]:
    """Return which word each number falls on; it is each row's second number."""
    u_B = torch.tensor(list(numbers), dtype=torch.float64)
    uniforms_BT = torch.stack([torch.full_like(u_B, 0.5), u_B], 1)
    ids_BL = torch.zeros((len(u_B), 4), dtype=torch.int64)  # three tokens of prompt, one drawn before
    only_BV = Draw(uniforms_BT, 3)(ids_BL, scores_V.expand(len(u_B), -1).contiguous())  # type: ignore[arg-type]
    assert (only_BV == -torch.inf).sum(1).tolist() == [scores_V.shape[0] - 1] * len(u_B)
    return only_BV.argmax(-1).tolist()


def test_a_word_is_drawn_where_the_number_falls() -> None:
    scores_V = torch.tensor([0.2, 0.3, 0.5]).log() + 7  # logits have no level
    assert draw(scores_V, [0.0, 0.1, 0.199, 0.201, 0.499, 0.501, 0.999]) == [0, 0, 0, 1, 1, 2, 2]


ENDS = [0.0, 2.0**-40, 0.5, 1 - 2.0**-40]


def test_a_word_of_probability_0_is_never_drawn() -> None:
    none = -math.inf
    assert draw(torch.tensor([none, 0.0, none, 0.0, none]), ENDS) == [1, 1, 3, 3]
    assert draw(torch.tensor([none, none, 0.0]), ENDS) == [2] * 4
    assert draw(torch.tensor([0.0, none, none]), ENDS) == [0] * 4
    # too rare for float64 to tell from 0
    assert draw(torch.tensor([-800.0, 0.0, -800.0]), ENDS) == [1] * 4


@pytest.mark.parametrize("seed", range(5))
def test_nor_is_it_where_a_sum_of_many_misses_1(seed: int) -> None:
    scores_V = torch.randn(50_000, generator=torch.Generator().manual_seed(seed)) * 3
    forbidden = [0, 1, 25_000, *range(49_900, 50_000)]
    scores_V[forbidden] = -torch.inf
    drawn = draw(scores_V, [*ENDS, *uniforms((seed,), 20).tolist()])
    assert not set(drawn) & set(forbidden)
    assert drawn[0] == 2 and drawn[3] == 49_899


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.5, 1.0), (1.7, 0.7)])
def test_tokens_are_as_frequent_as_the_model_has_them_likely(temperature: float, top_p: float) -> None:
    policy, prompt, count = model(words=9), [1, 5, 2], 4000
    ppo = config(max_new_tokens=1, temperature=temperature, top_p=top_p)
    found = answers(policy, [prompt] * count, [(3, 0, 0, p) for p in range(count)], ppo, {STOP}, PAD)
    seen_V = np.bincount([one.tokens[0] for one in found], minlength=9)
    with torch.no_grad():
        logits_V = policy(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likely_V = kept((logits_V / temperature).softmax(-1).numpy(), top_p)
    possible = likely_V > 0
    assert (top_p < 1) == (not possible.all())
    assert not seen_V[~possible].any()
    assert stats.chisquare(seen_V[possible], likely_V[possible] * count).pvalue > CHANCE


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (2.0, 0.6)])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_full_forward_passes(kind: str, temperature: float, top_p: float) -> None:
    policy, ppo = model(kind), config(temperature=temperature, top_p=top_p)
    found = answers(policy, PROMPTS, KEYS, ppo, STOPS, PAD)
    for one, prompt, key in zip(found, PROMPTS, KEYS, strict=True):
        tokens, ended = slowly(policy, prompt, key, ppo)
        assert one == Answer(tuple(prompt), tuple(tokens), ended)


def test_the_answers_of_the_tests_are_of_every_kind() -> None:
    found = answers(model(), PROMPTS, KEYS, config(), STOPS, PAD)
    assert {one.ended for one in found} == {True, False}
    assert {one.tokens[-1] for one in found} > STOPS
    assert len({len(one.tokens) for one in found}) > 3


def test_an_answer_is_the_same_alone_and_among_others() -> None:
    policy = model()
    want = answers(policy, PROMPTS, KEYS, config(), STOPS, PAD)
    for prompt, key, one in zip(PROMPTS, KEYS, want, strict=True):
        assert answers(policy, [prompt], [key], config(), STOPS, PAD) == [one]
    order = [4, 0, 6, 2, 5, 3, 1]
    moved = answers(
        policy, [PROMPTS[at] for at in order], [KEYS[at] for at in order], config(), STOPS, PAD
    )
    assert moved == [want[at] for at in order]
    for size in (1, 2, 3, 7, 100):
        ppo = config(generation_batch_size=size)
        assert answers(policy, PROMPTS, KEYS, ppo, STOPS, PAD) == want


def test_the_same_prompt_has_another_answer_under_another_key() -> None:
    found = answers(model(), [PROMPTS[0]] * 5, KEYS[:5], config(), STOPS, PAD)
    assert len(set(found)) == 5


def test_the_token_that_pads_may_be_any() -> None:
    policy = model()
    want = answers(policy, PROMPTS, KEYS, config(), STOPS, PAD)
    for pad in (0, 8, WORDS - 1):
        assert answers(policy, PROMPTS, KEYS, config(), STOPS, pad) == want


def test_prompts_of_similar_length_are_answered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = model(), []
    plain: Any = policy.generate

    def watched(input_ids: Tensor, **rest: Any) -> Any:
        seen.append(tuple(input_ids.shape))
        return plain(input_ids=input_ids, **rest)

    monkeypatch.setattr(policy, "generate", watched)
    answers(policy, PROMPTS, KEYS, config(generation_batch_size=3), STOPS, PAD)
    assert seen == [(3, 9), (3, 4), (1, 1)]  # the longest first: what does not fit fails at once
    seen.clear()
    answers(policy, PROMPTS, KEYS, config(), STOPS, PAD)
    assert seen == [(7, 9)]


def test_a_batch_ends_when_all_of_its_answers_have() -> None:
    policy, passes = model(), []
    policy.register_forward_hook(lambda *_: passes.append(1))
    found = answers(policy, PROMPTS, KEYS, config(), set(range(WORDS)), PAD)
    assert all(one.ended and len(one.tokens) == 1 for one in found)
    assert len(passes) == 1


def test_nothing_is_asked_and_nothing_answered() -> None:
    assert answers(model(), [], [], config(), STOPS, PAD) == []


def test_an_answer_ends_at_its_first_stop_token_or_at_the_greatest_length() -> None:
    assert until_stop([5, 8, 3, 8], {8, 3}) == [5, 8]
    assert until_stop([8], {8}) == [8]
    assert until_stop([5, 6], {8}) == [5, 6]
    whole = answers(model(), PROMPTS, KEYS, config(), STOPS, PAD)
    for most in range(1, 10):
        cut = answers(model(), PROMPTS, KEYS, config(max_new_tokens=most), STOPS, PAD)
        for one, long in zip(cut, whole, strict=True):
            assert one.tokens == long.tokens[:most]
            assert one.ended == (long.ended and len(long.tokens) <= most)


def test_what_a_model_says_of_its_own_generation_changes_nothing() -> None:
    policy = model()
    want = answers(policy, PROMPTS, KEYS, config(), STOPS, PAD)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        min_p=0.5,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=10,
        suppress_tokens=[STOP, 5, 6],
        begin_suppress_tokens=[1, 2],
        bad_words_ids=[[9]],
        forced_eos_token_id=12,
        sequence_bias=[[[7], 9.0]],
        exponential_decay_length_penalty=(1, 5.0),
        renormalize_logits=True,
        max_length=12,
        max_time=1e-9,
        eos_token_id=12,
        pad_token_id=12,
        bos_token_id=12,
    )
    policy.generation_config, stated = own, own.to_dict()
    assert answers(policy, PROMPTS, KEYS, config(), STOPS, PAD) == want
    assert policy.generation_config is own
    assert own.to_dict() == stated


def test_a_models_own_settings_are_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model()
    own = policy.generation_config

    def fails(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        answers(policy, PROMPTS, KEYS, config(), STOPS, PAD)
    assert policy.generation_config is own


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_still_give_a_token(bad: float) -> None:
    # the rollout's measures then say what is wrong, on every rank alike
    scores = torch.tensor([[0.1, bad, 0.2], [0.0, 1.0, 2.0]])
    left = Draw(torch.full((2, 1), 0.5), 0)(torch.zeros((2, 0), dtype=torch.long), scores)  # type: ignore[arg-type]
    assert (left == 0).sum(1).tolist() == [1, 1]
