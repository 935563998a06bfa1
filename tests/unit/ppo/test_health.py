"""What a rollout shows against numpy, scipy and loops; and after which rollouts a run is ended."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ftpipe.errors import HealthError
from ftpipe.ppo.experience import Experience, experience
from ftpipe.ppo.health import Watch, correlation, explained_variance, measures, repeated
from ftpipe.ppo.layout import Answer
from ftpipe.ppo_config import HealthConfig, PpoConfig
from tests.unit.ppo.test_experience import ENDED, LENGTHS, judged

WATCHED = [1.0, 2.0, 3.0, 4.0, 5.5]


def rollout(members: int = 3, **keys: Any) -> Experience:
    return experience(judged(members), None, WATCHED, 0.3, PpoConfig(**keys))


def rows(found: Experience, name: str) -> list[list[float]]:
    whole = getattr(found, name).tolist()
    return [row[:length] for row, length in zip(whole, LENGTHS, strict=True)]


def test_every_measure_is_that_of_loops() -> None:
    found = rollout()
    shown = measures(found)
    scores = found.scores_B.tolist()
    assert shown["score"] == pytest.approx(np.mean(scores))
    assert shown["score_std"] == pytest.approx(np.std(scores))
    members = [one.members_M.tolist() for one in judged(3) if one.members_M is not None]
    assert shown["disagreement"] == pytest.approx(np.mean([np.std(three) for three in members]))
    assert shown["watched"] == pytest.approx(16 / 5 - 0.1)
    apart = [
        [p - q for p, q in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(rows(found, "logps_BT"), rows(found, "ref_logps_BT"), strict=True)
    ]
    # Schulman's r is the reference's probability over the policy's
    assert shown["kl"] == pytest.approx(sum(map(sum, apart)) / 5, rel=1e-5)
    assert shown["kl_k2"] == pytest.approx(sum(d * d / 2 for row in apart for d in row) / 5)
    assert shown["kl_k3"] == pytest.approx(sum(math.exp(-d) - 1 + d for row in apart for d in row) / 5)
    entropies = [number for row in rows(found, "entropies_BT") for number in row]
    assert shown["entropy"] == pytest.approx(sum(entropies) / sum(LENGTHS))
    assert shown["length"] == pytest.approx(sum(LENGTHS) / 5)
    assert shown["eos_rate"] == pytest.approx(ENDED.count(True) / 5)
    assert shown["repeated"] == pytest.approx(np.mean([repeated(one.tokens) for one in found.answers]))
    assert shown["length_correlation"] == pytest.approx(stats.pearsonr(scores, LENGTHS).statistic)
    returns = np.concatenate(rows(found, "returns_BT"))
    values = np.concatenate(rows(found, "values_BT"))
    want = 1 - np.var(returns - values) / np.var(returns)
    assert shown["explained_variance"] == pytest.approx(want, rel=1e-5)
    assert set(shown) == {
        *("score", "score_std", "disagreement", "watched", "kl", "kl_k2", "kl_k3", "entropy"),
        *("length", "eos_rate", "repeated", "length_correlation", "explained_variance"),
    }
    assert all(isinstance(value, float) for value in shown.values())


def test_what_there_is_nothing_of_is_not_shown() -> None:
    shown = measures(experience(judged(1), None, None, 0.3, PpoConfig()))
    assert "disagreement" not in shown and "watched" not in shown


def test_values_are_held_against_returns_where_something_is_learned() -> None:
    found = rollout(mask_truncated=True)
    kept = [row for row, ended in zip(rows(found, "returns_BT"), ENDED, strict=True) if ended]
    foreseen = [row for row, ended in zip(rows(found, "values_BT"), ENDED, strict=True) if ended]
    returns, values = np.concatenate(kept), np.concatenate(foreseen)
    want = 1 - np.var(returns - values) / np.var(returns)
    assert measures(found)["explained_variance"] == pytest.approx(want, rel=1e-5)
    # all else is of all answers
    assert measures(found)["length"] == pytest.approx(sum(LENGTHS) / 5)


def test_a_rollout_that_teaches_nothing_is_measured_all_the_same() -> None:
    cut = [replace(one, answer=replace(one.answer, ended=False)) for one in judged()]
    shown = measures(experience(cut, None, None, 0.3, PpoConfig(mask_truncated=True)))
    assert math.isnan(shown["explained_variance"])
    assert shown["eos_rate"] == 0
    assert math.isfinite(shown["score"])


def test_nothing_outside_an_answer_is_measured() -> None:
    found = rollout()
    junk = {
        name: getattr(found, name).masked_fill(~found.mask_BT, math.nan)
        for name in ("logps_BT", "ref_logps_BT", "entropies_BT", "values_BT", "returns_BT")
    }
    assert measures(replace(found, **junk)) == measures(found)


@pytest.mark.parametrize(
    "tokens", [[1, 2, 3], [], [7] * 9, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2], [*range(30)]]
)
def test_repeated_stretches_are_counted(tokens: list[int]) -> None:
    counted = Counter(tuple(tokens[at : at + 4]) for at in range(len(tokens) - 3))
    again = sum(times - 1 for times in counted.values())
    assert repeated(tokens) == pytest.approx(again / max(len(tokens) - 3, 1))


def test_repeated_by_hand() -> None:
    assert repeated([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three stretches, all the same
    assert repeated([1, 2, 3, 4]) == repeated([1, 2, 3]) == 0
    assert repeated([1, 2, 3, 1, 2, 3]) == 0  # a stretch has four tokens, not three
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_correlation_is_pearsons_and_none_where_one_is_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    one_N, other_N = torch.randn(40, generator=generator), torch.randn(40, generator=generator) + 1e3
    want = stats.pearsonr(one_N.double().numpy(), other_N.double().numpy()).statistic
    assert correlation(one_N, other_N) == pytest.approx(want)
    assert correlation(one_N, one_N * -3 + 1) == pytest.approx(-1)
    for constant in (0.0, 0.1, -7.3, 12345.678):
        assert math.isnan(correlation(torch.full((40,), constant), one_N))
        assert math.isnan(correlation(one_N, torch.full((40,), constant)))


def test_equal_scores_have_no_deviation_at_all() -> None:
    # a sum of float32 is rounded, and that would be a deviation
    for count, score in itertools.product((2, 3, 7, 48, 64, 100), (0.1, -7.3, 1 / 3, 12345.678)):
        some = [replace(one, place=at) for at, one in enumerate(judged() * count)][:count]
        found = experience(some, [score] * count, None, 0.3, PpoConfig())
        assert measures(found)["score_std"] == 0


def test_explained_variance_at_its_ends() -> None:
    returns_N = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns_N, returns_N) == 1
    assert explained_variance(returns_N + 5, returns_N) == 1  # it does not see the level
    assert explained_variance(torch.zeros(3), returns_N) == 0
    assert explained_variance(-returns_N, returns_N) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns_N, torch.full((3,), 0.1)))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))


GOOD = {"score": 1.0, "kl": 2.0, "entropy": 4.0, "eos_rate": 0.8}
LIMITS = HealthConfig(max_kl=10.0, min_entropy=0.25, min_eos_rate=0.5, patience=3)
# what is wrong, a rollout that shows it, and one just within the limit
WRONG = [
    ("kl", {"kl": 10.001}, {"kl": 10.0}),
    ("entropy", {"entropy": 0.999}, {"entropy": 1.0}),
    ("eos_rate", {"eos_rate": 0.399}, {"eos_rate": 0.4}),
]
SENTENCES = {
    "kl": "the policy has left its reference: the KL of an answer is 10 nats, above "
    "ppo.health.max_kl=10 in 3 rollouts in a row; raise ppo.beta, set ppo.kl_target, or lower "
    "ppo.learning_rate.",
    "entropy": "the policy says the same whatever it draws: the entropy of a token is 0.999 nats, below "
    "1 (ppo.health.min_entropy=0.25 of the first rollout's) in 3 rollouts in a row; raise ppo.beta or "
    "ppo.entropy_weight, or lower ppo.learning_rate.",
    "eos_rate": "answers no longer end: 39.90% of them do, below 40.00% (ppo.health.min_eos_rate=0.5 of "
    "the first rollout's) in 3 rollouts in a row; raise ppo.missing_eos_penalty or ppo.max_new_tokens.",
}


@pytest.mark.parametrize(("name", "bad", "within"), WRONG)
def test_a_run_is_ended_after_so_many_bad_rollouts_in_a_row(
    name: str, bad: dict[str, float], within: dict[str, float]
) -> None:
    watch = Watch(LIMITS)
    watch.look(GOOD)
    for _ in range(3):  # never three in a row, however many there are
        watch.look(GOOD | bad)
        watch.look(GOOD | bad)
        watch.look(GOOD | within)
    watch.look(GOOD | bad)
    watch.look(GOOD | bad)
    with pytest.raises(HealthError) as error:
        watch.look(GOOD | bad)
    assert str(error.value) == SENTENCES[name]


def test_a_patience_of_one_ends_at_once() -> None:
    for _, bad, _ in WRONG:
        watch = Watch(replace(LIMITS, patience=1))
        watch.look(GOOD)
        with pytest.raises(HealthError, match="in 1 rollouts in a row"):
            watch.look(GOOD | bad)


def test_what_is_wrong_is_counted_by_itself() -> None:
    watch = Watch(LIMITS)
    watch.look(GOOD)
    for bad in ({"kl": 99.0}, {"entropy": 0.1}, {"eos_rate": 0.0}, {"kl": 99.0}, {"entropy": 0.1}):
        watch.look(GOOD | bad)


@pytest.mark.parametrize("key", ["max_kl", "min_entropy", "min_eos_rate"])
def test_without_a_limit_nothing_is_too_far(key: str) -> None:
    far = {"max_kl": {"kl": 1e9}, "min_entropy": {"entropy": 0.0}, "min_eos_rate": {"eos_rate": 0.0}}
    limits = replace(LIMITS)
    setattr(limits, key, None)
    watch = Watch(limits)
    watch.look(GOOD)
    for _ in range(10):
        watch.look(GOOD | far[key])


@pytest.mark.parametrize("first", [4.0, 2.0])
def test_the_first_rollout_is_what_later_ones_are_held_against(first: float) -> None:
    watch = Watch(replace(LIMITS, patience=1))
    for share in (1.0, 0.75, 0.5, 0.26):
        watch.look(GOOD | {"entropy": share * first})
    with pytest.raises(HealthError):  # a quarter of the first one's, not of the last one's
        watch.look(GOOD | {"entropy": 0.24 * first})


def test_a_policy_that_never_ended_its_answers_is_not_blamed_for_it() -> None:
    watch = Watch(LIMITS)
    for _ in range(5):
        watch.look(GOOD | {"eos_rate": 0.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["score", "kl", "entropy"])
def test_what_is_not_finite_ends_a_run_at_once(name: str, value: float) -> None:
    watch = Watch(HealthConfig(max_kl=None, min_entropy=None, min_eos_rate=None, patience=50))
    watch.look(GOOD)
    with pytest.raises(HealthError, match=f"the {name} of the rollout is {value}.*ppo.learning_rate"):
        watch.look(GOOD | {name: value})


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, bad, _ in WRONG])
def test_a_resumed_run_goes_on_counting(name: str, bad: dict[str, float]) -> None:
    watch = Watch(LIMITS)
    watch.look(GOOD)
    watch.look(GOOD | bad)
    watch.look(GOOD | bad)
    again = Watch(LIMITS)
    again.restore(json.loads(json.dumps(watch.state())))
    assert again == watch
    with pytest.raises(HealthError) as error:
        again.look(GOOD | bad)
    assert str(error.value) == SENTENCES[name]


def test_a_restored_watch_shares_nothing_with_what_it_was_restored_from() -> None:
    watch = Watch(LIMITS)
    watch.look(GOOD)
    state = watch.state()
    again = Watch(LIMITS)
    again.restore(state)
    watch.first["entropy"] = 0.0
    assert again.first == {"entropy": 4.0, "eos_rate": 0.8}


def test_answers_that_repeat_themselves_are_seen() -> None:
    found = rollout()
    stuck = replace(found, answers=tuple(Answer(one.prompt, (5,) * 8, True) for one in found.answers))
    assert measures(stuck)["repeated"] == pytest.approx(4 / 5)
    assert measures(stuck)["eos_rate"] == 1
