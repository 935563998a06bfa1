"""Advantages, returns and whitening against the definitions written as loops, identities and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ftpipe.ppo.advantages import (
    gae,
    group_relative,
    leave_one_out,
    moments,
    returns,
    whiten,
    whiten_around_mean,
)

LENGTHS = (5, 1, 0, 7, 3)


def masked(lengths: tuple[int, ...], width: int | None = None) -> Tensor:
    return torch.arange(max(lengths) if width is None else width) < torch.tensor(lengths)[:, None]


def drawn(seed: int, shape: tuple[int, ...] = (5, 7)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def double_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Return the sum over l of (gamma lam)^l delta_{t+l}, as the paper's eq. 16 has it."""
    steps = len(rewards)
    padded = [*values, 0.0]
    found = []
    for t in range(steps):
        terms = []
        for k in range(t, steps):
            delta = rewards[k] + gamma * padded[k + 1] - padded[k]
            terms.append(gamma ** (k - t) * lam ** (k - t) * delta)
        found.append(math.fsum(terms))
    return found


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_is_the_double_sum_of_its_definition(gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = drawn(0), drawn(1), masked(LENGTHS)
    got_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    for b, length in enumerate(LENGTHS):
        rewards, values = rewards_BT[b, :length].tolist(), values_BT[b, :length].tolist()
        assert got_BT[b, :length].tolist() == pytest.approx(double_loop(rewards, values, gamma, lam))
        assert got_BT[b, length:].tolist() == [0.0] * (7 - length)


def test_gae_with_lam_one_is_return_minus_value() -> None:
    # telescoping: every value but the first cancels
    rewards_BT, values_BT, gamma = drawn(2), drawn(3), 0.97
    got_BT = gae(rewards_BT, values_BT, masked(LENGTHS), gamma, 1.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            to_go = sum(gamma ** (k - t) * rewards_BT[b, k].item() for k in range(t, length))
            assert got_BT[b, t].item() == pytest.approx(to_go - values_BT[b, t].item())


def test_gae_with_lam_zero_is_the_error_of_one_step() -> None:
    rewards_BT, values_BT = drawn(4, (1, 3)), drawn(5, (1, 3))
    (r0, r1, r2), (v0, v1, v2) = rewards_BT[0].tolist(), values_BT[0].tolist()
    got_BT = gae(rewards_BT, values_BT, masked((3,)), 0.9, 0.0)
    assert got_BT[0].tolist() == pytest.approx([r0 + 0.9 * v1 - v0, r1 + 0.9 * v2 - v1, r2 - v2])


def test_gae_with_gamma_zero_looks_one_reward_ahead() -> None:
    rewards_BT, values_BT = drawn(6, (1, 4)), drawn(7, (1, 4))
    got_BT = gae(rewards_BT, values_BT, masked((4,)), 0.0, 0.8)
    assert torch.equal(got_BT, rewards_BT - values_BT)


def test_right_values_leave_no_advantage() -> None:
    # a reward of 1 at the end, values that say so: gamma^(steps to it)
    rewards_BT = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values_BT = torch.tensor([[0.81, 0.9, 1.0]], dtype=torch.float64)
    got_BT = gae(rewards_BT, values_BT, masked((3,)), 0.9, 0.7)
    assert got_BT[0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)


@pytest.mark.parametrize("junk", [0.0, 1e6, math.nan, math.inf])
def test_nothing_outside_the_mask_is_read(junk: float) -> None:
    rewards_BT, values_BT, mask_BT = drawn(8), drawn(9), masked(LENGTHS)
    want_BT = gae(rewards_BT, values_BT, mask_BT, 0.9, 0.8)
    tail_B3 = torch.full((5, 3), junk, dtype=torch.float64)
    wide_rewards = torch.cat([rewards_BT.masked_fill(~mask_BT, junk), tail_B3], 1)
    wide_values = torch.cat([values_BT.masked_fill(~mask_BT, junk), tail_B3], 1)
    wide_mask = masked(LENGTHS, 10)
    got_BT = gae(wide_rewards, wide_values, wide_mask, 0.9, 0.8)
    assert torch.equal(got_BT[:, :7], want_BT)
    assert torch.equal(got_BT[:, 7:], torch.zeros(5, 3, dtype=torch.float64))
    assert torch.equal(
        returns(got_BT, wide_values, wide_mask)[:, :7], returns(want_BT, values_BT, mask_BT)
    )
    found_3 = moments(wide_values, wide_mask)
    torch.testing.assert_close(found_3, moments(values_BT, mask_BT))  # sums in another order
    for make in (whiten, whiten_around_mean):
        white_BT = make(wide_values, wide_mask, found_3)
        assert torch.equal(white_BT[:, :7], make(values_BT, mask_BT, found_3))
        assert not white_BT[~wide_mask].any()


def test_shapes_that_differ_are_refused() -> None:
    good, mask_BT = drawn(0), masked(LENGTHS)
    for args in ((good[:, 1:], good, mask_BT), (good, good[:1], mask_BT), (good, good, mask_BT[:, 1:])):
        with pytest.raises(ValueError, match="differ in shape"):
            gae(*args, 1.0, 0.95)


def test_a_batch_without_positions_has_no_advantages() -> None:
    empty = torch.zeros(3, 0)
    assert gae(empty, empty, empty.bool(), 1.0, 0.95).shape == (3, 0)


def test_the_wider_of_two_types_is_kept() -> None:
    rewards_BT, values_BT = torch.tensor([[0.0, 1 + 2**-20]]), torch.zeros(1, 2, dtype=torch.bfloat16)
    got_BT = gae(rewards_BT, values_BT, masked((2,)), 1.0, 1.0)
    assert got_BT.tolist() == [[1 + 2**-20, 1 + 2**-20]]


def test_the_returns_of_lam_one_are_the_discounted_rewards_to_go() -> None:
    rewards_BT, values_BT, mask_BT, gamma = drawn(10), drawn(11), masked(LENGTHS), 0.9
    got_BT = returns(gae(rewards_BT, values_BT, mask_BT, gamma, 1.0), values_BT, mask_BT)
    for b, length in enumerate(LENGTHS):
        rewards = rewards_BT[b, :length].tolist()
        want = [sum(gamma**k * reward for k, reward in enumerate(rewards[t:])) for t in range(7)]
        assert got_BT[b].tolist() == pytest.approx(want)


def test_moments_are_the_count_the_sum_and_the_sum_of_squares() -> None:
    values_BT = torch.tensor([[1.0, 2.0, 9.0], [-4.0, 9.0, 9.0]])
    found_3 = moments(values_BT, masked((2, 1), 3))
    assert found_3.tolist() == [3.0, -1.0, 21.0]
    assert found_3.dtype == torch.float64


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_whitened_values_have_mean_0_and_variance_1(offset: float) -> None:
    # float32 far from 0: sums of float32 would lose the variance
    values_BT, mask_BT = (drawn(12) * 2.5 + offset).float(), masked(LENGTHS)
    white_BT = whiten(values_BT, mask_BT, moments(values_BT, mask_BT))
    around_BT = whiten_around_mean(values_BT, mask_BT, moments(values_BT, mask_BT))
    assert white_BT.dtype == around_BT.dtype == torch.float32
    values = values_BT[mask_BT].double().numpy()
    want = (values - values.mean()) / values.std()
    np.testing.assert_allclose(white_BT[mask_BT].numpy(), want, rtol=1e-5)
    np.testing.assert_allclose(around_BT[mask_BT].numpy() - values.mean(), want, rtol=1e-4, atol=5e-4)


def test_parts_of_a_batch_are_whitened_as_the_whole() -> None:
    values_BT, mask_BT = drawn(13) + 4, masked(LENGTHS)
    whole = moments(values_BT, mask_BT)
    parts = [moments(values_BT[rows], mask_BT[rows]) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    for make in (whiten, whiten_around_mean):
        joined = torch.cat(
            [make(values_BT[r], mask_BT[r], parts[0] + parts[1]) for r in (slice(0, 2), slice(2, 5))]
        )
        torch.testing.assert_close(joined, make(values_BT, mask_BT, whole))


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6, 12345.678])
def test_a_constant_whitens_to_zeros(constant: float) -> None:
    values_BT, mask_BT = torch.full((5, 7), constant), masked(LENGTHS)
    found_3 = moments(values_BT, mask_BT)
    assert torch.equal(whiten(values_BT, mask_BT, found_3), torch.zeros(5, 7))
    kept_BT = whiten_around_mean(values_BT, mask_BT, found_3)
    assert torch.equal(kept_BT, torch.where(mask_BT, values_BT, 0.0))


def test_no_counted_token_whitens_to_zeros() -> None:
    values_BT, mask_BT = drawn(14), torch.zeros(5, 7, dtype=torch.bool)
    for make in (whiten, whiten_around_mean):
        assert not make(values_BT, mask_BT, moments(values_BT, mask_BT)).any()


def test_a_variance_below_zero_by_rounding_is_none() -> None:
    # sums of squares of equal values: 3 * 0.1^2 is less than (3 * 0.1)^2 / 3 by one rounding, or more
    found_3 = torch.tensor([3.0, 3e4, 3e8 - 1.0], dtype=torch.float64)
    values_BT = torch.full((1, 3), 1e4)
    assert whiten(values_BT, masked((3,)), found_3).tolist() == [[0.0, 0.0, 0.0]]


def test_a_tiny_spread_is_damped_as_openai_does() -> None:
    # lm-human-preferences: rsqrt(var + 1e-8); here the variance is 1e-8 as well
    values_BT = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)
    white_BT = whiten(values_BT, masked((2,)), moments(values_BT, masked((2,))))
    assert white_BT[0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


@pytest.mark.parametrize("group", [2, 3, 6])
def test_leave_one_out_is_the_loop_over_the_others(group: int) -> None:
    rewards_B = drawn(21, (6,))
    found = leave_one_out(rewards_B, group).tolist()
    for at, reward in enumerate(rewards_B.tolist()):
        first = at - at % group
        others = [rewards_B[k].item() for k in range(first, first + group) if k != at]
        assert found[at] == pytest.approx(reward - sum(others) / len(others), abs=1e-12)


def test_leave_one_out_does_not_read_the_answer_it_is_a_baseline_of() -> None:
    # raise one reward by 1: its own advantage rises by 1, so its baseline stays
    rewards_B = drawn(22, (4,))
    raised_B = rewards_B.clone()
    raised_B[2] += 1
    apart_B = leave_one_out(raised_B, 4) - leave_one_out(rewards_B, 4)
    assert apart_B.tolist() == pytest.approx([-1 / 3, -1 / 3, 1, -1 / 3])


@pytest.mark.parametrize("group", [2, 3, 6])
def test_group_relative_is_numpys(group: int) -> None:
    scores_B = drawn(23, (6,)) * 3 + 5
    rows = scores_B.numpy().reshape(-1, group)
    spread = rows.std(1, ddof=1, keepdims=True)
    wanted = (rows - rows.mean(1, keepdims=True)) / (spread + 1e-4)
    assert group_relative(scores_B, group).tolist() == pytest.approx(wanted.ravel().tolist())


@pytest.mark.parametrize("score", [0.1, 1e6, -3.3])
def test_a_group_of_equal_scores_learns_nothing(score: float) -> None:
    scores_B = torch.tensor([score] * 3 + [score, score, score + 1])
    for make in (group_relative, leave_one_out):
        assert make(scores_B, 3)[:3].abs().max() < 1e-3


@pytest.mark.parametrize("group", [0, 1, 4])
def test_groups_that_do_not_fit_are_refused(group: int) -> None:
    for make in (group_relative, leave_one_out):
        with pytest.raises(ValueError, match=f"6 answers do not make groups of {group}"):
            make(drawn(24, (6,)), group)
