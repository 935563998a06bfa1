"""Questions to be answered, and published answers to them, in FastChat's schemas or by named columns.

A set of questions is FastChat's ``question.jsonl`` (MT-bench, Vicuna): ``question_id, category,
turns[]`` and, for some, ``reference[]``. Or any rows whose ``columns`` hold the turns. Published answers
are FastChat's model answers (``question_id, choices[].turns[]``), or rows with a ``question_id`` whose
``columns`` hold the answers to the turns; QLoRA's generations have ``columns: [generation]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftpipe.choices import Role
from ftpipe.config import SourceConfig
from ftpipe.data import rows
from ftpipe.data.example import Turn, flaw
from ftpipe.errors import DataError, unknown
from ftpipe.evaluate_config import EvaluateConfig, TextsConfig
from ftpipe.logs import say

ALL = "all"  # the category of rows that name none


@dataclass(frozen=True)
class Question:
    """A question of one or several turns.

    Attributes:
        set: the name of its set in the configuration.
        id: as its set has it, or the number of its row.
        reference: known answers to the turns; empty where there are none.
        numbered: whether the id is the number of its row.
    """

    set: str
    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def key(self) -> str:
        return f"{self.set}/{self.id}"


Key = tuple[str, int]  # of a question, and which turn of it
Answers = Mapping[Key, str]


def read(evaluate: EvaluateConfig) -> list[Question]:
    """Return the questions of all sets, in their order, each with ``evaluate.turns`` turns at most.

    Raises:
        DataError: if a row is no question, or an id comes twice in a set.
    """
    found: dict[str, Question] = {}
    for name, texts in evaluate.prompts.items():
        for where, number, fields in _rows(texts):
            turns = _turns(where, fields, texts.columns or ["turns"])[: evaluate.turns]
            why = _flaw(turns)
            if why is not None:
                raise DataError(f"{where}: {why}.")
            reference = tuple(_listed(where, fields, "reference")) if fields.get("reference") else ()
            own = fields.get("question_id")
            question = Question(
                set=name,
                id=str(number if own is None else own),
                category=str(fields.get("category") or ALL),
                turns=turns,
                reference=reference[: len(turns)] if len(reference) >= len(turns) else (),
                numbered=own is None,
            )
            if question.key in found:
                raise DataError(f"{where}: evaluate.prompts.{name} has question_id {question.id} twice.")
            found[question.key] = question
    return list(found.values())


def published(name: str, texts: TextsConfig, questions: Sequence[Question]) -> dict[Key, str]:
    """Return published answers to the questions, by question and turn.

    An answer belongs to the questions that have its ``question_id``; where its row repeats the question
    (``text`` or ``turns``, unless it is a column of the answers), that must be the same. A question that
    has no id but the number of its row is answered only by rows that repeat it.

    Raises:
        DataError: if a row is no answer, or no question is answered.
    """
    by_id: dict[str, list[Question]] = {}
    for question in questions:
        by_id.setdefault(question.id, []).append(question)
    found: dict[Key, str] = {}
    for where, _, fields in _rows(texts):
        if "question_id" not in fields:
            raise DataError(f"{where}: {unknown('column', 'question_id', fields)}")
        answers = _answers(where, fields, texts.columns)
        asked = _asked(fields, texts.columns)
        for question in by_id.get(str(fields["question_id"]), []):
            if asked == question.turns[0] or (asked is None and not question.numbered):
                kept = enumerate(answers[: len(question.turns)])
                found |= {(question.key, turn): text for turn, text in kept}
    if not found:
        raise DataError(
            f"evaluate.answers.{name}.path={texts.path} answers none of the questions of "
            f"evaluate.prompts ({', '.join(dict.fromkeys(one.set for one in questions))}): no "
            "question_id is the same, with the same words."
        )
    answered = len({key for key, _ in found})
    say(f"{name}: published answers to {answered:,} of {len(questions):,} questions")
    return found


def _asked(fields: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """Return the question that a row with an answer repeats, or None."""
    text, turns = (None if name in columns else fields.get(name) for name in ("text", "turns"))
    return text or (turns[0] if isinstance(turns, list) and turns else None)


def _rows(texts: TextsConfig) -> Iterator[tuple[str, int, dict[str, Any]]]:
    source = SourceConfig(
        path=texts.path,
        revision=texts.revision,
        split=texts.split,
        file=texts.file,
        rows=texts.rows,
    )
    for row in rows.read(source):
        if row.flaw is not None:
            raise DataError(f"{row.where}: {row.flaw}.")
        yield row.where, row.number, row.fields


def _turns(where: str, fields: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for column in columns for text in _listed(where, fields, column))


def _answers(where: str, fields: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    if columns:
        return _turns(where, fields, columns)
    match fields.get("choices"):
        case [{"turns": [*turns]}, *_] if turns and all(isinstance(text, str) for text in turns):
            return tuple(turns)
        case [{"turns": []}, *_] if fields.get("refused"):  # as evaluate writes what was not answered
            return ()
    raise DataError(
        f"{where}: it has no choices[0].turns, as FastChat's answers have; name the columns that hold "
        "the answers (evaluate.answers.NAME.columns)."
    )


def _listed(where: str, fields: Mapping[str, Any], column: str) -> list[str]:
    """Return the texts of a column: one, or a list of them."""
    if column not in fields:
        raise DataError(f"{where}: {unknown('column', column, fields)}")
    value = fields[column]
    found = value if isinstance(value, list) else [value]
    for text in found:
        if not isinstance(text, str):
            raise DataError(f"{where}: '{column}' holds {type(text).__name__}, not text.")
    return found


def _flaw(turns: Sequence[str]) -> str | None:
    """Return why these turns cannot be asked, or None."""
    if not turns:
        return "a question without a turn"
    for text in turns:
        why = flaw((Turn(Role.user, text),), Role.user)
        if why is not None:
            return why
    return None
