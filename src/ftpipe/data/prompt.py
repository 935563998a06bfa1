"""A conversation as the prompt that the policy was trained on, and what ends the answer to it.

Prompts are rendered by the code that ``prepare`` renders rows with, so no second rendering can differ
from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ftpipe.choices import Role, TemplateName
from ftpipe.data.encode import encode
from ftpipe.data.example import SURROGATE, Turn
from ftpipe.data.pieces import Pieces, final_reply
from ftpipe.data.templates import render
from ftpipe.errors import DataError, UserError
from ftpipe.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What turns say where only the text around them matters: no template has these in its own words.
ASKED, SAID, ASKED_ON, SAID_ON = "70291", "81302", "92413", "13524"


@dataclass(frozen=True)
class Prompt:
    """A text that an answer follows.

    Attributes:
        ids: its tokens.
        lead: what a template puts before an answer's first word, which the policy says itself.
    """

    text: str
    ids: tuple[int, ...]
    lead: str = ""


@dataclass(frozen=True)
class Endings:
    """What ends an answer.

    Attributes:
        tokens: special tokens: eos, and the template's end of turn.
        texts: marks that are ordinary text to the tokenizer, such as ``### Human:``.
        trail: white space that a template puts between an answer and its end.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()
    trail: str = ""


class Template:
    """How turns are written for one policy.

    Args:
        name: ``tokenizer`` for the tokenizer's own chat template.

    Raises:
        ConfigError: if the tokenizer has no chat template, or lacks what the named one needs.
    """

    def __init__(self, name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self.prompt([Turn(Role.user, ASKED)])  # refuse early

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """Return the prompt of a conversation that ends with the user.

        Raises:
            DataError: if the conversation does not fit the template, or a turn cannot be written.
        """
        for turn in turns:
            found = self._special.search(turn.text)
            if found:  # it would end its own turn; rows that hold one are refused as well
                raise DataError(f"the text holds the special token '{found.group()}'")
            if SURROGATE.search(turn.text):
                raise DataError("the text holds half a character (a lone surrogate)")
        # a prompt is what comes before some answer; its words do not matter
        pieces = self._render([*turns, Turn(Role.assistant, SAID)])
        at = final_reply(pieces)
        (encoded,) = encode([pieces[:at]], self._tokenizer, ())
        lead = _text(pieces[at:]).partition(SAID)[0]
        return Prompt(_text(pieces[:at]), tuple(encoded.input_ids.tolist()), lead)

    def accepts(self, turns: Sequence[Turn]) -> str | None:
        """Return why the template cannot write a conversation, or None."""
        try:
            self.prompt(turns)
        except UserError as error:  # a chat template may fail on one conversation alone
            return str(error).rstrip(".")
        return None

    @cached_property
    def remembers(self) -> bool:
        """Whether a conversation can have more than one exchange."""
        asked = [Turn(Role.user, ASKED), Turn(Role.assistant, SAID), Turn(Role.user, ASKED_ON)]
        return self.accepts(asked) is None

    @cached_property
    def endings(self) -> Endings:
        """What ends an answer: what the template puts after the last one, and before a next turn."""
        exchange = [Turn(Role.user, ASKED), Turn(Role.assistant, SAID)]
        after = [_text(self._render(exchange)).partition(SAID)[2]]
        if self.remembers:
            whole = [*exchange, Turn(Role.user, ASKED_ON), Turn(Role.assistant, SAID_ON)]
            after.append(_text(self._render(whole)).partition(SAID)[2].partition(ASKED_ON)[0])
        tokens, texts, trails = set[int](), list[str](), list[str]()
        if self._tokenizer.eos_token_id is not None:
            tokens.add(self._tokenizer.eos_token_id)
        for tail in after:
            mark = tail.lstrip()
            special = self._special.match(mark)
            if special:
                tokens.add(self._tokenizer.get_vocab()[special.group()])
                trails.append(tail[: len(tail) - len(mark)])
            else:
                later = self._special.search(tail)
                texts.append(tail[: later.start() if later else None].rstrip())
        texts = sorted({text for text in texts if text}, key=len)
        shortest = [
            text
            for at, text in enumerate(texts)
            if not any(text.startswith(other) for other in texts[:at])
        ]
        return Endings(frozenset(tokens), tuple(shortest), max(trails, key=len, default=""))

    def _render(self, turns: Sequence[Turn]) -> Pieces:
        return render(self.name, turns, self._tokenizer)


def _text(pieces: Pieces) -> str:
    return "".join(piece.text for piece in pieces)
