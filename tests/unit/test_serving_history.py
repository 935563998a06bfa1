"""What fits of a conversation: the oldest exchanges go, the system prompt and the question stay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ftpipe.choices import Role
from ftpipe.data.example import Turn
from ftpipe.errors import DataError
from ftpipe.serving.history import fitting

SYSTEM = Turn(Role.system, "sss")


def talk(*texts: str) -> list[Turn]:
    return [Turn((Role.user, Role.assistant)[at % 2], text) for at, text in enumerate(texts)]


def letters(turns: Sequence[Turn]) -> int:
    return sum(len(turn.content) for turn in turns)


@pytest.mark.parametrize(
    ("room", "left", "dropped"),
    [
        (None, "sss a bb ccc dd e", 0),
        (12, "sss a bb ccc dd e", 0),
        (11, "sss ccc dd e", 2),
        (9, "sss ccc dd e", 2),
        (8, "sss e", 4),
        (4, "sss e", 4),
    ],
)
def test_the_oldest_exchanges_go_first(room: int | None, left: str, dropped: int) -> None:
    turns, gone = fitting([SYSTEM, *talk("a", "bb", "ccc", "dd", "e")], letters, room)
    assert " ".join(turn.content for turn in turns) == left and gone == dropped
    assert turns[0] == SYSTEM and turns[1].role is Role.user


def test_a_question_that_does_not_fit_by_itself_is_refused() -> None:
    with pytest.raises(DataError, match="takes 1,004 tokens with its template, but there is room for 3"):
        fitting([SYSTEM, *talk("a", "b", "c" * 1001)], letters, 3)
    assert fitting(talk("a", "b", "ccc"), letters, 3) == (talk("ccc"), 2)
