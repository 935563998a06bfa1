"""How much of a conversation fits: the oldest exchanges go first, the system prompt stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ftpipe.choices import Role
from ftpipe.data.example import Turn
from ftpipe.errors import DataError


def fitting(
    turns: Sequence[Turn], count: Callable[[Sequence[Turn]], int], room: int | None
) -> tuple[list[Turn], int]:
    """Return the turns that fit, and how many were dropped.

    Args:
        turns: an optional system turn, then user and assistant by turns, ending with the user.
        count: the tokens of a prompt of these turns.
        room: tokens that there are for it; None: any number.

    Raises:
        DataError: if what is asked last does not fit by itself.
    """
    system = [turn for turn in turns[:1] if turn.role is Role.system]
    spoken = list(turns[len(system) :])
    dropped = 0
    while True:
        tokens = count([*system, *spoken])
        if room is None or tokens <= room:
            return [*system, *spoken], dropped
        if len(spoken) < 3:
            raise DataError(
                f"it takes {tokens:,} tokens with its template, but there is room for {room:,}"
            )
        spoken = spoken[2:]  # a question and its answer
        dropped += 2
