"""A tokenizer's own chat template: render a conversation and find its turns in what comes out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ftpipe.choices import Role
from ftpipe.data.example import Turn
from ftpipe.data.pieces import Piece, Pieces
from ftpipe.errors import ConfigError, DataError
from ftpipe.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HIDDEN = (
    "the tokenizer's chat template does not show the words of every turn as they are; "
    "choose a template by name."
)
MARK = "\x00words\x00"  # stands for a turn's words, to see where a chat template puts them
# What a template that asks for the date is told, so that the same rows give the same text on every day:
# the one that Llama 3.2's template falls back to where there is no clock.
DAY = datetime(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
KEPT = 256  # skeletons of one tokenizer: one for each sequence of roles, so for each length

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Skeleton:
    """What a chat template puts around the words of a sequence of roles.

    Attributes:
        around: the text before each turn's words, and after the last.
        ends: how many characters after each turn's words end the turn: up to the end of its first
            special token; 0 where it has none.
    """

    around: tuple[str, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a template renders around one answer.

    Attributes:
        at: which turn it is.
        before: the conversation before it, with the generation prompt.
        upto: the conversation that ends with it.
    """

    at: int
    before: str
    upto: str


# Of each tokenizer, under what decides them; None where a template shows no skeleton.
_skeletons: WeakKeyDictionary[Any, dict[Any, Skeleton | None]] = WeakKeyDictionary()


def by_tokenizer(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Render with the tokenizer's own chat template and find the turns in what comes out.

    An answer is what the template adds between the generation prompt before it and the next turn.
    That needs no ``{% generation %}`` marks, which most templates lack. What follows the end-of-turn
    token (a newline, usually) is scaffolding: generation has stopped by then.

    Raises:
        ConfigError: if there is no chat template, or it rewrites or hides what a turn says.
        DataError: if the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.template=tokenizer, but the tokenizer has no chat template; "
            "choose one by name, such as data.template=chatml."
        )
    chat = [{"role": str(turn.role), "content": turn.text} for turn in turns]
    answers = [at for at, turn in enumerate(turns) if turn.role is Role.assistant]
    whole, *uptos = _apply(tokenizer, [chat, *(chat[: at + 1] for at in answers if at + 1 < len(chat))])
    if len(uptos) < len(answers):
        uptos.append(whole)  # it ends with an answer
    befores = _apply(tokenizer, [chat[:at] for at in answers], prompt=True)
    shown = [Answer(at, before, upto) for at, before, upto in zip(answers, befores, uptos, strict=True)]
    for answer in shown:
        if not whole.startswith(answer.before):
            raise _rewritten(answer)
    pieces = _by_skeleton(whole, turns, shown, _skeleton(tokenizer, turns))
    if pieces is None:
        pieces = _by_search(tokenizer, whole, chat, turns, shown)
    return [piece for piece in pieces if piece.text]


def _rewritten(answer: Answer) -> ConfigError:
    return ConfigError(
        "the tokenizer's chat template renders a turn differently once others follow, so what is "
        f"learned cannot be told (turn {answer.at + 1}); choose a template by name."
    )


def _by_skeleton(
    whole: str, turns: Sequence[Turn], answers: Sequence[Answer], skeleton: Skeleton | None
) -> Pieces | None:
    """Cut a text that is a skeleton and the turns' words; None where it is not exactly that."""
    if skeleton is None or not answers:
        return None
    said = [turn.text for turn in turns]
    trimmed = [text.strip() for text in said]
    words = next((texts for texts in (said, trimmed) if _fill(skeleton, texts) == whole), None)
    if words is None:
        return None
    shown = {answer.at: answer for answer in answers}
    pieces: Pieces = []
    done = at = 0
    for number, turn in enumerate(turns[: answers[-1].at + 1]):  # what follows is nobody's
        opening = at + len(skeleton.around[number])
        closing = opening + len(words[number])
        end = closing + skeleton.ends[number]
        answer = shown.get(number)
        begin = len(answer.before) if answer else opening
        if not done <= begin <= opening or (answer and end == closing):
            return None  # an answer without an end, or one that begins before the turn before it ends
        if answer and not answer.upto.startswith(whole[:end]):
            raise _rewritten(answer)
        pieces += [Piece(whole[done:begin]), Piece(whole[begin:end], turn.role)]
        done, at = end, closing
    return [*pieces, Piece(whole[done:])]


def _fill(skeleton: Skeleton, words: Sequence[str]) -> str:
    parts = [part for pair in zip(skeleton.around, words, strict=False) for part in pair]
    return "".join([*parts, skeleton.around[-1]])


def _skeleton(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> Skeleton | None:
    """Return what the template puts around these roles, learned once."""
    kept = _skeletons.setdefault(tokenizer, {})
    roles = tuple(turn.role for turn in turns)
    # added tokens and other names for them change where a turn ends
    under = (str(tokenizer.chat_template), len(tokenizer), *tokenizer.all_special_tokens, roles)
    if under not in kept:
        if len(kept) >= KEPT:
            kept.clear()
        kept[under] = _learn(tokenizer, roles)
    return kept[under]


def _learn(tokenizer: PreTrainedTokenizerBase, roles: Sequence[Role]) -> Skeleton | None:
    marks = [f"\x00{at}{MARK}" for at in range(len(roles))]
    chat = [{"role": str(role), "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        (whole,) = _apply(tokenizer, [chat])
    except DataError:
        return None  # it refuses these marks; whether it refuses real words, it will say of them
    around, rest = [], whole
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or MARK in before:
            return None
        around.append(before)
    if MARK in rest:
        return None
    around.append(rest)
    special = special_tokens(tokenizer)
    ends, at = [], 0
    for before, mark, after, upto in zip(
        around, marks, around[1:], _uptos(tokenizer, whole, chat), strict=False
    ):
        at += len(before) + len(mark)
        end = special.search(after, 0, max(0, upto - at))
        ends.append(end.end() if end else 0)
    return Skeleton(tuple(around), tuple(ends))


def _uptos(tokenizer: PreTrainedTokenizerBase, whole: str, chat: Chat) -> list[int]:
    """Return how many characters a conversation has up to the end of each turn.

    What comes after is the next turn's opening, and the special token there ends no turn. A template
    that refuses a conversation cut there (Llama 2's, after the system turn) shows no such end.
    """
    lengths = []
    for at in range(len(chat)):
        try:
            (upto,) = _apply(tokenizer, [chat[: at + 1]])
        except DataError:
            upto = ""
        lengths.append(len(commonprefix([whole, upto])))  # noqa: RUF071  these are no paths
    return lengths


def _by_search(
    tokenizer: PreTrainedTokenizerBase,
    whole: str,
    chat: Chat,
    turns: Sequence[Turn],
    answers: Sequence[Answer],
) -> Pieces:
    """Find the turns up to the last answer, one answer after another, where a template rewrites them."""
    special, limits = special_tokens(tokenizer), _uptos(tokenizer, whole, chat)
    pieces: Pieces = []
    done = first = 0  # characters and turns up to the last answer
    for shown in answers:
        at, before = shown.at, shown.before
        marked = chat[:first] + [{**message, "content": MARK} for message in chat[first:at]]
        (form,) = _apply(tokenizer, [marked], prompt=True)
        within = [limit - done for limit in limits[first:at]]
        pieces += _find_turns(before[done:], form[done:], turns[first:at], within, special)
        answer, words = shown.upto[len(before) :], turns[at].text.strip()
        if words not in answer:
            raise ConfigError(HIDDEN)
        end = special.search(answer, answer.index(words) + len(words))
        if end is None:
            raise ConfigError(
                "the tokenizer's chat template ends an answer with no special token, so the model could "
                "not learn to stop; choose a template by name."
            )
        pieces.append(Piece(answer[: end.end()], Role.assistant))
        done, first = len(before) + end.end(), at + 1
        if not whole.startswith(shown.upto[:done]):
            raise _rewritten(shown)
    return [*pieces, Piece(whole[done:])]


def _find_turns(
    text: str, form: str, turns: Sequence[Turn], limits: Sequence[int], special: re.Pattern[str]
) -> Pieces:
    """Cut the text before an answer into scaffolding and the turns it shows, in order.

    Args:
        form: the same text with MARK in place of each turn's words, which alone may be found in the
            scaffolding too ("user", say).
        limits: where in the text each turn ends at the latest.
    """
    opening, *closings = form.split(MARK)
    if len(closings) != len(turns):
        raise ConfigError(HIDDEN)
    pieces, rest = [Piece(opening)], text.removeprefix(opening)
    for turn, after, limit in zip(turns, closings, limits, strict=True):
        said = turn.text
        trimmed = (said, said.rstrip(), said.lstrip(), said.strip())
        words = next((words for words in trimmed if rest.startswith(words + after)), None)
        if words is None:
            raise ConfigError(HIDDEN)
        at = len(text) - len(rest) + len(words)
        rest = rest.removeprefix(words + after)
        end = special.search(after, 0, max(0, limit - at))
        cut = end.end() if end else 0
        pieces += [Piece(words + after[:cut], turn.role), Piece(after[cut:])]
    if rest:
        raise ConfigError(HIDDEN)
    return pieces


@lru_cache
def on_one_day(template: str) -> str:
    """Return a chat template with a date in place of each call that asks for today's.

    Raises:
        ConfigError: if it asks in a way that cannot be told from its text.
    """
    dated = CLOCK.sub(lambda call: repr(DAY.strftime(call.group(2))), template)
    if "strftime_now(" in dated:
        raise ConfigError(
            "the tokenizer's chat template puts the time of day into the text, so the same rows would "
            "give another text each time; choose a template by name."
        )
    return dated


def _apply(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], prompt: bool = False) -> list[str]:
    """Render conversations, all at once; an empty one is no text."""
    full = [chat for chat in chats if chat]
    if not full:
        return ["" for _ in chats]
    options: dict[str, Any] = {
        "tokenize": False,
        "add_generation_prompt": prompt,
        "chat_template": on_one_day(str(tokenizer.chat_template)),
    }
    try:
        rendered = iter(tokenizer.apply_chat_template(full, **options))
    except Exception as error:  # whatever a template raises: jinja2's errors share no useful base
        raise DataError(f"the chat template refuses it: {error}") from None
    return [str(next(rendered)) if chat else "" for chat in chats]
