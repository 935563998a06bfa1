"""What a trainer is fed: sequences of one row or several, an order of them, and their tensors.

Shapes: B sequences, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ftpipe.data.encode import IGNORED

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

STRETCH = 50  # optimiser steps whose rows are sorted together where rows are grouped by length
EMPTY = 2  # tokens of padding that stand for a sequence without rows: one that the next predicts


class Layout(StrEnum):
    """How a batch is laid out, so that no row attends another.

    padded: one row in each sequence; ``attention_mask`` tells padding apart.
    positions: ``position_ids`` start again at each row; transformers derives the masks from them
        (masking_utils.find_packed_sequence_indices), sliding windows included.
    blocks: the block-diagonal causal mask itself, for models that take no hint from positions.
    flat: the rows of all sequences end to end with their boundaries, for flash attention.
    """

    padded = "padded"
    positions = "positions"
    blocks = "blocks"
    flat = "flat"


Row = tuple[Sequence[int], Sequence[int]]  # token ids, and labels of the same length


def sequences(rows: Dataset, packs: Path | None, multiple: int) -> Dataset:
    """Return which rows make up each sequence, and its tokens: columns ``rows`` and ``length``.

    Empty sequences at the end fill the last optimiser step. So every step has the same number of
    sequences on every number of ranks, and no rank is given a row twice to keep it busy.

    Args:
        packs: the plan of which rows share a sequence; None: each row is a sequence.
        multiple: sequences of an optimiser step.
    """
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    if packs is not None:
        planned = Dataset.from_file(str(packs)).select_columns(["rows", "length"])
    else:
        starts = pa.array(np.arange(len(rows) + 1, dtype=np.int32))
        alone = pa.ListArray.from_arrays(starts, pa.array(np.arange(len(rows))))
        lengths = pa.array(rows.with_format("numpy")["length"][:], pa.int32())
        planned = Dataset(pa.table({"rows": alone, "length": lengths}))
    missing = -len(planned) % multiple
    filling = {"rows": [[]] * missing, "length": [0] * missing}
    return concatenate_datasets([planned, Dataset.from_dict(filling, features=planned.features)])


def dealt(lengths: Sequence[int], rank: int, world: int, size: int) -> list[list[int]]:
    """Return the rows of each batch of one rank: the longest first, dealt out to the ranks in turn.

    Every row is in one batch of one rank. What does not fit the memory fails in the first batch.

    Args:
        lengths: tokens of each row.
        size: rows of a batch.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    mine = longest_first[rank::world]
    return [mine[at : at + size] for at in range(0, len(mine), size)]


class Order(Sampler[int]):
    """The order of the sequences in each epoch: the same on every rank, the empty ones last.

    Args:
        lengths: tokens of each sequence; 0 where it is empty.
        group: sequences of an optimiser step, where those of a step are to be of similar length.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None = None) -> None:
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self._group = group
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, self._epoch))
        drawn = generator.permutation(np.flatnonzero(self._lengths))
        if self._group is not None:
            drawn = self._grouped(drawn, self._group)
        yield from drawn.tolist()
        yield from np.flatnonzero(self._lengths == 0).tolist()

    def _grouped(self, drawn: np.ndarray, group: int) -> np.ndarray:
        """Sort stretches of the order by length, longest first; the longest of all comes first.

        So a run that does not fit the memory fails in its first step.
        """
        size = STRETCH * group
        stretches = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        stretches = [part[np.argsort(-self._lengths[part], kind="stable")] for part in stretches]
        longest = max(range(len(stretches)), key=lambda at: self._lengths[stretches[at][0]], default=0)
        first = stretches[longest : longest + 1]
        return np.concatenate([*first, *stretches[:longest], *stretches[longest + 1 :]] or [drawn])


def upcoming(order: Order, start: int, count: int) -> list[int]:
    """Return so many rows from a place in the endless order of all epochs."""
    rows: list[int] = []
    length = len(order)
    for epoch in range(start // length, (start + count - 1) // length + 1):
        order.set_epoch(epoch)
        first = max(start - epoch * length, 0)
        rows += list(order)[first : start + count - epoch * length]
    return rows


class Collate:
    """Fetches the rows of sequences from the memory-mapped table and lays them out as tensors.

    Args:
        pad: what fills sequences up. It may be a learned token (eos): labels and attention tell
            padding apart, never the id.
        dtype: of the mask, where the layout is ``blocks``: the model's own.
    """

    def __init__(
        self, rows: Dataset, pad: int, layout: Layout, dtype: torch.dtype = torch.float32
    ) -> None:
        self._rows = rows.select_columns(["input_ids", "labels"]).with_format("numpy")
        self.pad = pad
        self.lay_out(layout, dtype)

    def lay_out(self, layout: Layout, dtype: torch.dtype) -> None:
        """Lay out the batches from now on."""
        self._layout = layout
        self._dtype = dtype

    def __call__(self, chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of the sequences that a trainer's dataset yields."""
        packs = [[self._row(at) for at in one["rows"]] for one in chosen]
        return collate(packs, self.pad, self._layout, self._dtype)

    def _row(self, at: int) -> Row:
        found = self._rows[at]
        return found["input_ids"], found["labels"]


def collate(
    packs: Sequence[Sequence[Row]], pad: int, layout: Layout, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return ``input_ids`` and ``labels`` (B, L), what the layout needs, and ``tokens``.

    The first token of a row is never learned: nothing in its own row predicts it. Padding comes last
    and is a row of its own, which no other row attends. ``tokens`` counts what is no padding.
    """
    if layout is Layout.flat:
        packs = [[row for pack in packs for row in pack]]
    if layout is Layout.padded:
        assert all(len(pack) <= 1 for pack in packs), "rows that share a sequence need another layout"
    filled = [sum(len(ids) for ids, _ in pack) for pack in packs]
    longest = max([*filled, EMPTY if 0 in filled else 0])
    shape = (len(packs), longest)
    ids_BL = torch.full(shape, pad)
    labels_BL = torch.full(shape, IGNORED)
    positions_BL = torch.empty(shape, dtype=torch.int64)
    for b, (pack, tokens) in enumerate(zip(packs, filled, strict=True)):
        at = 0
        for ids, labels in pack:
            here = slice(at, at + len(ids))
            ids_BL[b, here] = torch.as_tensor(np.asarray(ids, np.int64))
            labels_BL[b, here] = torch.as_tensor(np.asarray(labels, np.int64))
            labels_BL[b, at] = IGNORED
            positions_BL[b, here] = torch.arange(len(ids))
            at += len(ids)
        positions_BL[b, tokens:] = torch.arange(longest - tokens)
    batch: dict[str, Any] = {"input_ids": ids_BL, "labels": labels_BL}
    if layout is Layout.padded:
        mask_BL = torch.arange(longest) < torch.tensor(filled)[:, None]
        mask_BL[:, 0] = True  # an empty sequence still attends something: no softmax over nothing
        batch["attention_mask"] = mask_BL.long()
    else:
        batch["position_ids"] = positions_BL
    if layout is Layout.blocks:
        batch["attention_mask"] = block_mask(positions_BL, dtype)
    if layout is Layout.flat:
        batch |= _boundaries(positions_BL)
    batch["tokens"] = torch.tensor(sum(filled))
    return batch


def block_mask(positions_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores: 0 where a token is seen, else the least (B, 1, L, L)."""
    row_BL = (positions_BL == 0).cumsum(1)
    seen_BLL = (row_BL[:, :, None] == row_BL[:, None, :]).tril()
    scores_BLL = torch.zeros(seen_BLL.shape, dtype=dtype)
    return scores_BLL.masked_fill(~seen_BLL, torch.finfo(dtype).min)[:, None]


def _boundaries(positions_1L: Tensor) -> dict[str, Any]:
    """Return where rows begin and end, as flash attention's varlen kernels take it.

    Computed here once; the model would else ask the device for them in every layer.
    """
    starts = torch.nonzero(positions_1L[0] == 0).flatten()
    ends = torch.cat([starts, torch.tensor([positions_1L.shape[1]])]).to(torch.int32)
    most = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": most, "max_length_k": most}
