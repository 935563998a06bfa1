"""Raw rewards of replies that are not trained on, the same on every number of ranks.

Shapes: N replies, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ftpipe.data.encode import IGNORED
from ftpipe.reward.batches import pad_right, ranked
from ftpipe.reward.measures import rightness
from ftpipe.sequences import dealt
from ftpipe.sharding import in_step

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Replies:
    """Replies to be scored, fetched one by one.

    Attributes:
        lengths: tokens of prompt and reply.
        fetch: returns the tokens of one of them.
    """

    lengths: Sequence[int]
    fetch: Callable[[int], Sequence[int]]


def of_groups(rows: Dataset, best: bool = False) -> Replies:
    """Return the replies of a table of preferences, row by row; ``best``: the first of each row."""
    stops = rows["stops"][:]
    places = [(row, k) for row in range(len(rows)) for k in range(1 if best else len(stops[row]))]

    def fetch(n: int) -> Sequence[int]:
        row, k = places[n]
        return ranked(rows[row]).replies[k]

    return Replies([stops[row][k] for row, k in places], fetch)


def of_demonstrations(rows: Dataset) -> Replies:
    """Return prompt and answer of each demonstration, up to the last learned token."""

    def fetch(n: int) -> Sequence[int]:
        labels = np.asarray(rows[n]["labels"])
        end = int(np.flatnonzero(labels != IGNORED)[-1]) + 1
        ids: Sequence[int] = rows[n]["input_ids"][:end]
        return ids

    return Replies(rows["length"][:], fetch)


class Scorer:
    """Scores replies by a trainer's model, shared out over its ranks; nothing random is drawn."""

    def __init__(self, trainer: Trainer, model: torch.nn.Module, pad: int, batch_size: int) -> None:
        self._trainer = trainer
        self._model = model
        self._pad = pad
        self._batch_size = batch_size

    def score(self, replies: Replies) -> Floats:
        """Return raw rewards_N, on every rank."""
        accelerator = self._trainer.accelerator
        lengths, rank, world = replies.lengths, accelerator.process_index, accelerator.num_processes
        found = torch.zeros(len(lengths), dtype=torch.float64, device=accelerator.device)
        was_training = self._model.training
        self._model.eval()
        with torch.no_grad(), self._trainer.compute_loss_context_manager():
            most = len(dealt(lengths, 0, world, self._batch_size))
            for batch, counts in in_step(dealt(lengths, rank, world, self._batch_size), most):
                ids_NL, mask_NL = pad_right([replies.fetch(n) for n in batch], self._pad)
                output = self._model(
                    input_ids=ids_NL.to(accelerator.device),
                    attention_mask=mask_NL.to(accelerator.device),
                )
                if counts:
                    found[batch] = output.logits[:, 0].double()
        self._model.train(was_training)
        rewards_N: Floats = accelerator.reduce(found, reduction="sum").cpu().numpy()
        return rewards_N


class HeldOut:
    """Measures the accuracy on the pairs of groups that are not trained on; a tie counts half."""

    def __init__(self, scorer: Scorer, rows: Dataset) -> None:
        self._scorer = scorer
        self._replies = of_groups(rows)
        self._pairs_P2 = pairs_of(rows)

    def measure(self) -> dict[str, float]:
        return {"held_out_accuracy": self.accuracy()}

    def accuracy(self) -> float:
        """Return the share of pairs in which the better reply has the higher reward."""
        better_P, worse_P = self._scorer.score(self._replies)[self._pairs_P2].T
        return float(rightness(better_P - worse_P).mean())


def pairs_of(rows: Dataset) -> NDArray[np.int64]:
    """Return pairs_P2: places of better and worse replies among those of all rows."""
    pairs, first = [], 0
    for stops, flat in zip(rows["stops"][:], rows["pairs"][:], strict=True):
        pairs += [first + at for at in flat]
        first += len(stops)
    return np.array(pairs, np.int64).reshape(-1, 2)
