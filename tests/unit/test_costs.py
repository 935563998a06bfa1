"""Costs of going wider, against the figures of the paper that they are from and by identities."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import costs
from ftpipe.choices import Strategy

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_a_trained_weight_takes_16_bytes_as_in_the_paper() -> None:
    # arXiv:1910.02054, section 3.1: 1.5 billion weights need at least 24 GB
    assert costs.states(Strategy.ddp, 1.5e9, 0, 1).total == 24e9


def test_what_is_shared_out_by_64_ranks_is_as_in_the_paper() -> None:
    # arXiv:1910.02054, figure 1 (7.5B weights, 64 ranks): 120 GB, and all shared out 1.9 GB
    assert costs.states(Strategy.ddp, 7.5e9, 0, 64).total == pytest.approx(120e9)
    assert costs.states(Strategy.fsdp, 7.5e9, 0, 64).total == pytest.approx(1.9e9, rel=0.02)


@pytest.mark.parametrize("strategy", Strategy)
def test_frozen_weights_have_no_gradient_and_no_moments(strategy: Strategy) -> None:
    found = costs.states(strategy, 0, 100, 4)
    shared = strategy in (Strategy.zero3, Strategy.fsdp)
    assert (found.weights, found.gradients, found.optimizer) == (50 if shared else 200, 0, 0)


def test_each_stage_of_zero_needs_less_than_the_one_before() -> None:
    order = (Strategy.zero1, Strategy.zero2, Strategy.zero3, Strategy.fsdp)
    totals = [costs.states(strategy, 1e9, 0, 8).total for strategy in order]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_zero_sends_what_ddp_does_and_zero3_half_as_much_again() -> None:
    # arXiv:1910.02054, section 7: 2 Psi, 2 Psi, 3 Psi, counted in what each message is of
    sent = {s: costs.sent(s, 1e9, 0, 10**9, gathered=4) for s in Strategy}
    assert sent[Strategy.ddp] == sent[Strategy.zero1] == sent[Strategy.zero2] == pytest.approx(2 * 4e9)
    assert sent[Strategy.zero3] == sent[Strategy.fsdp] == pytest.approx(3 * 4e9)


def test_one_rank_sends_nothing_and_two_send_half_of_what_many_do() -> None:
    for strategy in Strategy:
        assert costs.sent(strategy, 1e9, 1e9, 1) == 0
        many = costs.sent(strategy, 1e9, 1e9, 10**9)
        assert costs.sent(strategy, 1e9, 1e9, 2) == pytest.approx(many / 2)


def test_accumulation_costs_those_that_send_each_micro_batch() -> None:
    once = {s: costs.sent(s, 1e9, 1e9, 8) for s in Strategy}
    four = {s: costs.sent(s, 1e9, 1e9, 8, accumulated=4) for s in Strategy}
    assert four[Strategy.ddp] == once[Strategy.ddp] and four[Strategy.zero1] == once[Strategy.zero1]
    assert four[Strategy.zero2] == pytest.approx(once[Strategy.zero2] * 2.5)  # 4 of 5, where 1 + 1 were
    assert four[Strategy.zero3] == 4 * once[Strategy.zero3]
    assert four[Strategy.fsdp] == 4 * once[Strategy.fsdp]


def test_weights_that_stay_gathered_are_sent_once_for_both_passes() -> None:
    kept = costs.sent(Strategy.fsdp, 1e9, 0, 8, reshard=False)
    assert costs.sent(Strategy.fsdp, 1e9, 0, 8) - kept == pytest.approx(2e9 * 7 / 8)


def test_an_adapter_sends_its_own_gradients_alone_where_the_base_is_whole() -> None:
    for strategy in (Strategy.ddp, Strategy.zero1, Strategy.zero2):
        assert costs.sent(strategy, 1e6, 1e9, 8) == costs.sent(strategy, 1e6, 0, 8)


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("share", [1.0, 0.01])
def test_the_largest_model_fills_the_memory(strategy: Strategy, share: float) -> None:
    most = costs.largest(strategy, 8, 56e9, share)
    assert costs.states(strategy, share * most, (1 - share) * most, 8).total == pytest.approx(56e9)


def test_the_tables_of_the_docs_are_these() -> None:
    assert "\n".join(costs.tables()).strip() in DOCS.read_text(encoding="utf-8")
