"""What a strategy costs a rank: bytes of model states, bytes it sends, and the largest model that fits.

After Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), sections 3 and 7, for the way weights are held
here: what is trained is float32 and products are computed in 16 bits by autocast, so a trained weight
takes 4 bytes, its gradient 4 and Adam's moments 8: 16 in all, as the paper's 2 + 2 + 12. DeepSpeed
keeps a float32 copy of its own besides. Activations and buffers of messages come on top.

``python -m ftpipe.costs`` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ftpipe.choices import Strategy

WEIGHT = GRADIENT = COPY = 4  # bytes of float32
ADAM = 8  # two moments in float32
HALF = 2  # bytes of a weight in 16 bits
SHOWN = (8, 64, 256, 1024)  # ranks
USED = 0.7  # share of a GPU's memory for model states in the tables; the rest is for activations


@dataclass(frozen=True)
class States:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def states(
    strategy: Strategy,
    trained: float,
    frozen: float,
    ranks: int,
    width: float = WEIGHT,
    still: float = HALF,
    kept: float = ADAM,
) -> States:
    """Return the bytes of model states on one rank.

    Args:
        trained: weights that are trained.
        frozen: other weights: the base of an adapter.
        width: bytes of a trained weight and of its gradient.
        still: bytes of a frozen weight.
        kept: bytes that the optimiser keeps of a trained weight.
    """
    held = width * trained + still * frozen
    gradients, moments, copy = width * trained, kept * trained, COPY * trained
    match strategy:
        case Strategy.ddp:
            return States(held, gradients, moments)
        case Strategy.zero1:
            return States(held, gradients, (moments + copy) / ranks)
        case Strategy.zero2:
            return States(held, gradients / ranks, (moments + copy) / ranks)
        case Strategy.zero3:
            return States(held / ranks, gradients / ranks, (moments + copy) / ranks)
        case Strategy.fsdp:
            return States(held / ranks, gradients / ranks, moments / ranks)


def sent(
    strategy: Strategy,
    trained: float,
    frozen: float,
    ranks: int,
    accumulated: int = 1,
    gathered: int = HALF,
    reshard: bool = True,
) -> float:
    """Return the bytes that one rank sends in an optimiser step, by rings (the paper's section 7).

    A ring moves (ranks - 1) / ranks of what is gathered or scattered, and twice that of what is added up
    on every rank. Gradients go in float32, and so do weights under ZeRO that are trained.

    Args:
        accumulated: micro-batches of a step on each rank.
        gathered: fsdp: bytes of a weight on its way to a pass: 2 under bf16, else 4.
        reshard: fsdp: weights are gathered again for the backward pass.
    """
    gradients, updated = GRADIENT * trained, WEIGHT * trained
    match strategy:
        case Strategy.ddp:
            moved = 2 * gradients
        case Strategy.zero1:
            moved = gradients + updated
        case Strategy.zero2:  # what is added up lies on one rank, so each micro-batch is sent
            moved = accumulated * gradients + updated
        case Strategy.zero3:
            moved = accumulated * (2 * (WEIGHT * trained + HALF * frozen) + gradients)
        case Strategy.fsdp:
            passes = 2 if reshard else 1
            moved = accumulated * (passes * gathered * (trained + frozen) + gradients)
    return moved * (ranks - 1) / ranks


def largest(strategy: Strategy, ranks: int, memory: float, share: float = 1.0) -> float:
    """Return how many weights fit in a rank's memory.

    Args:
        memory: bytes for model states.
        share: of the weights that is trained; 1: all of them.
    """
    return memory / states(strategy, share, 1 - share if share < 1 else 0.0, ranks).total


def tables() -> Iterator[str]:
    """Yield the lines of the tables, in Markdown."""
    heads = " | ".join(f"{ranks:,} GPUs" for ranks in SHOWN)
    rule = "|---" * (len(SHOWN) + 1) + "|"
    for share, what in ((1.0, "all weights trained"), (0.01, "an adapter of 1% of the weights")):
        for gpu in (24, 80):
            yield f"\nLargest model, {what}, {gpu} GB a GPU ({USED:.0%} for states), in billions:\n"
            yield f"| strategy | {heads} |"
            yield rule
            for strategy in Strategy:
                fits = [largest(strategy, ranks, USED * gpu * 1e9, share) / 1e9 for ranks in SHOWN]
                yield f"| {strategy} | " + " | ".join(f"{one:,.1f}" for one in fits) + " |"
    for trained, frozen, what in (
        (7e9, 0.0, "7B weights, all trained"),
        (0.07e9, 7e9, "an adapter of 1% on 7B weights"),
    ):
        yield f"\nSent by each GPU in a step of one micro-batch, {what}, in GB:\n"
        yield f"| strategy | {heads} |"
        yield rule
        for strategy in Strategy:
            moved = [sent(strategy, trained, frozen, ranks) / 1e9 for ranks in SHOWN]
            yield f"| {strategy} | " + " | ".join(f"{one:,.1f}" for one in moved) + " |"


if __name__ == "__main__":
    print("\n".join(tables()))
