"""What there is to learn from a rollout, worked out token by token with plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftpipe.choices import Algorithm
from ftpipe.ppo.experience import Experience, Judged, experience
from ftpipe.ppo_config import PpoConfig
from tests.unit.ppo.tiny import answers

SIZES = ((3, 5), (2, 1), (4, 7), (1, 3), (2, 2))  # answers 0, 2 and 4 have an end
LENGTHS = [after for _, after in SIZES]
ENDED = [True, False, True, False, True]
BETA = 0.3


def judged(members: int = 1, seed: int = 0) -> list[Judged]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.randn(count, generator=generator)

    return [
        Judged(
            place=place,
            answer=one,
            logps_T=-drawn(len(one.tokens)).abs(),
            ref_logps_T=-drawn(len(one.tokens)).abs(),
            entropies_T=drawn(len(one.tokens)).abs(),
            values_T=drawn(len(one.tokens)),
            members_M=2 * drawn(members) if members else None,
        )
        for place, one in enumerate(answers(0, *SIZES))
    ]


def spread(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    numbers = [number for row in rows for number in row]
    return float(np.mean(numbers)), math.sqrt(np.var(numbers) + 1e-8)


def by_hand(
    some: Sequence[Judged], scores: Sequence[float], beta: float, ppo: PpoConfig
) -> dict[str, list[list[float]]]:
    """Return rewards, advantages and returns as lists of lists; empty for what is not learned."""
    paid = []
    rewards = []
    for one, score in zip(some, scores, strict=True):
        if ppo.score_clip is not None:
            score = min(max(score, -ppo.score_clip), ppo.score_clip)
        if not one.answer.ended:
            score -= ppo.missing_eos_penalty
        pairs = zip(one.logps_T.tolist(), one.ref_logps_T.tolist(), strict=True)
        row = [-beta * (logp - ref) for logp, ref in pairs]
        row[-1] += score
        rewards.append(row)
        paid.append([] if ppo.mask_truncated and not one.answer.ended else row)
    if ppo.whiten_rewards:
        mean, deviation = spread(paid)
        paid = [[(reward - mean) / deviation + mean for reward in row] for row in paid]
    raw = []
    for one, row in zip(some, paid, strict=True):
        values = [*one.values_T.tolist(), 0.0]
        steps = len(row)
        deltas = [row[t] + ppo.gamma * values[t + 1] - values[t] for t in range(steps)]
        raw.append(
            [
                sum((ppo.gamma * ppo.lam) ** (k - t) * deltas[k] for k in range(t, steps))
                for t in range(steps)
            ]
        )
    mean, deviation = spread(raw)
    return {
        "rewards": rewards,
        "advantages": [[(advantage - mean) / deviation for advantage in row] for row in raw],
        "returns": [
            [advantage + value for advantage, value in zip(row, one.values_T.tolist(), strict=False)]
            for row, one in zip(raw, some, strict=True)
        ],
    }


def check(found_BT: Tensor, want: Sequence[Sequence[float]]) -> None:
    assert found_BT.shape == (len(want), max(LENGTHS))
    assert found_BT.dtype == torch.float32
    for b, row in enumerate(want):
        wide = [*row, *[0.0] * (max(LENGTHS) - len(row))]
        assert found_BT[b].tolist() == pytest.approx(wide, abs=2e-5), b


SETTINGS: list[dict[str, Any]] = [
    {},
    {"missing_eos_penalty": 0.0},
    {"missing_eos_penalty": 3.0, "score_clip": 0.5},
    {"gamma": 0.9, "lam": 0.7},
    {"gamma": 0.9, "lam": 0.0},
    {"mask_truncated": True},
    {"whiten_rewards": True},
    {"whiten_rewards": True, "mask_truncated": True, "score_clip": 1.0, "gamma": 0.95},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
@pytest.mark.parametrize("beta", [BETA, 0.0])
def test_a_rollout_is_what_loops_make_of_it(keys: dict[str, Any], beta: float) -> None:
    ppo, some = PpoConfig(**keys), judged()
    scores = [one.members_M.item() for one in some if one.members_M is not None]
    found = experience(some, None, None, beta, ppo)
    want = by_hand(some, scores, beta, ppo)
    check(found.rewards_BT, want["rewards"])
    check(found.advantages_BT, want["advantages"])
    check(found.returns_BT, want["returns"])
    learned = [0 if ppo.mask_truncated and not end else n for n, end in zip(LENGTHS, ENDED, strict=True)]
    assert found.learned_BT.tolist() == [[t < n for t in range(7)] for n in learned]
    assert found.mask_BT.tolist() == [[t < n for t in range(7)] for n in LENGTHS]
    # what is shown is the score as it was given
    assert found.scores_B.tolist() == pytest.approx(scores)


def test_the_oracle_is_not_blind() -> None:
    # each setting changes what it is about, so a test of it cannot pass by chance
    some = judged()
    scores = [one.members_M.item() for one in some if one.members_M is not None]
    assert max(map(abs, scores)) > 1
    made = [str(by_hand(some, scores, BETA, PpoConfig(**keys))) for keys in SETTINGS]
    assert len(set(made)) == len(SETTINGS)


def test_what_the_roles_said_is_kept_row_by_row_in_order() -> None:
    some = judged()
    found = experience(some, None, None, BETA, PpoConfig())
    assert found.answers == tuple(one.answer for one in some)
    assert found.ended_B.tolist() == ENDED
    for name in ("logps", "ref_logps", "entropies", "values"):
        check(getattr(found, f"{name}_BT"), [getattr(one, f"{name}_T").tolist() for one in some])


def test_advantages_are_whitened_over_all_tokens_that_are_learned() -> None:
    for masked in (False, True):
        found = experience(judged(seed=3), None, None, BETA, PpoConfig(mask_truncated=masked))
        learned_N = found.advantages_BT[found.learned_BT].double().numpy()
        assert learned_N.mean() == pytest.approx(0.0, abs=1e-6)
        assert learned_N.std() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("keys", [{}, {"whiten_rewards": True}], ids=str)
def test_of_cut_answers_nothing_is_learned_and_nothing_seen(keys: dict[str, Any]) -> None:
    ppo, some = PpoConfig(mask_truncated=True, **keys), judged()
    found = experience(some, None, None, BETA, ppo)
    for wild in (
        {"logps_T": 1e3, "values_T": -1e3, "ref_logps_T": 5.0},
        {"values_T": math.nan, "logps_T": math.nan},
    ):
        other = []
        for one in some:
            spoilt: dict[str, Any] = {n: torch.full_like(one.values_T, v) for n, v in wild.items()}
            other.append(one if one.answer.ended else replace(one, **spoilt))
        again = experience(other, None, None, BETA, ppo)
        for name in ("advantages_BT", "returns_BT"):
            assert torch.equal(getattr(again, name), getattr(found, name))
            assert not getattr(again, name)[~found.ended_B].any()
    # as if they were not there at all
    left = experience([one for one in some if one.answer.ended], None, None, BETA, ppo)
    for name in ("advantages_BT", "returns_BT"):
        assert torch.equal(getattr(left, name), getattr(found, name)[found.ended_B])


def test_a_rollout_without_any_end_teaches_nothing_if_such_are_masked() -> None:
    cut = [replace(one, answer=replace(one.answer, ended=False)) for one in judged()]
    for whiten in (False, True):
        ppo = PpoConfig(mask_truncated=True, whiten_rewards=whiten)
        found = experience(cut, None, None, BETA, ppo)
        assert not found.learned_BT.any()
        assert torch.equal(found.advantages_BT, torch.zeros(5, 7))
        assert torch.equal(found.returns_BT, torch.zeros(5, 7))
        assert found.rewards_BT.isfinite().all()


def test_an_ensemble_gives_its_mean_and_how_far_apart_it_is() -> None:
    some = judged(members=3)
    members = [one.members_M.tolist() for one in some if one.members_M is not None]
    found = experience(some, None, None, BETA, PpoConfig())
    assert found.scores_B.tolist() == pytest.approx([sum(three) / 3 for three in members])
    assert found.disagreement_B is not None
    assert found.disagreement_B.tolist() == pytest.approx([float(np.std(three)) for three in members])
    means = [sum(three) / 3 for three in members]
    check(found.rewards_BT, by_hand(some, means, BETA, PpoConfig())["rewards"])
    assert experience(judged(members=1), None, None, BETA, PpoConfig()).disagreement_B is None


def test_a_function_scores_in_place_of_a_model() -> None:
    some, given = judged(members=0), [0.5, -1.0, 2.0, 0.0, 1.5]
    found = experience(some, given, None, BETA, PpoConfig())
    assert found.scores_B.tolist() == given and found.scores_B.dtype == torch.float32
    assert found.disagreement_B is None and found.watched_B is None
    check(found.rewards_BT, by_hand(some, given, BETA, PpoConfig())["rewards"])


def test_what_is_watched_is_kept_and_pays_nothing() -> None:
    some, watched = judged(), [1.0, 2.0, 3.0, 4.0, 5.5]
    plain = experience(some, None, None, BETA, PpoConfig())
    found = experience(some, None, watched, BETA, PpoConfig())
    assert found.watched_B is not None and found.watched_B.tolist() == watched
    for name in Experience.__dataclass_fields__:
        one, other = getattr(plain, name), getattr(found, name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), name


def test_nothing_of_it_has_a_gradient() -> None:
    some = [
        replace(one, logps_T=one.logps_T.clone().requires_grad_(), values_T=one.values_T)
        for one in judged()
    ]
    found = experience(some, None, None, BETA, PpoConfig())
    assert not found.rewards_BT.requires_grad and not found.advantages_BT.requires_grad


def grouped(algorithm: Algorithm, **more: Any) -> Experience:
    """Return the experience of four answers to two prompts, scored 1, 3, 0 and 0.5."""
    ppo = PpoConfig(algorithm=algorithm, answers_per_prompt=2, missing_eos_penalty=0.0, **more)
    return experience(judged(0)[:4], [1.0, 3.0, 0.0, 0.5], None, 0.1, ppo)


def whole_penalty(one: Judged) -> float:
    return 0.1 * float((one.logps_T - one.ref_logps_T).sum())


def test_rloo_takes_the_other_answers_reward_off_the_penalty_paid() -> None:
    # two answers: the other one's is the baseline (arXiv:2402.14740, eq. 6 with k = 2)
    found = grouped(Algorithm.rloo)
    paid = [
        score - whole_penalty(one)
        for score, one in zip([1.0, 3.0, 0.0, 0.5], judged(0)[:4], strict=True)
    ]
    wanted = [paid[0] - paid[1], paid[1] - paid[0], paid[2] - paid[3], paid[3] - paid[2]]
    for row, mask, value in zip(found.advantages_BT, found.mask_BT, wanted, strict=True):
        assert row[mask].tolist() == pytest.approx([value] * int(mask.sum()), abs=1e-5)
        assert not row[~mask].any()
    assert found.kl_weight == 0 and not found.returns_BT.any()


def test_grpo_compares_scores_alone_and_leaves_the_penalty_to_the_loss() -> None:
    # of two, mean and deviation put them at +-1 / sqrt 2
    found = grouped(Algorithm.grpo)
    first = math.sqrt(0.5)
    for row, mask, value in zip(
        found.advantages_BT, found.mask_BT, [-first, first, -first, first], strict=True
    ):
        assert row[mask].tolist() == pytest.approx([value] * int(mask.sum()), rel=1e-3)
    assert found.kl_weight == 0.1
    assert found.rewards_BT.sum().item() == pytest.approx(4.5)


def test_an_answer_that_teaches_nothing_is_still_compared_with() -> None:
    found = grouped(Algorithm.rloo, mask_truncated=True)
    cut = [not one.answer.ended for one in judged(0)[:4]]
    assert any(cut) and not all(cut)
    whole = grouped(Algorithm.rloo)
    for row, other, is_cut in zip(found.advantages_BT, whole.advantages_BT, cut, strict=True):
        assert torch.equal(row, torch.zeros_like(row) if is_cut else other)


def test_answers_that_are_only_measured_make_no_groups() -> None:
    # three held-out prompts, one answer to each
    ppo = PpoConfig(algorithm=Algorithm.rloo, answers_per_prompt=2)
    found = experience(judged(0)[:3], [1.0, 2.0, 3.0], None, 0.1, ppo, learned=False)
    assert not found.advantages_BT.any() and not found.returns_BT.any()
    assert found.scores_B.tolist() == [1.0, 2.0, 3.0]
