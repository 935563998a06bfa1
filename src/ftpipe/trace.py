"""What a training did, step by step, at full precision: enough to find where two runs part.

``initial.json`` has a digest of every weight before the first step, and ``trace.jsonl`` a line for the
first steps, the last, and one in so many between: loss, gradient norm and a digest of the rows. Neither
holds a time or a place, so two equal runs have equal files. An interrupted run adds the same lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftpipe.artifacts import sync, write_atomic
from ftpipe.data.encode import IGNORED

if TYPE_CHECKING:
    from ftpipe.config import TrackingConfig

TRACE, INITIAL = "trace.jsonl", "initial.json"
SAMPLED = 2**16  # elements of a frozen weight that are looked at
DIGITS = 16  # of a SHA-256, in hex


@dataclass(frozen=True)
class Trace:
    """Writes the trace of one training. Only the first rank writes.

    Attributes:
        first: so many steps are on record from the beginning.
        every: and then one in so many.
        writes: whether this is the first rank.
    """

    folder: Path
    first: int
    every: int
    writes: bool

    @classmethod
    def of(cls, tracking: TrackingConfig, folder: Path, rank: int) -> Trace:
        return cls(folder, tracking.trace_first, tracking.trace_every, rank == 0)

    def has(self, step: int) -> bool:
        """Say whether a step, counted from 1, is on record."""
        return step <= self.first or step % self.every == 0

    def begin(self, done: int) -> None:
        """Drop the lines after a step: those of an interrupted attempt, or of none at all."""
        if self.writes:
            path = self.folder / TRACE
            kept = [line for line in read(path) if line["step"] <= done]
            write_atomic(path, "".join(map(_line, kept)))

    def keep(self) -> None:
        """Put what is written on the disk: a checkpoint is about to count on it."""
        if self.writes and (self.folder / TRACE).is_file():
            sync(self.folder / TRACE)

    def initial(self, weights: Mapping[str, str]) -> None:
        """Write the digests of all weights before the first step, by name."""
        if self.writes:
            write_atomic(self.folder / INITIAL, json.dumps(weights, indent=1) + "\n")

    def step(self, number: int, **found: Any) -> None:
        """Write one line.

        Args:
            found: floats, which are written so that reading gives the same ones, and texts.
        """
        if self.writes:
            with (self.folder / TRACE).open("a", encoding="utf-8") as file:
                file.write(_line({"step": number, **found}))


def _line(found: Mapping[str, Any]) -> str:
    return json.dumps(found) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a trace; none where there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(dict(json.loads(line)))
        except ValueError:  # cut off by a kill
            break
    return lines


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors: names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(_bytes(tensor))
    return whole.hexdigest()[:DIGITS]


def of_texts(texts: Iterable[str]) -> str:
    """Return a digest of texts, such as the digests of several ranks or rows as JSON."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:DIGITS]


def of_batch(batch: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a digest of each row of a batch, without what pads it to the length of the others.

    So what the rows of a step are does not depend on how they are split over micro-batches and ranks.

    Args:
        batch: ``input_ids`` (N, L), with ``labels`` if there are any, and either ``attention_mask`` of
            that shape or, where several rows share a sequence, ``position_ids``, which begin anew with
            each of them: a stretch without a label is padding there.
        prefix: of these names.
    """
    ids_NL = batch[f"{prefix}input_ids"]
    labels_NL = batch.get(f"{prefix}labels")
    positions_NL = batch.get(f"{prefix}position_ids")
    if positions_NL is None:
        mask_NL = batch[f"{prefix}attention_mask"].bool()
        rows = [(n, mask_L) for n, mask_L in enumerate(mask_NL)]
    else:
        rows = [(n, place) for n, place_L in enumerate(positions_NL) for place in _stretches(place_L)]
    found = []
    for n, place in rows:
        row = [("ids", ids_NL[n][place])]
        if labels_NL is not None:
            row.append(("labels", labels_NL[n][place]))
        if positions_NL is None or bool((row[-1][1] != IGNORED).any()):
            found.append(of_tensors(row))
    return found


def _stretches(positions_L: Tensor) -> list[slice]:
    """Return where the rows of a sequence lie."""
    starts = [*torch.nonzero(positions_L == 0).flatten().tolist(), len(positions_L)]
    return [slice(start, end) for start, end in pairwise(starts)]


def of_rows(rows: Iterable[Sequence[int]]) -> str:
    """Return a digest of rows of token ids."""
    return of_texts(json.dumps(list(row)) for row in rows)


def of_weights(weights: Iterable[tuple[str, Tensor]], trained: Iterable[Tensor]) -> dict[str, str]:
    """Return a digest of each weight as this rank holds it, by name.

    Args:
        trained: those that are read whole. Of a frozen one, whose file is on record, a sample tells
            whether it was loaded alike: in these bits, with these scales.
    """
    whole = {id(weight) for weight in trained}
    return {
        name: of_tensors([("", here(weight) if id(weight) in whole else sample(here(weight)))])
        for name, weight in weights
    }


def here(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight: its shard, where FSDP2 or ZeRO-3 shares it out."""
    held: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    shard: Tensor = getattr(held, "ds_tensor", held)
    return shard.detach()


def sample(weight: Tensor) -> Tensor:
    """Return some of a weight's elements, evenly spaced."""
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
