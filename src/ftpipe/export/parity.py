"""How far a folder is from the policy it was made of: the same rows through both, token by token.

Each is in memory alone; what the first one said of each token waits on the disk. Nats per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftpipe.choices import Part, Use
from ftpipe.data import table
from ftpipe.data.encode import IGNORED
from ftpipe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 512  # of a row
PROBES, PROBE_TOKENS = 8, 32  # where there are no held-out rows: tokens drawn by a seed of their own
AT_ONCE = 64  # tokens compared in double precision
SCRATCH = ".policy-{}.safetensors"


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them are learned: label -100 where one is not."""

    ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Parity:
    """What was measured.

    Attributes:
        on: the rows: part and use of the dataset, or ``probes``.
        tokens: positions compared.
        kl_mean, kl_p99, kl_max: KL divergence of the next token's distribution, nats.
        agreement: share of positions with the same likeliest token.
        loss_before, loss_after: of the learned tokens, nats; None where there are none.
    """

    on: str
    rows: int
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    loss_before: float | None
    loss_after: float | None

    @property
    def loss_delta(self) -> float | None:
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "loss_delta": self.loss_delta}


def held_out(dataset: Path | None, most: int, tokens: int) -> tuple[str, list[Row]]:
    """Return where the rows are from, and the rows: the test part, else what is held out, else probes.

    Args:
        dataset: the folder of the dataset, where there is one.
        most: how many rows at most.
        tokens: of the tokenizer, for probes.
    """
    for part in (Part.test, Part.validation) if dataset is not None else ():
        assert dataset is not None
        use, found = some_rows(dataset, part, most)
        if found:
            return f"{use}/{part}", found
    drawn = torch.randint(tokens, (PROBES, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return "probes", [Row(ids, [IGNORED] * len(ids)) for ids in drawn.tolist()]


def some_rows(
    dataset: Path, part: Part, most: int, spread: bool = False
) -> tuple[Use | None, list[Row]]:
    """Return the use that a part of a dataset has rows for, and some of them, cut to ``TOKENS``.

    Args:
        spread: take them evenly from first to last; else the first.
    """
    for use in Use:
        if not table.place(dataset, use, part).is_file():
            continue
        rows = table.read(dataset, use, part)
        count = min(most, len(rows))
        at = [number * len(rows) // count for number in range(count)] if spread else range(count)
        found = [_row(use, row) for row in rows.select(at)]
        found = [row for row in found if len(row.ids) > 1]  # one token has no successor
        if found:
            return use, found
    return None, []


def _row(use: Use, row: dict[str, Any]) -> Row:
    """Return a row of any use; of several replies the best."""
    ids = row["input_ids"]
    if use is Use.demonstrations:
        labels = row["labels"]
    elif use is Use.prompts:
        labels = [IGNORED] * len(ids)
    else:
        several = use is Use.preferences
        start, stop = (row["starts"][0], row["stops"][0]) if several else (row["start"], row["stop"])
        ids = ids[0] if several else ids
        labels = [token if start <= at < stop else IGNORED for at, token in enumerate(ids)]
    return Row(ids[:TOKENS], labels[:TOKENS])


def remember(
    model: PreTrainedModel, rows: Sequence[Row], folder: Path, compute: torch.dtype | None
) -> None:
    """Write what a model says of each row into ``folder``.

    Args:
        compute: the dtype of the products where it is not that of the weights (autocast).
    """
    for at, row in enumerate(rows):
        save_file({"logits": _logits(model, row, compute).cpu()}, folder / SCRATCH.format(at))


def forget(folder: Path) -> None:
    for path in folder.glob(SCRATCH.format("*")):
        path.unlink()


def compare(model: PreTrainedModel, rows: Sequence[Row], folder: Path, on: str) -> Parity:
    """Return how far a model is from what was remembered in ``folder``.

    Raises:
        ModelError: if it knows another number of tokens.
    """
    kl: list[Tensor] = []
    losses = torch.zeros(2, dtype=torch.float64)
    learned = same = 0
    for row, before in zip(rows, _remembered(folder, len(rows)), strict=True):
        after = _logits(model, row, None).cpu()
        if after.shape != before.shape:
            raise ModelError(
                f"what was exported knows {after.shape[1]:,} tokens and the policy {before.shape[1]:,}."
            )
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        labels = torch.tensor(row.labels[1:])
        learned += int((labels != IGNORED).sum())
        parts = [every.split(AT_ONCE) for every in (labels, before, after)]
        for own, one, other in zip(*parts, strict=True):
            p, q = (logits.double().log_softmax(-1) for logits in (one, other))
            kl.append((p.exp() * (p - q)).sum(-1))
            at = (own != IGNORED).nonzero()[:, 0]
            for number, logps in enumerate((p, q)):
                losses[number] -= logps[at, own[at]].sum()
    every = torch.cat(kl)
    means = (losses / learned).tolist() if learned else (None, None)
    return Parity(
        on=on,
        rows=len(rows),
        tokens=len(every),
        kl_mean=float(every.mean()),
        kl_p99=float(every.quantile(0.99)) if len(every) < 2**24 else float(every.max()),
        kl_max=float(every.max()),
        agreement=same / len(every),
        loss_before=means[0],
        loss_after=means[1],
    )


def _remembered(folder: Path, count: int) -> Iterator[Tensor]:
    for at in range(count):
        yield load_file(folder / SCRATCH.format(at))["logits"]


def _logits(model: PreTrainedModel, row: Row, compute: torch.dtype | None) -> Tensor:
    """Return the logits of each position that has a next token, (T - 1, V), in the model's format."""
    ids = torch.tensor([row.ids], device=model.device)
    kind = model.device.type
    with torch.no_grad(), torch.autocast(kind, compute, enabled=compute is not None):
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return found.contiguous()


def refusal(found: Parity, max_kl: float, min_agreement: float, what: str) -> str | None:
    """Return why what was exported is not the policy, as a sentence; None where it is."""
    far = not found.kl_mean <= max_kl  # NaN is far, too
    if not far and found.agreement >= min_agreement:
        return None
    return (
        f"{what} is not the policy: KL {found.kl_mean:.2g} nats per token (export.max_kl={max_kl:g}), "
        f"the same likeliest token {found.agreement:.1%} of the time (export.min_agreement="
        f"{min_agreement:.1%}) on {found.tokens:,} tokens of {found.on}; nothing is published. Store "
        "the weights finer (export.dtype=float32), or allow more."
    )
