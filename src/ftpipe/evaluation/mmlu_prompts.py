"""MMLU's questions as texts: hendrycks' tables with examples before each, or QLoRA's ready prompts.

The prompts are those of hendrycks/test (evaluate.py: ``gen_prompt``, ``format_example``), the categories
those of its categories.py. Cells are read as the text that they hold; pandas, which is used there, shows
a cell "None" as "nan" and rewrites some numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpipe.benchmark_config import MMLU_SHOTS, MMLU_SPLIT, MmluConfig
from ftpipe.config import SourceConfig
from ftpipe.data import rows
from ftpipe.data.evalsets import mmlu_tables
from ftpipe.errors import ConfigError, DataError, unknown
from ftpipe.pins import exists

LETTERS = ("A", "B", "C", "D")
DEV = "dev"  # the split of the examples

# hendrycks/test, categories.py. lm-evaluation-harness counts anatomy as STEM.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "stem": (
        *("abstract_algebra", "astronomy", "college_biology", "college_chemistry"),
        *("college_computer_science", "college_mathematics", "college_physics", "computer_security"),
        *("conceptual_physics", "electrical_engineering", "elementary_mathematics"),
        *("high_school_biology", "high_school_chemistry", "high_school_computer_science"),
        *("high_school_mathematics", "high_school_physics", "high_school_statistics"),
        "machine_learning",
    ),
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history"),
        *("high_school_world_history", "international_law", "jurisprudence", "logical_fallacies"),
        *("moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law"),
        "world_religions",
    ),
    "social_sciences": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics"),
        *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology"),
        *("human_sexuality", "professional_psychology", "public_relations", "security_studies"),
        *("sociology", "us_foreign_policy"),
    ),
    "other": (
        *("anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts"),
        *("human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition"),
        *("professional_accounting", "professional_medicine", "virology"),
    ),
}


@dataclass(frozen=True)
class Question:
    """A question and the texts before it.

    Attributes:
        where: file and row.
        asked: question and options, up to ``Answer:``; of a ready prompt all of it.
        answer: index of the right letter.
        header: what comes before the examples, empty of a ready prompt.
        examples: answered questions that come before it, the first one first.
    """

    where: str
    subject: str
    asked: str
    answer: int
    header: str = ""
    examples: tuple[str, ...] = ()

    def prompt(self, shots: int) -> str:
        """Return its prompt with only the first so many examples, as evaluate.py leaves them out."""
        return self.header + "".join(self.examples[:shots]) + self.asked


def questions(mmlu: MmluConfig) -> list[Question]:
    """Return the questions to ask, by subject in the order of their names.

    Raises:
        DataError: if a file or a row cannot be used, or a subject has too few examples.
        ConfigError: for a subject that is not there.
    """
    assert mmlu.path is not None
    file = Path(mmlu.path)
    if not exists(file):
        raise DataError(f"no file {file} (evaluate.mmlu.path); it was looked for from {Path.cwd()}.")
    found = _ready(mmlu, file) if mmlu.ready_prompts() else _from_tables(mmlu, file)
    by_subject = {
        subject: list(group) for subject, group in itertools.groupby(found, lambda one: one.subject)
    }
    if not by_subject:
        raise DataError(f"evaluate.mmlu.path={file} holds no question.")
    for subject in mmlu.subjects:
        if subject not in by_subject:
            raise ConfigError(f"evaluate.mmlu.subjects: {unknown('subject', subject, by_subject)}")
    wanted = mmlu.subjects or list(by_subject)
    return [
        one for subject in by_subject if subject in wanted for one in by_subject[subject][: mmlu.limit]
    ]


def _from_tables(mmlu: MmluConfig, file: Path) -> list[Question]:
    shots = MMLU_SHOTS if mmlu.shots is None else mmlu.shots
    examples: dict[str, list[str]] = {}
    for where, fields in mmlu_tables("evaluate.mmlu", file, DEV) if shots else ():
        example = f"{_asked(fields)} {LETTERS[_answer(where, fields['answer'])]}\n\n"
        examples.setdefault(fields["subject"], []).append(example)
    found = []
    for where, fields in mmlu_tables("evaluate.mmlu", file, mmlu.split or MMLU_SPLIT):
        subject = fields["subject"]
        if len(before := examples.get(subject, [])) < shots:
            raise DataError(
                f"evaluate.mmlu.shots={shots}, but the split {DEV} has {len(before)} examples of "
                f"{subject}."
            )
        answer = _answer(where, fields["answer"])
        asked = _asked(fields)
        found.append(Question(where, subject, asked, answer, header(subject), tuple(before[:shots])))
    return found


def header(subject: str) -> str:
    """Return the first line of a prompt. It has two spaces before the subject, as in evaluate.py."""
    words = "".join(f" {word}" for word in subject.split("_"))
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


def _asked(fields: Mapping[str, Any]) -> str:
    options = "".join(f"\n{letter}. {fields[letter]}" for letter in LETTERS)
    return f"{fields['question']}{options}\nAnswer:"


def _ready(mmlu: MmluConfig, file: Path) -> list[Question]:
    """Return rows of whole prompts, as artidoro/qlora's, sorted by subject, else in their order."""
    found = []
    for row in rows.read(SourceConfig(path=str(mmlu.path))):
        if row.flaw:
            raise DataError(f"{row.where}: {row.flaw}.")
        for column in ("subject", "input", "output"):
            if not isinstance(row.fields.get(column), str):
                raise DataError(
                    f"{row.where} has no text '{column}'; rows of ready prompts for evaluate.mmlu.path "
                    "hold subject, input (a prompt) and output (a letter)."
                )
        answer = _answer(row.where, row.fields["output"])
        found.append(Question(row.where, row.fields["subject"], row.fields["input"], answer))
    return sorted(found, key=lambda one: one.subject)


def _answer(where: str, letter: str) -> int:
    if letter.strip() not in LETTERS:
        raise DataError(f"{where}: the answer is '{letter}', not one of {', '.join(LETTERS)}.")
    return LETTERS.index(letter.strip())


def category(subject: str) -> str | None:
    """Return which of the four categories a subject is in; None of one that is not MMLU's."""
    return next((name for name, subjects in CATEGORIES.items() if subject in subjects), None)


def known_categories(subjects: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """Return the subjects of each category that has any."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        if (name := category(subject)) is not None:
            found.setdefault(name, []).append(subject)
    return found
