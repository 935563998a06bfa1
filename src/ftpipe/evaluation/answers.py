"""Answers of a policy to questions, turn by turn, by the template that it was trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftpipe.choices import Role, TemplateName
from ftpipe.data.encode import encode
from ftpipe.data.example import Turn
from ftpipe.data.prompt import Endings, Template
from ftpipe.data.templates import render
from ftpipe.errors import ConfigError, DataError, UserError
from ftpipe.evaluate_config import EvaluateConfig
from ftpipe.evaluation.questions import Key, Question
from ftpipe.evolve.calls import Call, Endpoint, Journal, Said
from ftpipe.logs import say
from ftpipe.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Given = Mapping[Key, Said]  # what was said, by question and turn


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers as a run's template and tokenizer have them."""

    template: TemplateName
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _written(self) -> Template:
        return Template(self.template, self.tokenizer)

    @property
    def endings(self) -> Endings:
        """What ends an answer.

        Raises:
            ConfigError: if the tokenizer lacks what the template needs.
        """
        return self._written.endings

    def prompt(self, questions: Sequence[str], answers: Sequence[str]) -> str:
        """Return the text up to where the answer to the last question begins.

        Args:
            answers: to all questions but the last. Marks of special tokens in them are left out: they
                would end a turn.

        Raises:
            DataError: if the template does not hold such a conversation, or a question spells out a
                special token.
            ConfigError: if the tokenizer lacks what the template needs.
        """
        turns = self._turns(questions, [*answers, ""])[:-1]
        return self._written.prompt(turns).text

    def whole(self, questions: Sequence[str], answers: Sequence[str]) -> list[int]:
        """Return the tokens of a conversation up to the end of its last answer, with what ends a turn.

        Raises:
            DataError, ConfigError: as ``prompt``.
        """
        pieces = render(self.template, self._turns(questions, answers), self.tokenizer)
        (row,) = encode([pieces], self.tokenizer, {Role.assistant})
        learned = row.learned()
        end = learned[-1][1] if learned else len(row.input_ids)
        return [int(token) for token in row.input_ids[:end]]

    def length(self, text: str) -> int:
        """Return how many tokens a text has by itself."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turns(self, questions: Sequence[str], answers: Sequence[str]) -> list[Turn]:
        special = special_tokens(self.tokenizer)
        turns: list[Turn] = []
        for question, answer in zip(questions, answers, strict=True):
            turns += [Turn(Role.user, question), Turn(Role.assistant, special.sub("", answer))]
        return turns


def check(questions: Sequence[Question], dialogue: Dialogue) -> None:
    """Refuse questions that cannot be asked at all.

    Raises:
        DataError, ConfigError: if a first turn does not fit the template.
    """
    for question in questions:
        try:
            dialogue.prompt(question.turns[:1], [])
        except (DataError, ConfigError) as error:
            raise type(error)(f"{question.key}: {str(error).rstrip('.')}.") from None


def give(
    questions: Sequence[Question],
    dialogue: Dialogue,
    endpoint: Endpoint,
    journal: Journal,
    evaluate: EvaluateConfig,
    seed: int,
) -> dict[Key, Said]:
    """Return the answers of one policy to every turn of every question, in the order of the questions.

    A later turn is asked after the policy's own answers to the ones before. Each draw depends on the
    seed, the question and the turn alone, so what is answered beside it changes nothing. What the
    journal has is not asked again.

    Returns:
        with ``refused`` set where a conversation is longer than the positions of the policy; such a
        question has no later turns. Where the template holds no second turn, none is asked.

    Raises:
        DataError, ConfigError: if a first question does not fit the template.
        Stopped: if it was asked to stop; what has finished is in the journal.
    """
    said: dict[Key, Said] = {}
    for turn in range(evaluate.turns):
        calls: dict[Key, Call] = {}
        unasked: list[UserError] = []
        for question in questions:
            before = [said.get((question.key, at)) for at in range(turn)]
            answers = [one.text for one in before if one is not None and one.refused is None]
            if turn >= len(question.turns) or len(answers) < turn:
                continue
            try:
                text = dialogue.prompt(question.turns[: turn + 1], answers)
            except (DataError, ConfigError) as error:
                if not turn:
                    raise type(error)(f"{question.key}: {str(error).rstrip('.')}.") from None
                unasked.append(error)
                continue
            calls[question.key, turn] = Call(
                prompt=text,
                temperature=evaluate.temperature,
                top_p=evaluate.top_p,
                max_tokens=evaluate.max_new_tokens,
                seed=_seed(seed, question.key, turn) if evaluate.temperature else 0,
            )
        if unasked:
            say(f"{len(unasked):,} questions are not asked turn {turn + 1}: {unasked[0]}")
        keys = sorted(calls, key=lambda key: (-len(calls[key].prompt), key))  # alike in length together
        told = journal.ask(endpoint, [calls[key] for key in keys], f"answers of {endpoint.model}")
        said |= dict(zip(keys, told, strict=True))
    ordered = [(question.key, turn) for question in questions for turn in range(evaluate.turns)]
    return {key: said[key] for key in ordered if key in said}


def _seed(seed: int, question: str, turn: int) -> int:
    """Return the seed of one answer: a number below 2^48, as any JSON can hold."""
    digest = hashlib.sha256(f"{seed}\n{question}\n{turn}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def lines(
    policy: str, questions: Iterable[Question], given: Given, dialogue: Dialogue
) -> list[dict[str, Any]]:
    """Return FastChat's rows of model answers, each with its set, and what of it was cut or refused.

    They can be ``evaluate.answers`` of another run.
    """
    rows = []
    for question in questions:
        told = [given[key] for at in range(len(question.turns)) if (key := (question.key, at)) in given]
        answered = [one for one in told if one.refused is None]
        rows.append(
            {
                "question_id": question.id,
                "set": question.set,
                "category": question.category,
                "model_id": policy,
                "text": question.turns[0],
                "choices": [{"index": 0, "turns": [one.text for one in answered]}],
                "tokens": [dialogue.length(one.text) for one in answered],
                "cut": [one.cut for one in answered],
                "refused": [one.refused for one in told if one.refused is not None],
            }
        )
    return rows
