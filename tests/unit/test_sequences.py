"""What a trainer is fed, against tensors written by hand: rows, labels, positions, masks, order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftpipe.data.packing import packs_of, plan
from ftpipe.sequences import STRETCH, Collate, Layout, Order, Row, collate, dealt, sequences, upcoming
from tests.unit.data.test_packing import write

repeatable = settings(max_examples=100, deadline=None, derandomize=True)

PAD = 0
ONE: Row = ([5, 6, 7], [5, 6, 7])
TWO: Row = ([8, 9], [-100, 9])
THREE: Row = ([3, PAD, 4, PAD], [-100, PAD, 4, PAD])  # it learns the token that also pads


def tensor(*rows: Sequence[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("layout", [Layout.positions, Layout.blocks])
def test_packed_rows_lie_side_by_side(layout: Layout) -> None:
    batch = collate([[ONE, TWO], [THREE]], PAD, layout)
    assert torch.equal(batch["input_ids"], tensor([5, 6, 7, 8, 9], [3, 0, 4, 0, 0]))
    assert torch.equal(batch["labels"], tensor([-100, 6, 7, -100, 9], [-100, 0, 4, 0, -100]))
    assert torch.equal(batch["position_ids"], tensor([0, 1, 2, 0, 1], [0, 1, 2, 3, 0]))
    assert batch["tokens"] == 9
    assert ("attention_mask" in batch) is (layout is Layout.blocks)


def test_unpacked_rows_have_a_sequence_each() -> None:
    batch = collate([[ONE], [THREE], []], PAD, Layout.padded)
    ids = tensor([5, 6, 7, 0], [3, 0, 4, 0], [0, 0, 0, 0])
    assert torch.equal(batch["input_ids"], ids)
    learned = tensor([-100, 6, 7, -100], [-100, 0, 4, 0], [-100] * 4)
    assert torch.equal(batch["labels"], learned)
    # the last token of the second row has the id of padding, and is none
    mask = tensor([1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    assert torch.equal(batch["attention_mask"], mask)
    assert batch["tokens"] == 7


def test_unpacked_rows_are_laid_out_as_trl_does() -> None:
    rows = [ONE, TWO, THREE]
    theirs = DataCollatorForLanguageModeling(pad_token_id=PAD)(
        [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    )
    ours = collate([[row] for row in rows], PAD, Layout.padded)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["labels"][:, 1:], theirs["labels"][:, 1:])


def test_flash_attention_is_given_the_boundaries_that_trl_gives() -> None:
    rows = [ONE, TWO, THREE]
    theirs = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(
        [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    )
    ours = collate([[ONE, TWO], [], [THREE]], PAD, Layout.flat)
    assert torch.equal(ours.pop("tokens"), torch.tensor(9))
    del theirs["seq_idx"]  # for short convolutions
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
    assert ours["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize("layout", Layout)
def test_a_batch_of_empty_sequences_has_something_to_compute_and_nothing_to_learn(
    layout: Layout,
) -> None:
    batch = collate([[], []], 7, layout)
    assert batch["input_ids"].unique().tolist() == [7]
    assert batch["labels"][:, 1:].numel() > 0
    assert batch["labels"].unique().tolist() == [-100]
    assert batch["tokens"] == 0


def test_two_rows_in_a_sequence_need_a_layout_for_it() -> None:
    with pytest.raises(AssertionError, match="need another layout"):
        collate([[ONE, TWO]], PAD, Layout.padded)


packs_of_rows = st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=3)


def made(lengths: Sequence[Sequence[int]]) -> list[list[Row]]:
    """Return rows of these lengths, every token another one."""
    number = itertools.count(1)
    packs: list[list[Row]] = []
    for pack in lengths:
        ids = [[next(number) for _ in range(length)] for length in pack]
        packs.append([(row, row) for row in ids])
    return packs


@given(packs_of_rows)
@repeatable
def test_the_block_mask_shows_a_token_its_own_row_up_to_itself(lengths: list[list[int]]) -> None:
    packs = made(lengths)
    batch = collate(packs, PAD, Layout.blocks, torch.bfloat16)
    mask, ids = batch["attention_mask"], batch["input_ids"]
    assert mask.dtype == torch.bfloat16 and mask.shape == (len(packs), 1, ids.shape[1], ids.shape[1])
    for b, pack in enumerate(packs):
        owner = [at for at, (row, _) in enumerate(pack) for _ in row]
        owner += [-1] * (ids.shape[1] - len(owner))
        for query, key in itertools.product(range(ids.shape[1]), repeat=2):
            seen = owner[query] == owner[key] and key <= query
            assert mask[b, 0, query, key] == (0 if seen else torch.finfo(torch.bfloat16).min)


@given(packs_of_rows)
@repeatable
def test_positions_tell_transformers_where_rows_begin(lengths: list[list[int]]) -> None:
    packs = made(lengths)
    batch = collate(packs, PAD, Layout.positions)
    positions, ids = batch["position_ids"], batch["input_ids"]
    found = find_packed_sequence_indices(positions)
    for b, pack in enumerate(packs):
        at = 0
        groups = []
        for row, _ in pack:
            assert ids[b, at : at + len(row)].tolist() == list(row)
            assert positions[b, at : at + len(row)].tolist() == list(range(len(row)))
            if found is not None:
                groups.append(set(found[b, at : at + len(row)].tolist()))
            at += len(row)
        if found is not None and at < ids.shape[1]:
            groups.append(set(found[b, at:].tolist()))
        assert all(len(group) == 1 for group in groups)  # one row, one number
        assert len(set.union(set(), *groups)) == len(groups)  # and another for each
        if found is None:
            assert len(pack) + (at < ids.shape[1]) == 1


def test_the_collator_fetches_the_rows_of_a_sequence() -> None:
    rows = Dataset.from_dict(
        {
            "input_ids": [ONE[0], TWO[0], THREE[0]],
            "labels": [ONE[1], TWO[1], THREE[1]],
            "prompt": [0, 1, 1],
        }
    )
    got = Collate(rows, PAD, Layout.positions)([{"rows": [2, 0], "length": 7}, {"rows": [1]}])
    expected = collate([[THREE, ONE], [TWO]], PAD, Layout.positions)
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_sequences_are_the_packs_and_what_fills_the_last_step(tmp_path: Path) -> None:
    file = write(tmp_path, [3, 7, 1, 6, 3])
    plan(file, 10)
    rows = Dataset.from_file(str(file))
    packed = sequences(rows, packs_of(file), multiple=4)
    assert packed["rows"][:] == [[1, 0], [3, 4, 2], [], []]
    assert packed["length"][:] == [10, 10, 0, 0]
    alone = sequences(rows, None, multiple=5)
    assert alone["rows"][:] == [[0], [1], [2], [3], [4]]
    assert alone["length"][:] == [3, 7, 1, 6, 3]
    assert len(sequences(rows, None, multiple=4)) == 8


lengths_of = st.lists(st.integers(0, 9), min_size=1, max_size=300)


@given(lengths_of, st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 2]))
@repeatable
def test_an_epoch_has_every_sequence_once_and_the_empty_ones_last(
    lengths: list[int], seed: int, group: int | None
) -> None:
    order = Order(lengths, seed, group)
    drawn = list(order)
    assert sorted(drawn) == list(range(len(lengths))) and len(order) == len(lengths)
    full = [lengths[at] > 0 for at in drawn]
    assert full == sorted(full, reverse=True)
    assert drawn == list(Order(lengths, seed, group))


def test_the_order_is_another_in_each_epoch_and_for_each_seed() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        found = Order([1] * 50, seed)
        found.set_epoch(epoch)
        return tuple(found)

    drawn = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(drawn) == 16


def test_the_order_is_uniform() -> None:
    firsts = [next(iter(Order([1] * 4, seed))) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.27  # chi-squared, 3 degrees of freedom, p = 0.001


def test_rows_of_like_length_share_a_step_and_the_longest_comes_first() -> None:
    group = 3
    lengths = np.random.default_rng(0).permutation(np.arange(1, 4 * STRETCH * group + 8)).tolist()
    drawn = [lengths[at] for at in Order(lengths, 1, group)]
    assert drawn[0] == max(lengths)
    falls = [at for at in range(1, len(drawn)) if drawn[at] > drawn[at - 1]]
    assert len(falls) == 4  # five stretches, each longest first
    assert set(np.diff([0, *falls, len(drawn)])) <= {STRETCH * group, 7}
    steps = [drawn[at : at + group] for at in range(0, len(drawn) - group, group)]
    spread = [max(step) - min(step) for step in steps]
    alone = [lengths[at] for at in Order(lengths, 1)]
    random = [alone[at : at + group] for at in range(0, len(alone) - group, group)]
    assert np.median(spread) < 0.1 * np.median([max(step) - min(step) for step in random])


@given(lengths=st.lists(st.integers(1, 9), max_size=20), world=st.integers(1, 3), size=st.integers(1, 4))
def test_every_row_is_dealt_to_one_rank(lengths: list[int], world: int, size: int) -> None:
    ranks = [dealt(lengths, rank, world, size) for rank in range(world)]
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    counts = [sum(map(len, batches)) for batches in ranks]
    assert max(counts) - min(counts) <= 1
    for batches in ranks:
        assert all(len(batch) == size for batch in batches[:-1])
        flat = [lengths[row] for batch in batches for row in batch]
        assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize("lengths", [[3, 1, 2, 5, 4], [7], [2, 0, 3], [1] * 12], ids=len)
def test_upcoming_rows_are_those_of_epochs_one_after_the_other(lengths: list[int]) -> None:
    walked: list[int] = []
    for epoch in range(40):
        fresh = Order(lengths, seed=3)
        fresh.set_epoch(epoch)
        walked += list(fresh)
    order = Order(lengths, seed=3)
    for start, count in itertools.product(range(16), range(18)):
        assert upcoming(order, start, count) == walked[start : start + count], (start, count)
    assert upcoming(order, 30, 5) == walked[30:35]
    assert upcoming(order, 0, 5) == walked[:5]  # whatever was asked before
