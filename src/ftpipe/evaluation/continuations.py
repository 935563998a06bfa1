"""How likely a model finds each of several continuations of a prompt.

Shapes: N rows of a forward pass, padded on the left, K last positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ftpipe.modeling import logits_at, positions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DEFAULT_LENGTH = 2048  # where a model does not say how much it takes; hendrycks/test takes as much


@dataclass(frozen=True)
class Asked:
    """Token ids of a prompt and of each continuation; none is empty."""

    prompt: Sequence[int]
    continuations: tuple[tuple[int, ...], ...]

    def rows(self) -> list[tuple[int, ...]]:
        """Return what the model is to read, each row once.

        The last token of a continuation is predicted, not read: continuations that differ in it alone
        share a row.
        """
        return list(dict.fromkeys(self._row(one) for one in self.continuations))

    def row_of(self, continuation: int) -> int:
        """Return which of the rows predicts a continuation."""
        return self.rows().index(self._row(self.continuations[continuation]))

    def _row(self, continuation: Sequence[int]) -> tuple[int, ...]:
        return (*self.prompt, *continuation[:-1])

    def __len__(self) -> int:
        return max(map(len, self.rows()))


def batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Return which prompts share a forward pass: those of like length, the longest first."""
    order = sorted(range(len(asked)), key=lambda at: (-len(asked[at]), at))
    return [order[start : start + size] for start in range(0, len(order), size)]


def logps(model: PreTrainedModel | PeftModel, asked: Sequence[Asked], pad: int) -> list[list[float]]:
    """Return log p(continuation | prompt) in nats, of each continuation of each prompt.

    It is the sum over the continuation's tokens, as one forward pass of all rows together gives it.

    Args:
        pad: any token id; it is not attended.
    """
    rows = [row for one in asked for row in one.rows()]
    width, keep = max(map(len, rows)), max(len(c) for one in asked for c in one.continuations)
    ids_NL = torch.full((len(rows), width), pad, dtype=torch.long)
    mask_NL = torch.zeros_like(ids_NL)
    for at, row in enumerate(rows):
        ids_NL[at, width - len(row) :] = torch.tensor(row)
        mask_NL[at, width - len(row) :] = 1
    logp_NKV = _last_logps(model, ids_NL, mask_NL, keep)
    first = 0
    found = []
    for one in asked:
        sums = []
        for at, continuation in enumerate(one.continuations):
            own_KV = logp_NKV[first + one.row_of(at), -len(continuation) :]
            chosen_K = own_KV.gather(1, torch.tensor(continuation, device=own_KV.device)[:, None])
            sums.append(float(chosen_K.sum()))
        found.append(sums)
        first += len(one.rows())
    return found


def _last_logps(
    model: PreTrainedModel | PeftModel, ids_NL: torch.Tensor, mask_NL: torch.Tensor, keep: int
) -> torch.Tensor:
    """Return the log-probabilities of every token at the last positions, in float32."""
    inner: Any = model
    if hasattr(model, "get_base_model"):  # the adapter is in its modules; PEFT's forward hides its own
        inner = inner.get_base_model()
    width = ids_NL.shape[1]
    with torch.no_grad():
        logits_NKV = logits_at(
            inner, ids_NL.to(model.device), mask_NL.to(model.device), max(0, width - keep), width
        )
    return logits_NKV.log_softmax(-1)


def longest(model: PreTrainedModel | PeftModel) -> int:
    """Return how many tokens a model takes, as its configuration says."""
    return positions(model.config.get_text_config()) or DEFAULT_LENGTH
