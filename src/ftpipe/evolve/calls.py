"""Calls to a model: what is asked, what it said, and a journal from which no finished call repeats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from ftpipe import stopping
from ftpipe.artifacts import write_atomic
from ftpipe.logs import progress
from ftpipe.stopping import Stopped

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Call:
    """One question to a model; its answer is a function of these alone, as far as the model allows.

    Attributes:
        prompt: what the user says; there is no system turn.
        temperature: 0 for the likeliest token at every step.
        top_p: of the likeliest tokens, as many as make up this share of the probability.
        max_tokens: length of the answer at most.
        seed: of the draws; 0 where nothing is drawn.
    """

    prompt: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def key(self, model: str) -> str:
        """Return the SHA-256 of the call and of the name of the model that is asked, in hex."""
        facts = json.dumps({"model": model, **asdict(self)}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(facts.encode()).hexdigest()


@dataclass(frozen=True)
class Said:
    """What a model said.

    Attributes:
        text: its words, spaces at both ends removed.
        cut: whether it was still writing at ``max_tokens``.
        refused: why the endpoint would not take this prompt; None where it did.
    """

    text: str
    cut: bool = False
    refused: str | None = None


class Endpoint(Protocol):
    """A model that can be asked: the run's own, or one behind a server.

    Attributes:
        model: its name in the journal.
        together: calls that are computed as one batch. A batch is repeated whole or not at all, since
            who shares a batch decides how its numbers are rounded.
    """

    model: str
    together: int

    def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
        """Yield each call with what the model said, in the order in which they finish."""


class Journal:
    """Finished calls, one JSON line each, written as they finish.

    The end of a line that a kill has torn is dropped, so that its call is asked again. Refusals are
    written once something is answered: where all is refused, it is not the prompts, and what is mended
    by then may answer them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used: dict[str, None] = {}  # keys in the order of their first use
        whole = _whole_lines(path) if path.is_file() else b""
        found = dict(_entries(whole))
        self._answered = any(said.refused is None for said in found.values())
        self._known: dict[str, Said] = found if self._answered else {}
        self._held: list[str] = []  # lines of refusals before the first answer
        self._file = path.open("ab")
        self._file.truncate(len(whole) if self._answered else 0)

    def __len__(self) -> int:
        return len(self._known)

    def ask(self, endpoint: Endpoint, calls: Sequence[Call], what: str) -> list[Said]:
        """Return what the model says to each call, from the journal where it has said it already.

        Raises:
            UserError: if the endpoint cannot be used; what has finished by then is in the journal.
            Stopped: if it was asked to stop; as above.
        """
        keys = [call.key(endpoint.model) for call in calls]
        self._used |= dict.fromkeys(keys)
        unique = list(dict(zip(keys, calls, strict=True)).items())
        waiting: list[Call] = []
        for start in range(0, len(unique), endpoint.together):
            batch = unique[start : start + endpoint.together]
            if any(key not in self._known for key, _ in batch):
                waiting += [call for _, call in batch]
        for call, said in progress(endpoint.complete(waiting), what, len(waiting)):
            self._add(call.key(endpoint.model), said)
            if stopping.asked():
                raise Stopped(f"with {len(self):,} calls in its journal")
        return [self._known[key] for key in keys]

    def _add(self, key: str, said: Said) -> None:
        if key not in self._known:
            self._known[key] = said
            self._held.append(_line(key, said))
            self._answered = self._answered or said.refused is None
            if self._answered:
                self._file.write("".join(self._held).encode())
                self._file.flush()
                self._held.clear()

    def close(self) -> None:
        self._file.close()

    def settle(self) -> None:
        """Rewrite the journal in the order of use: when which call finished leaves no trace in it."""
        self._file.close()
        write_atomic(self._path, "".join(_line(key, self._known[key]) for key in self._used))


def _entries(journal: bytes) -> Iterator[tuple[str, Said]]:
    """Yield the calls of a journal; a damaged line is passed over, so that its call is asked again."""
    for line in journal.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        match entry:
            case {
                "key": str(key),
                "text": str(text),
                "cut": bool(cut),
                "refused": str() | None as refused,
            }:
                yield key, Said(text, cut, refused)


def _line(key: str, said: Said) -> str:
    return json.dumps({"key": key, **asdict(said)}) + "\n"


def _whole_lines(path: Path) -> bytes:
    text = path.read_bytes()
    return text[: text.rfind(b"\n") + 1]
