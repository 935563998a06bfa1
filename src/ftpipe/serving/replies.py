"""What a client gets: the objects of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from ftpipe.choices import Ended

LAST = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """The frame of one answer.

    Attributes:
        chat: of a chat, else of a completion.
        usage: a stream tells its tokens at the end.
    """

    chat: bool
    model: str
    usage: bool = False
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, ended: Ended, counts: dict[str, int]) -> dict[str, Any]:
        """Return an answer in one piece."""
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        return self._frame("chat.completion", [self._choice(said, ended)]) | {"usage": counts}

    def begin(self) -> list[bytes]:
        """Return what a stream begins with: who speaks."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def part(self, text: str) -> bytes:
        """Return a piece of a stream."""
        return self._chunk({"content": text} if self.chat else text)

    def end(self, ended: Ended, counts: dict[str, int]) -> bytes:
        """Return what a stream ends with: why, the tokens if they were asked for, and a mark."""
        last = self._chunk({} if self.chat else "", ended)
        if not self.usage:
            return last + LAST
        told = self._frame("chat.completion.chunk", []) | {"usage": counts}
        return last + event(told) + LAST

    def _chunk(self, said: dict[str, Any] | str, ended: Ended | None = None) -> bytes:
        choice = self._choice({"delta": said} if self.chat else {"text": said}, ended)
        frame = self._frame("chat.completion.chunk", [choice])
        return event(frame | ({"usage": None} if self.usage else {}))

    def _choice(self, said: dict[str, Any], ended: Ended | None) -> dict[str, Any]:
        why = None if ended is None else str(ended)
        return {"index": 0, **said, "logprobs": None, "finish_reason": why}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.number}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def counts(prompt: int, answer: int) -> dict[str, int]:
    """Return how many tokens were read and generated."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(told: dict[str, Any]) -> bytes:
    """Return an object as a server-sent event."""
    return b"data: " + encoded(told) + b"\n\n"


def encoded(told: dict[str, Any]) -> bytes:
    """Return an object as JSON in ASCII: a message may repeat what is no Unicode."""
    return json.dumps(told, separators=(",", ":")).encode("ascii")


def say(line: str) -> None:
    """Print a line for the person who runs the server; never what is asked or answered."""
    print(line, file=sys.stderr, flush=True)
