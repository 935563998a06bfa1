"""Intervals against scipy, published figures and simulated coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ftpipe.evaluation import scores
from ftpipe.evaluation.scores import Interval, Score


@pytest.mark.parametrize(("right", "n"), [(0, 7), (1, 7), (35, 50), (50, 50), (702, 1531)])
def test_a_share_has_wilsons_interval(right: int, n: int) -> None:
    found = scores.share("x", np.array([1.0] * right + [0.0] * (n - right)))
    ends = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-12)
    assert found.interval is Interval.wilson


def test_observations_of_one_cluster_are_not_independent() -> None:
    # every question answered the same way in both turns: as many facts as questions, not as turns
    right_G = np.array([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 1])
    doubled = scores.share("x", right_G.repeat(2), np.arange(10).repeat(2))
    plain = scores.share("x", right_G.repeat(2))
    assert doubled.n == 10 and doubled.interval is Interval.wilson_clustered
    assert doubled.low is not None and plain.low is not None and doubled.low < plain.low - 0.05


def test_a_mean_has_students_interval() -> None:
    values_N = np.random.default_rng(0).normal(3, 2, 23)
    found = scores.ratio("x", values_N, np.ones(23))
    low, high = stats.t.interval(0.95, 22, values_N.mean(), stats.sem(values_N))
    assert (found.value, found.low, found.high) == pytest.approx((values_N.mean(), low, high))
    assert (found.n, found.interval) == (23, Interval.t_clustered)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    # 6 nats for 3 tokens and 1 for 1: 7 nats for 4 tokens
    assert scores.ratio("x", np.array([6.0, 1.0]), np.array([3.0, 1.0])).value == 1.75


def test_the_means_of_clusters_of_one_size_are_what_varies() -> None:
    values_GK = np.random.default_rng(1).normal(0, 1, (12, 4))
    found = scores.ratio("x", values_GK.ravel(), np.ones(48), np.arange(12).repeat(4))
    means_G = values_GK.mean(1)
    low, high = stats.t.interval(0.95, 11, means_G.mean(), stats.sem(means_G))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.n == 12


def test_a_ratio_of_sums_covers_the_truth_as_often_as_it_says() -> None:
    # Rows of very different length whose tokens are alike within a row: the truth is 2 nats a token.
    # Of 600 samples, 95 % +- 2.7 % (three standard errors) hold it; as independent tokens far fewer do.
    draws = np.random.default_rng(2)
    covered = naive = 0
    for _ in range(600):
        tokens_G = draws.integers(5, 60, 40)
        of_row_G = draws.normal(2, 0.5, 40)
        nats_N = np.repeat(of_row_G, tokens_G) + draws.normal(0, 1, tokens_G.sum())
        cluster_N = np.arange(40).repeat(tokens_G)
        found = scores.ratio("x", nats_N, np.ones(len(nats_N)), cluster_N)
        alone = scores.ratio("x", nats_N, np.ones(len(nats_N)))
        assert found.low is not None and found.high is not None
        assert alone.low is not None and alone.high is not None
        covered += found.low <= 2 <= found.high
        naive += alone.low <= 2 <= alone.high
    assert covered / 600 == pytest.approx(0.95, abs=0.027)
    assert naive / 600 < 0.6


def test_a_paired_difference_is_students_for_equal_weights() -> None:
    draws = np.random.default_rng(3)
    hard_G = draws.normal(5, 3, 30)
    before_G, after_G = hard_G + draws.normal(0, 0.1, 30), hard_G - 0.2 + draws.normal(0, 0.1, 30)
    ones_G = np.ones(30)
    of = Score("loss", 0.0, None, None, 30, "nats", False)
    found = scores.paired("loss", (before_G, ones_G), (after_G, ones_G), of)
    ends = stats.ttest_rel(after_G, before_G).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.value == pytest.approx(after_G.mean() - before_G.mean())
    assert (found.unit, found.higher_is_better, found.interval) == ("nats", False, Interval.t_paired)
    # unpaired, the difference would be lost in how hard the rows are
    assert found.high is not None and found.high < 0
    ends = stats.ttest_ind(after_G, before_G).confidence_interval(0.95)
    assert ends.high > 0


def test_a_paired_difference_of_weighted_sums_is_that_of_the_ratios() -> None:
    # the jackknife, which drops one cluster at a time, shares no formula with the linearisation
    draws = np.random.default_rng(4)
    weight_G = draws.integers(1, 30, 200).astype(float)
    first_G, second_G = weight_G * draws.normal(2, 0.3, 200), weight_G * draws.normal(1.8, 0.3, 200)
    of = Score("loss", 0.0, None, None, 200, "nats", False)
    found = scores.paired("loss", (first_G, weight_G), (second_G, weight_G), of)

    def value(kept_G: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
        return float((second_G[kept_G].sum() - first_G[kept_G].sum()) / weight_G[kept_G].sum())

    everything = np.ones(200, bool)
    dropped = []
    for at in range(200):
        everything[at] = False
        dropped.append(value(everything))
        everything[at] = True
    error = math.sqrt(199 / 200 * float(((np.array(dropped) - np.mean(dropped)) ** 2).sum()))
    assert found.value == pytest.approx(value(everything))
    assert found.high is not None
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 199) * error, rel=0.02)


def test_nothing_is_known_from_one_cluster() -> None:
    found = scores.ratio("x", np.array([1.0, 2.0]), np.ones(2), np.zeros(2))
    assert (found.value, found.low, found.high, found.n) == (1.5, None, None, 1)
    assert found.interval is Interval.none
    one = np.ones(1)
    assert scores.paired("x", (one, one), (one, one), found).low is None


def test_perplexity_is_e_to_the_loss() -> None:
    loss = Score("loss", 2.0, 1.5, 2.5, 9, "nats", False, Interval.t_clustered)
    found = scores.exponential(loss, "perplexity", "tokens")
    ends = (found.value, found.low, found.high)
    assert ends == pytest.approx((math.e**2, math.e**1.5, math.e**2.5))
    assert (found.name, found.unit, found.n) == ("perplexity", "tokens", 9)
    assert (
        scores.exponential(Score("loss", 1e4, None, None, 1, "nats", False), "p", "t").value == math.inf
    )


def test_a_difference_of_two_scores_is_newcombes() -> None:
    # Newcombe 1998, table II, (a): 56 of 70 and 48 of 80, method 10: 0.0524 to 0.3339
    one = scores.share("x", np.array([1.0] * 56 + [0.0] * 14))
    other = scores.share("x", np.array([1.0] * 48 + [0.0] * 32))
    found = scores.apart("x", other, one)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert (found.n, found.interval) == (70, Interval.unpaired)
    nothing = scores.apart("x", Score("x", 0.5, None, None, 1, "share", True), one)
    assert (nothing.low, nothing.high, nothing.interval) == (None, None, Interval.none)


def test_a_stated_error_gives_the_normal_interval() -> None:
    found = scores.from_error("x", 0.5, 0.1, 100, "share", True)
    low, high = stats.norm.interval(0.95, 0.5, 0.1)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.interval is Interval.normal
    for error in (None, math.nan):
        assert scores.from_error("x", 0.5, error, 1, "share", True).low is None


def test_a_score_is_shown_with_its_interval() -> None:
    found = Score("x", 0.5, 0.25, 0.75, 1234, "share", True)
    assert found.shown(2) == "0.50 [0.25, 0.75] (n = 1,234)"
    assert Score("x", 0.5, None, None, 1, "share", True).shown() == "0.5000 (n = 1)"
