"""Questions and published answers: FastChat's schemas, other columns, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftpipe.errors import DataError
from ftpipe.evaluate_config import EvaluateConfig, TextsConfig
from ftpipe.evaluation import questions
from ftpipe.evaluation.questions import Question

TWO = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": ["a", "b"]}
ONE = {"question_id": "x7", "turns": ["Why?"]}


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> TextsConfig:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TextsConfig(path=name)


def read(**sets: TextsConfig) -> list[Question]:
    return questions.read(EvaluateConfig(prompts=sets))


def test_questions_are_read_in_fastchats_schema(empty_folder: Path) -> None:
    found = read(mt=write("mt.jsonl", [TWO]), other=write("other.jsonl", [ONE]))
    assert found == [
        Question("mt", "81", "writing", ("Write.", "Again."), ("a", "b")),
        Question("other", "x7", "all", ("Why?",)),
    ]
    assert [one.key for one in found] == ["mt/81", "other/x7"]


def test_turns_beyond_the_limit_are_not_asked(empty_folder: Path) -> None:
    texts = write("mt.jsonl", [TWO])
    (found,) = questions.read(EvaluateConfig(prompts={"mt": texts}, turns=1))
    assert (found.turns, found.reference) == (("Write.",), ("a",))


def test_other_rows_are_read_by_their_columns(empty_folder: Path) -> None:
    texts = write("rows.jsonl", [{"Instruction": "Sum up.", "then": "Shorter.", "reference": []}] * 2)
    texts.columns = ["Instruction", "then"]
    found = read(mine=texts)
    assert [one.id for one in found] == ["1", "2"]  # their lines
    assert found[0].turns == ("Sum up.", "Shorter.")
    texts.rows = 1
    assert len(read(mine=texts)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": 1}, "no column 'turns'"),
        ({"turns": []}, "a question without a turn"),
        ({"turns": ["Why?", " "]}, "turn 1 is empty"),
        ({"turns": [3]}, "'turns' holds int, not text"),
        ({"turns": ["\ud83d"]}, "half a character"),
    ],
)
def test_a_row_that_is_no_question_is_refused(
    row: dict[str, Any], said: str, empty_folder: Path
) -> None:
    with pytest.raises(DataError) as refused:
        read(mine=write("mine.jsonl", [ONE, row]))
    assert str(refused.value).startswith("mine.jsonl, line 2: ") and said in str(refused.value)


def test_an_id_stands_for_one_question_of_a_set(empty_folder: Path) -> None:
    assert len(read(a=write("a.jsonl", [ONE]), b=write("b.jsonl", [ONE]))) == 2
    with pytest.raises(DataError, match="has question_id x7 twice"):
        read(mine=write("mine.jsonl", [ONE, ONE]))


def test_published_answers_find_their_questions(empty_folder: Path) -> None:
    asked = read(mt=write("mt.jsonl", [TWO]), other=write("other.jsonl", [ONE]))
    texts = write(
        "answers.jsonl",
        [
            {"question_id": 81, "choices": [{"index": 0, "turns": ["First.", "Second.", "Third."]}]},
            {"question_id": 99, "choices": [{"index": 0, "turns": ["To nothing."]}]},
        ],
    )
    found = questions.published("theirs", texts, asked)
    assert found == {("mt/81", 0): "First.", ("mt/81", 1): "Second."}


def test_published_answers_to_other_words_are_not_taken(empty_folder: Path) -> None:
    # ids of two sets may be the same numbers
    asked = read(one=write("one.jsonl", [{"question_id": 1, "turns": ["Why?"]}]))
    rows = [{"question_id": "1", "text": "How?", "generation": "So."}]
    texts = write("answers.jsonl", rows)
    texts.columns = ["generation"]
    with pytest.raises(DataError, match=r"answers none of the questions of evaluate\.prompts"):
        questions.published("theirs", texts, asked)
    texts = write("answers.jsonl", [*rows, {"question_id": "1", "text": "Why?", "generation": "Thus."}])
    texts.columns = ["generation"]
    assert questions.published("theirs", texts, asked) == {("one/1", 0): "Thus."}


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"choices": [{"turns": ["x"]}]}, [], "no column 'question_id'"),
        ({"question_id": "x7", "text": "Why?"}, [], r"it has no choices\[0\].turns"),
        ({"question_id": "x7", "choices": [{"turns": [None]}]}, [], r"it has no choices\[0\].turns"),
        ({"question_id": "x7", "generation": "So."}, ["generations"], "Did you mean 'generation'"),
    ],
)
def test_a_row_that_is_no_answer_is_refused(
    row: dict[str, Any], columns: list[str], said: str, empty_folder: Path
) -> None:
    asked = read(mine=write("mine.jsonl", [ONE]))
    texts = write("answers.jsonl", [row])
    texts.columns = columns
    with pytest.raises(DataError, match=said):
        questions.published("theirs", texts, asked)


def test_the_shipped_questions_hold_what_their_readme_says() -> None:
    found = read(ours=TextsConfig(path="sample:questions.jsonl"))
    assert len(found) == 12
    assert sum(len(one.turns) == 2 for one in found) == 11
    assert sum(bool(one.reference) for one in found) == 5
    assert all(len(one.reference) in (0, len(one.turns)) for one in found)


def test_the_published_sets_and_answers_are_read(shared: Path) -> None:
    # data/README.md of the shared folder counts them
    folder = shared / "data" / "evaluation"
    found = read(
        mt=TextsConfig(path=str(folder / "mt_bench_question.jsonl")),
        vicuna=TextsConfig(path=str(folder / "vicuna_bench_question.jsonl")),
    )
    by_set = {name: [one for one in found if one.set == name] for name in ("mt", "vicuna")}
    assert {name: len(of) for name, of in by_set.items()} == {"mt": 80, "vicuna": 80}
    assert {len(one.turns) for one in by_set["mt"]} == {2}
    assert {len(one.turns) for one in by_set["vicuna"]} == {1}
    path = str(folder / "7b-guanaco-vicuna-generations.jsonl")
    theirs = questions.published("guanaco", TextsConfig(path=path, columns=["generation"]), found)
    assert len(theirs) == 80
    assert {key.split("/")[0] for key, _ in theirs} == {"vicuna"}


def test_a_question_without_an_id_is_answered_only_by_rows_that_repeat_it(empty_folder: Path) -> None:
    numbered = write("rows.jsonl", [{"Instruction": "Sum up."}, {"Instruction": "Why?"}])
    numbered.columns = ["Instruction"]
    asked = read(vicuna=write("vicuna.jsonl", [{"question_id": 1, "turns": ["How?"]}]), mine=numbered)
    answer = [{"index": 0, "turns": ["So."]}]
    fastchat = write("fastchat.jsonl", [{"question_id": at, "choices": answer} for at in (1, 2)])
    assert questions.published("theirs", fastchat, asked) == {("vicuna/1", 0): "So."}
    rows = [{"question_id": 2, "text": "Why?", "choices": answer}]
    assert questions.published("theirs", write("own.jsonl", rows), asked) == {("mine/2", 0): "So."}


def test_a_column_that_holds_the_answers_repeats_no_question(empty_folder: Path) -> None:
    asked = read(vicuna=write("vicuna.jsonl", [{"question_id": 1, "turns": ["How?"]}]))
    # answer_gpt4.jsonl of artidoro/qlora, eval/generations: the answer is in "text"
    for column, said in (("text", "By bus."), ("turns", ["By bus."])):
        texts = write("answers.jsonl", [{"question_id": 1, column: said}])
        texts.columns = [column]
        assert questions.published("gpt4", texts, asked) == {("vicuna/1", 0): "By bus."}


def test_a_refused_question_among_answers_is_passed_over(empty_folder: Path) -> None:
    asked = read(mine=write("mine.jsonl", [{"question_id": at, "turns": ["Why?"]} for at in (1, 2)]))
    refused = {"question_id": 1, "choices": [{"index": 0, "turns": []}], "refused": ["too long"]}
    said = {"question_id": 2, "choices": [{"index": 0, "turns": ["So."]}], "refused": []}
    texts = write("generations.jsonl", [refused, said])
    assert questions.published("before", texts, asked) == {("mine/2", 0): "So."}
    with pytest.raises(DataError, match=r"has no choices\[0\]\.turns"):
        questions.published("before", write("none.jsonl", [refused | {"refused": []}]), asked)
