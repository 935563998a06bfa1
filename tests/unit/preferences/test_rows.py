"""What a trainer of preferences puts on record of its rows: which of them is wanted, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftpipe.choices import PreferenceLoss
from ftpipe.preferences.batches import Reply, collate
from ftpipe.preferences.trainer import PreferenceTrainer
from ftpipe.reward.batches import Ranked
from ftpipe.reward.batches import collate as collate_groups
from ftpipe.reward.trainer import RewardTrainer

A, B, C, D = (Reply([1, 2, *last], 2, 2 + len(last)) for last in ([3], [4, 5], [6], [7, 8, 9]))


def rows(loss: PreferenceLoss, batch: dict[str, Any]) -> list[str]:
    stand_in: Any = SimpleNamespace(dpo=SimpleNamespace(loss=loss))
    return PreferenceTrainer.rows(stand_in, batch)


def test_a_pair_is_another_one_the_other_way_round() -> None:
    sigmoid = PreferenceLoss.sigmoid
    both = rows(sigmoid, collate([A, C, B, D], 0))  # A over B, C over D
    assert len(both) == 2
    assert [*rows(sigmoid, collate([A, B], 0)), *rows(sigmoid, collate([C, D], 0))] == both
    assert rows(sigmoid, collate([B, A], 0)) != both[:1]


def single(reply: Reply, other: Reply, wanted: bool) -> dict[str, Any]:
    mismatched = {f"mismatched_{name}": value for name, value in collate([other], 0).items()}
    return collate([reply], 0) | mismatched | {"wanted": torch.tensor([wanted])}


def test_a_reply_is_another_one_where_it_is_not_wanted() -> None:
    found = [
        rows(PreferenceLoss.kto, single(*one))[0]
        for one in ((A, B, True), (A, B, False), (A, C, True), (C, B, True))
    ]
    assert len(set(found)) == 4


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_ranked_replies_are_others_in_another_order_or_with_another_margin(margin: float) -> None:
    stand_in: Any = SimpleNamespace()

    def of(*groups: Ranked) -> list[str]:
        return RewardTrainer.rows(stand_in, collate_groups(groups, 0, margin))

    one = Ranked([[1, 2], [1, 3], [1, 4]], [(0, 1), (0, 2)], [3.0, 2.0, 1.0])
    two = Ranked([[5, 6], [5, 7]], [(0, 1)], [1.0, 0.0])
    assert len(of(one, two)) == 3
    assert sorted(of(one, two)) == sorted([*of(two), *of(one)])
    assert of(Ranked([[5, 7], [5, 6]], [(0, 1)], [1.0, 0.0])) != of(two)
    other = Ranked([[5, 6], [5, 7]], [(0, 1)], [2.0, 0.0])
    assert (of(other) != of(two)) is bool(margin)
