"""The held-out loss of each row: nats and learned tokens, counted as in training (``heldout.py``).

Shapes: B rows of a batch, L tokens of the longest, N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ftpipe import stopping
from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.data.encode import IGNORED
from ftpipe.logs import progress
from ftpipe.reward.batches import pad_right
from ftpipe.sequences import dealt
from ftpipe.stopping import Stopped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Losses:
    """What a policy loses on held-out rows.

    Attributes:
        source: of each row.
        cluster: of each row: rows of one conversation, or that begin with the same prompt, share it.
        nats: negative log-likelihood of the learned tokens of each row.
        tokens: how many those are.
    """

    source: list[str]
    cluster: list[int]
    nats: list[float]
    tokens: list[int]

    @staticmethod
    def read(path: Path) -> Losses | None:
        """Return what was kept of an interrupted run, if it was."""
        return Losses(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def rows_of(dataset: Path, most: int | None) -> tuple[Part, Dataset] | None:
    """Return the held-out demonstrations of a dataset: the test part, else validation; None of neither.

    Args:
        most: rows of each source; None: all.
    """
    for part in (Part.test, Part.validation):
        if not table.place(dataset, Use.demonstrations, part).is_file():
            continue
        rows = table.read(dataset, Use.demonstrations, part)
        if len(rows):
            return part, rows.select(_first(rows["source"][:], most))
    return None


def _first(sources: Sequence[str], most: int | None) -> list[int]:
    """Return the places of the first so many rows of each source, in their order."""
    seen: dict[str, int] = {}
    chosen = []
    for at, source in enumerate(sources):
        seen[source] = seen.get(source, 0) + 1
        if most is None or seen[source] <= most:
            chosen.append(at)
    return chosen


def measure(
    model: PreTrainedModel,
    rows: Dataset,
    pad: int,
    batch_size: int,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Losses:
    """Return the loss of each row under a model with TRL's fused head.

    The first token of a row is predicted from nothing, so it is not counted.

    Raises:
        Stopped: if it was asked to stop.
    """
    nats_N, tokens_N = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    batches = dealt(rows["length"][:], 0, 1, batch_size)
    for batch in progress(batches, "batches of held-out rows"):
        chosen = rows.select(batch)
        ids_BL, mask_BL = pad_right(chosen["input_ids"][:], pad)
        labels_BL, _ = pad_right(chosen["labels"][:], IGNORED)
        given = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
        with torch.no_grad(), precision():
            output = model(
                **{name: tensor.to(model.device) for name, tensor in given.items()},
                use_cache=False,
                fused_lm_head=True,
            )
        nats_N[batch] = -output.log_probs.double().sum(1).cpu().numpy()
        tokens_N[batch] = output.label_mask.sum(1).cpu().numpy()
        if stopping.asked():
            raise Stopped("on held-out rows, which are measured again")
    return Losses(rows["source"][:], clusters(rows).tolist(), nats_N.tolist(), tokens_N.tolist())


def clusters(rows: Dataset) -> NDArray[np.int32]:
    """Return which rows depend on each other: a number for each.

    Pieces of one conversation come from one row of the source; threads of one tree begin with the same
    prompt. Whatever is tied by either, through others too, is one cluster.
    """
    if not len(rows):
        return np.zeros(0, np.int32)
    names: dict[tuple[str, str], int] = {}
    places: list[int] = []
    for key in _ties(rows):
        places.append(names.setdefault(key, len(names)))
    at_2N = np.repeat(np.arange(len(rows)), 2)
    size = len(rows) + len(names)
    ties = coo_array(
        (np.ones(len(at_2N)), (at_2N, np.array(places) + len(rows))),
        shape=(size, size),
    )
    _, labels = connected_components(ties, directed=False)
    return labels[: len(rows)].astype(np.int32)  # type: ignore[no-any-return]


def _ties(rows: Dataset) -> Iterator[tuple[str, str]]:
    """Yield two keys for each row: its place in its source, and the prompt that it begins with."""
    for row in rows.select_columns(["source", "row", "input_ids", "prompt"]):
        yield f"row of {row['source']}", str(row["row"])
        start = np.asarray(row["input_ids"][: row["prompt"]], np.int64)
        yield "prompt", hashlib.sha256(start.tobytes()).hexdigest()
