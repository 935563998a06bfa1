"""Tokens become text as they come: no half character, no half stop string, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what stands for bytes that are no whole character
CONTEXT = 6  # tokens of the prompt that an answer's first one is read with


class Decoder:
    """Reads tokens one by one, each with some before it.

    A token's text depends on what stands before: SentencePiece drops a leading space, and a character
    may be spread over several tokens. So the text of a few tokens is compared with that of the same
    ones and the new one, as text-generation-inference and vLLM do.

    Args:
        before: the tokens of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-CONTEXT:])
        self._start = 0  # of the tokens that are read together
        self._read = len(self._ids)  # whose text was given

    def add(self, token: int) -> str:
        """Return the text that a token adds, nothing while it is half a character."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(HALF):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text

    def rest(self) -> str:
        """Return what is left at the end: half characters, as they are."""
        text = self._new()
        self._read = len(self._ids)
        return text

    def _new(self) -> str:
        known = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class Answer:
    """Text that may end in the middle: at a stop string, which is no part of it.

    What may be the beginning of one is held back until it is known. So is white space that may turn out
    to belong to the end.

    Args:
        stops: texts that end it.
        lead: what it begins with that is not its own, if it does.
        trail: what it ends with before the end of its turn that is not its own, if it does.
    """

    def __init__(self, stops: Sequence[str], lead: str = "", trail: str = "") -> None:
        self._stops = stops
        self._lead = lead
        self._trail = trail
        self._held = ""
        self._begun = not lead
        self.stopped = False

    def add(self, text: str) -> str:
        """Return what can be shown by now; after a stop string, nothing more."""
        if self.stopped:
            return ""
        self._held += text
        if not self._begun:
            if len(self._held) < len(self._lead) and self._lead.startswith(self._held):
                return ""
            self._held = self._held.removeprefix(self._lead)
            self._begun = True
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, at = min(found)  # the first that is whole, whatever else has begun by then
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._open()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def end(self, turn_ended: bool) -> str:
        """Return what was held back.

        Args:
            turn_ended: the policy said that it was done, so white space before that is not the answer's.
        """
        held, self._held = self._held, ""
        if self.stopped:
            return ""
        if not self._begun:
            held = held.removeprefix(self._lead)
        return held.removesuffix(self._trail) if turn_ended else held

    def _open(self) -> int:
        """Return how many characters at the end may be the beginning of what is not to be shown."""
        longest = max([0, len(self._trail), *(len(stop) - 1 for stop in self._stops)])
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if self._trail.startswith(end) or any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
