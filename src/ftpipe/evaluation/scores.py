"""A measured number with its interval, and the ways in which intervals are found.

Shapes: N observations, G clusters of them that depend on each other, such as the turns of one
conversation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from ftpipe.reward import measures

Floats = NDArray[np.float64]

CONFIDENCE = 0.95  # of every interval


class Interval(StrEnum):
    """How the ends of an interval were found."""

    none = "none"  # there are too few observations for one
    wilson = "Wilson"  # a share of independent observations
    wilson_clustered = "Wilson, clustered"  # with the effective number of observations
    t_clustered = "t, clustered"  # a ratio of sums over clusters, with Student's t
    t_paired = "t, paired"  # the difference of two ratios over the same clusters
    unpaired = "unpaired"  # of a difference, from the intervals of both sides
    normal = "normal"  # from a standard error that another program states
    stratified = "stratified"  # a mean over strata with samples of their own


@dataclass(frozen=True)
class Score:
    """One number that was measured.

    Attributes:
        name: what was measured, such as ``mmlu`` or ``perplexity/alpaca``.
        low, high: ends of the interval at ``CONFIDENCE``; None where nothing is known of them.
        n: independent observations: questions, rows or conversations, not their tokens.
        unit: of the value and its ends: ``share``, ``nats``, ``tokens``, ...
        higher_is_better: None of what is neither, such as a length.
        interval: how its ends were found.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    higher_is_better: bool | None
    interval: Interval = Interval.none

    def shown(self, digits: int = 4) -> str:
        """Return the value and its interval as a person reads them."""
        value = f"{self.value:.{digits}f}"
        if self.low is not None and self.high is not None:
            value += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{value} (n = {self.n:,})"


def share(
    name: str, right_N: NDArray[Any], cluster_N: NDArray[Any] | None = None, better: bool | None = True
) -> Score:
    """Return the share of observations that are right, with Wilson's interval.

    Args:
        right_N: 1 where it is right, 0.5 for half, 0 else. At least one observation.
        cluster_N: which cluster each belongs to; None: each is one of its own. The interval is then
            ``reward.measures.accuracy``'s, whose docstring has the sources.
    """
    own = np.arange(len(right_N)) if cluster_N is None else cluster_N
    found = measures.accuracy(np.asarray(right_N, np.float64), own, CONFIDENCE)
    assert found["value"] is not None
    plain = found["freedom"] is None
    kind = Interval.wilson if plain else Interval.wilson_clustered
    return Score(
        name,
        found["value"],
        found["low"],
        found["high"],
        found["prompts"],
        "share",
        better,
        Interval.none if found["low"] is None else kind,
    )


def ratio(
    name: str,
    total_N: NDArray[Any],
    weight_N: NDArray[Any],
    cluster_N: NDArray[Any] | None = None,
    unit: str = "nats",
    better: bool | None = False,
) -> Score:
    """Return sum(total) / sum(weight), such as nats per token, with an interval clustered by row.

    The ratio estimate r of clusters drawn at random, with x_g and w_g the sums of one cluster, has the
    variance (Cochran 1977, Sampling Techniques, eq. 6.4 and 6.13, linearised)

        v = G / (G - 1) sum_g (x_g - r w_g)^2 / (sum_g w_g)^2,

    and the interval is r -+ t sqrt(v) with Student's t at G - 1 degrees of freedom. With weights of 1
    and one observation a cluster it is the usual interval of a mean.

    Args:
        total_N, weight_N: of each observation; the weights are positive. At least one observation.
        cluster_N: which cluster each belongs to; None: each is one of its own.
    """
    own = np.arange(len(total_N)) if cluster_N is None else cluster_N
    _, place_N = np.unique(own, return_inverse=True)
    total_G = np.bincount(place_N, weights=total_N)
    weight_G = np.bincount(place_N, weights=weight_N)
    value = float(total_G.sum() / weight_G.sum())
    off_G = (total_G - value * weight_G) / weight_G.sum()
    return _around(name, value, off_G, unit, better, Interval.t_clustered)


def paired(name: str, before: tuple[Floats, Floats], after: tuple[Floats, Floats], of: Score) -> Score:
    """Return the difference of two ratios measured on the same clusters, with a paired interval.

    Linearised as in ``ratio``, the difference of the two of a cluster is what varies: what makes a row
    hard for both drops out (Miller 2024, arXiv:2411.00640, section 4.2).

    Args:
        before, after: total_G and weight_G of either, clusters in the same order.
        of: the score whose difference it is; gives unit and direction.
    """
    off = []
    values = []
    for total_G, weight_G in (before, after):
        whole = weight_G.sum()
        values.append(float(total_G.sum() / whole))
        off.append((total_G - values[-1] * weight_G) / whole)
    value, off_G = values[1] - values[0], off[1] - off[0]
    return _around(name, value, off_G, of.unit, of.higher_is_better, Interval.t_paired)


def apart(name: str, before: Score, after: Score) -> Score:
    """Return the difference of two scores of which no more is known than their intervals.

    With d = after - before the ends are d - sqrt((after - low_after)^2 + (high_before - before)^2) and
    d + sqrt((high_after - after)^2 + (before - low_before)^2) (Newcombe 1998,
    doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, method 10). That is for
    independent samples; of the same questions, which are hard for both, it is too wide.
    """
    found = replace(after, name=name, value=after.value - before.value, n=min(before.n, after.n))
    ends = (before.low, before.high, after.low, after.high)
    if any(end is None or not math.isfinite(end) for end in (*ends, before.value, after.value)):
        return replace(found, low=None, high=None, interval=Interval.none)
    low_before, high_before, low_after, high_after = map(float, ends)  # type: ignore[arg-type]
    return replace(
        found,
        low=found.value - math.hypot(after.value - low_after, high_before - before.value),
        high=found.value + math.hypot(high_after - after.value, before.value - low_before),
        interval=Interval.unpaired,
    )


def _around(
    name: str, value: float, off_G: Floats, unit: str, better: bool | None, kind: Interval
) -> Score:
    clusters = len(off_G)
    if clusters < 2:
        return Score(name, value, None, None, clusters, unit, better)
    error = math.sqrt(clusters / (clusters - 1) * float(off_G @ off_G))
    half = error * float(stdtrit(clusters - 1, (1 + CONFIDENCE) / 2))
    return Score(name, value, value - half, value + half, clusters, unit, better, kind)


def exponential(score: Score, name: str, unit: str) -> Score:
    """Return e to the power of a score and of its ends, such as the perplexity of a loss."""
    low, high = (None if end is None else _exp(end) for end in (score.low, score.high))
    return replace(score, name=name, value=_exp(score.value), low=low, high=high, unit=unit)


def _exp(nats: float) -> float:
    """Return e^nats, or infinity where it is beyond floating point."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def from_error(
    name: str,
    value: float,
    error: float | None,
    n: int,
    unit: str,
    better: bool,
    kind: Interval = Interval.normal,
) -> Score:
    """Return a score with the normal interval of its standard error; of a share within 0 and 1."""
    if error is None or not math.isfinite(error):
        return Score(name, value, None, None, n, unit, better)
    half = float(ndtri((1 + CONFIDENCE) / 2)) * error
    low, high = value - half, value + half
    if unit == "share":
        low, high = max(0.0, low), min(1.0, high)
    return Score(name, value, low, high, n, unit, better, kind)
