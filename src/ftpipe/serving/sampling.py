"""How an answer is drawn, and which values that can have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftpipe.data.example import SURROGATE, shown

MOST_STOPS = 4  # as OpenAI has it


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        temperature: 0: always the likeliest token.
        top_p: of the likeliest tokens, those that make up this share.
        max_tokens: of the answer; None: as many as the context has room for.
        seed: equal seeds draw equal answers to equal prompts; None: a new one each time.
        stops: texts that end an answer and are no part of it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= MOST_STOPS
        and all(isinstance(text, str) and text and not SURROGATE.search(text) for text in texts)
    )


# What a request or an option may say, by OpenAI's names.
RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: _number(value) and 0 <= value <= 2, "a number from 0 to 2"),
    "top_p": (lambda value: _number(value) and 0 < value <= 1, "a number above 0, up to 1"),
    "max_tokens": (lambda value: _whole(value) and value >= 1, "a whole number from 1 on"),
    "max_completion_tokens": (lambda value: _whole(value) and value >= 1, "a whole number from 1 on"),
    "seed": (lambda value: _whole(value) and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "stop": (_texts, f"a text, or up to {MOST_STOPS} of them, none empty"),
}


def flaw(name: str, value: Any) -> str | None:
    """Return what is wrong with a value of ``RANGES``, as a sentence without its subject, or None."""
    fits, allowed = RANGES[name]
    return None if fits(value) else f"must be {allowed}, not {shown(repr(value))}"
