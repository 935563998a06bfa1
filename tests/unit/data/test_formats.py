"""Each published schema: what becomes a conversation, and what is said about a row that does not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftpipe.choices import COLUMNS as READ
from ftpipe.choices import SERVES, Format, Role, TemplateName, Use
from ftpipe.config import SourceConfig
from ftpipe.data.example import Example, Refused, Turn, flaw
from ftpipe.data.fields import NO_PROMPT, NO_QUESTION
from ftpipe.data.formats import FORMATS, examples
from ftpipe.data.rows import Row, read
from ftpipe.data.templates import render
from ftpipe.errors import ConfigError
from tests.unit.data.toys import bytes_only, repeatable

S, U, A = Role.system, Role.user, Role.assistant
Said = list[tuple[Role, str]]


def convert(
    format: Format, fields: dict[str, Any], flaw: str | None = None, use: Use = Use.demonstrations
) -> Example | Refused:
    source = SourceConfig(format=format, path="rows.json")
    (item,) = examples("mine", source, [Row("rows.json, row 1", fields, flaw, 1)], use)
    return item


def said(item: Example | Refused) -> Said:
    assert isinstance(item, Example), item
    return [(turn.role, turn.text) for turn in item.turns]


def why(format: Format, fields: dict[str, Any], use: Use = Use.demonstrations) -> str:
    item = convert(format, fields, use=use)
    assert isinstance(item, Refused), item
    assert item.where == "rows.json, row 1"
    assert not item.by_rule
    return item.why


def messages(*spoken: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in spoken]}


def sharegpt(*spoken: tuple[str, str]) -> dict[str, Any]:
    return {"id": "1", "conversations": [{"from": role, "value": text} for role, text in spoken]}


ALPACA = {"instruction": "Name it.", "input": "a thing", "output": "It."}
GOOD: list[tuple[Format, dict[str, Any], Said]] = [
    (Format.alpaca, ALPACA, [(U, "Name it.\n\na thing"), (A, "It.")]),
    (Format.alpaca, ALPACA | {"input": ""}, [(U, "Name it."), (A, "It.")]),
    (Format.alpaca, ALPACA | {"input": None}, [(U, "Name it."), (A, "It.")]),
    (Format.alpaca, {"instruction": "Name it.", "output": " It.\n"}, [(U, "Name it."), (A, " It.\n")]),
    (Format.alpaca, ALPACA | {"text": None, "n": 3}, [(U, "Name it.\n\na thing"), (A, "It.")]),
    (
        Format.dolly,
        {"instruction": "Who?", "context": "Ann ran.", "response": "Ann.", "category": "closed_qa"},
        [(U, "Who?\n\nAnn ran."), (A, "Ann.")],
    ),
    (
        Format.dolly,
        {"instruction": "Who?", "context": "", "response": "Ann.", "category": None},
        [(U, "Who?"), (A, "Ann.")],
    ),
    (Format.evol_instruct, {"instruction": "Why?", "output": "So."}, [(U, "Why?"), (A, "So.")]),
    (Format.evol_instruct, ALPACA, [(U, "Name it.\n\na thing"), (A, "It.")]),
    (
        Format.evol_instruct,
        {"idx": "1", **sharegpt(("human", "Why?"), ("gpt", "So."), ("human", "Oh?"), ("gpt", "Yes."))},
        [(U, "Why?"), (A, "So."), (U, "Oh?"), (A, "Yes.")],
    ),
    (
        Format.messages,
        messages(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes.")),
        [(S, "Be brief."), (U, "Hi?"), (A, "Yes.")],
    ),
    (
        Format.messages,
        messages(("user", "Hi?"), ("assistant", "Yes.")) | sharegpt(("human", "Ho?"), ("gpt", "No.")),
        [(U, "Hi?"), (A, "Yes.")],
    ),
    (Format.messages, sharegpt(("human", "Hi?"), ("chatgpt", "Yes.")), [(U, "Hi?"), (A, "Yes.")]),
    (Format.messages, messages(("prompter", "Hi?"), ("bot", "Yes.")), [(U, "Hi?"), (A, "Yes.")]),
    (Format.messages, messages(("human", "Hi?"), ("model", "Yes.")), [(U, "Hi?"), (A, "Yes.")]),
    (
        Format.messages,  # content in parts of text, as chat APIs and LLaMA-Factory have it
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "value": "Yes."}],
                    "loss_weight": 1.0,
                },
            ]
        },
        [(U, "Hi?"), (A, "Yes.")],
    ),
    (Format.sharegpt, sharegpt(("human", "Hi?"), ("gpt", "Yes.")), [(U, "Hi?"), (A, "Yes.")]),
    (
        Format.sharegpt,
        sharegpt(
            ("system", "Be brief."), ("user", "Hi?"), ("bing", "Yes."), ("human", "So?"), ("bard", "No.")
        ),
        [(S, "Be brief."), (U, "Hi?"), (A, "Yes."), (U, "So?"), (A, "No.")],
    ),
    (Format.prompt_completion, {"prompt": "1 + 1 =", "completion": " 2"}, [(U, "1 + 1 ="), (A, " 2")]),
    (
        Format.prompt_completion,  # TRL, "Dataset formats": conversational prompt-completion
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}],
            "completion": [{"role": "assistant", "content": "Yes."}],
        },
        [(S, "Be brief."), (U, "Hi?"), (A, "Yes.")],
    ),
    (Format.guanaco, {"text": "### Human: Hi?### Assistant: Yes."}, [(U, "Hi?"), (A, "Yes.")]),
    (
        Format.guanaco,  # the last prompt has no answer
        {"text": "### Human: Hi?### Assistant: Yes.### Human: And?"},
        [(U, "Hi?"), (A, "Yes.")],
    ),
    (Format.guanaco, {"text": "\n### Human: Hi?### Assistant: Yes."}, [(U, "Hi?"), (A, "Yes.")]),
    (
        Format.guanaco,  # only the space that belongs to the mark is not the turn's
        {"text": "### Human:  Hi?\n\n### Assistant:Yes.\n"},
        [(U, " Hi?\n\n"), (A, "Yes.\n")],
    ),
    (
        Format.guanaco,  # more marks than the format's are text
        {"text": "### Human: #### Assistant of ### Humans:#### Assistant: ### Response: Yes."},
        [(U, "#### Assistant of ### Humans:#"), (A, "### Response: Yes.")],
    ),
]


@pytest.mark.parametrize(("format", "fields", "expected"), GOOD)
def test_a_row_becomes_its_conversation(format: Format, fields: dict[str, Any], expected: Said) -> None:
    item = convert(format, fields)
    assert said(item) == expected
    assert isinstance(item, Example)
    assert (item.source, item.where) == ("mine", "rows.json, row 1")


def test_alpaca_keeps_its_input_apart_for_the_template_that_has_a_place_for_it() -> None:
    item = convert(Format.alpaca, ALPACA)
    assert isinstance(item, Example)
    assert item.turns == (Turn(U, "Name it.", given="a thing"), Turn(A, "It."))


NEEDED = {
    Format.alpaca: ("instruction", "output"),
    Format.dolly: ("instruction", "response"),
    Format.evol_instruct: ("instruction", "output"),
    Format.guanaco: ("text",),
    Format.messages: ("messages",),
    Format.prompt_completion: ("prompt", "completion"),
    Format.sharegpt: ("conversations",),
}
WHOLE: dict[Format, dict[str, Any]] = {
    Format.alpaca: ALPACA,
    Format.dolly: {"instruction": "Who?", "context": "Ann ran.", "response": "Ann."},
    Format.evol_instruct: {"instruction": "Why?", "output": "So."},
    Format.guanaco: {"text": "### Human: Hi?### Assistant: Yes."},
    Format.messages: messages(("user", "Hi?"), ("assistant", "Yes.")),
    Format.prompt_completion: {"prompt": "1 + 1 =", "completion": " 2"},
    Format.sharegpt: sharegpt(("human", "Hi?"), ("gpt", "Yes.")),
}
COLUMNS = [(format, column) for format, columns in NEEDED.items() for column in columns]


def test_every_format_has_its_cases() -> None:
    # the others are those of test_comparisons.py and test_oasst.py
    others = {format for format in Format if SERVES[format] != (Use.demonstrations, Use.prompts)}
    assert set(NEEDED) == set(WHOLE) == set(Format) - others
    assert set(FORMATS) == set(READ) - {Format.oasst} == set(Format) - {Format.oasst}


@pytest.mark.parametrize(("format", "column"), COLUMNS)
def test_a_missing_column_is_named_beside_those_there_are(format: Format, column: str) -> None:
    fields = {key: value for key, value in WHOLE[format].items() if key != column} | {"Output ": 1}
    present = ", ".join(sorted(fields))
    assert why(format, fields) == f"no column '{column}'; it has {present}"
    assert why(format, {}) == f"no column '{NEEDED[format][0]}'; it has none"


@pytest.mark.parametrize(("format", "column"), COLUMNS)
@pytest.mark.parametrize("value", [None, 5, 1.5, True, ["a"], {"a": "b"}])
def test_a_column_of_another_type_is_refused(format: Format, column: str, value: Any) -> None:
    kind = "null" if value is None else type(value).__name__
    expected = f"column '{column}' holds {kind}, not text"
    if column in ("messages", "conversations"):
        by = "role" if isinstance(value, list) else ""
        expected = f"turn 1 has no '{by}'" if by else f"column '{column}' is not a list of turns"
    if format is Format.prompt_completion and isinstance(value, list | dict):
        expected = "turn 1 has no 'role'"
        if column == "prompt" and isinstance(value, dict):
            expected = "column 'prompt' holds dict, not text"
    assert why(format, WHOLE[format] | {column: value}) == expected


def test_an_input_of_another_type_is_refused_though_it_may_be_missing() -> None:
    assert why(Format.alpaca, ALPACA | {"input": 5}) == "column 'input' holds int, not text"


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        (Format.alpaca, ALPACA | {"output": ""}, "empty output"),
        (Format.alpaca, ALPACA | {"output": " \n"}, "empty output"),
        (Format.alpaca, ALPACA | {"instruction": " "}, "turn 1 is empty"),
        (Format.evol_instruct, {"instruction": "", "output": "So."}, "turn 1 is empty"),
        (Format.evol_instruct, {"conversations": []}, "column 'conversations' is not a list of turns"),
        (Format.evol_instruct, {"conversations": None}, "column 'conversations' is not a list of turns"),
        (Format.prompt_completion, {"prompt": "1 + 1 =", "completion": "\t"}, "empty output"),
        (Format.guanaco, {"text": ""}, "no answer at the end"),
        (Format.guanaco, {"text": "### Human: Hi?"}, "no answer at the end"),
        (Format.guanaco, {"text": "### Human: Hi?### Assistant: "}, "empty output"),
        (
            Format.guanaco,
            {"text": "Hi?### Assistant: Yes."},
            "the text does not start with '### Human:'",
        ),
        (Format.guanaco, {"text": "### Assistant: Yes."}, "turn 1 is by the assistant, not by the user"),
        (
            Format.guanaco,
            {"text": "### Human: Hi?### Human: Hi?### Assistant: Yes."},
            "turn 2 is by the user, not by the assistant",
        ),
        (Format.messages, {"messages": []}, "column 'messages' is not a list of turns"),
        (Format.messages, {"messages": {"role": "user"}}, "column 'messages' is not a list of turns"),
        (Format.messages, {"messages": [None]}, "turn 1 has no 'role'"),
        (Format.messages, {"messages": [{"content": "Hi?"}]}, "turn 1 has no 'role'"),
        (Format.messages, {"messages": [{"role": None, "content": "Hi?"}]}, "turn 1 has no 'role'"),
        (Format.messages, {"messages": [{"role": "user"}]}, "turn 1: 'content' holds null, not text"),
        (Format.sharegpt, {"conversations": [{"from": "gpt"}]}, "turn 1: 'value' holds null, not text"),
        (
            Format.messages,
            {"messages": [{"role": "user", "content": None}]},
            "turn 1: 'content' holds null, not text",
        ),
        (
            Format.messages,  # parts that are no text
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "turn 1 holds a part that is no text (image_url)",
        ),
        (
            Format.messages,
            {"messages": [{"role": "user", "content": ["Hi?"]}]},
            "turn 1 holds a part that is no text (str)",
        ),
        (
            Format.messages,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "turn 1 holds a part that is no text (text)",
        ),
        (
            Format.messages,  # a mask of its own, which would be ignored
            {
                "messages": [
                    {"role": "user", "content": "Hi?", "loss_weight": 0.0},
                    {"role": "assistant", "content": "Yes.", "loss_weight": 0.0},
                ]
            },
            "turn 2 has the loss_weight 0.0; only whole roles can be left out (data.learn)",
        ),
        (
            Format.messages,
            {
                "messages": [
                    {"role": "user", "content": "Hi?", "tool_calls": []},
                    {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": "1"}]},
                ]
            },
            "turn 2 has 'tool_calls'; a turn can hold words alone",
        ),
        (
            Format.messages,
            messages(("user", "Hi?"), ("tool", "42")),
            "turn 2 is by 'tool'; known: "
            "system, user, human, prompter, assistant, gpt, bot, chatgpt, bing, bard, model",
        ),
        (Format.messages, messages(("system", "Be brief.")), "no answer at the end"),
        (Format.messages, messages(("system", "Be brief."), ("user", "Hi?")), "no answer at the end"),
        (
            Format.messages,
            messages(("system", "Be brief."), ("assistant", "Yes.")),
            "turn 1 is by the assistant, not by the user",
        ),
        (
            Format.messages,
            messages(("user", "Hi?"), ("system", "Be brief."), ("assistant", "Yes.")),
            "a system turn after the first",
        ),
        (
            Format.messages,
            messages(
                ("system", "Be brief."), ("system", "Be kind."), ("user", "Hi?"), ("assistant", "Yes.")
            ),
            "a system turn after the first",
        ),
        (
            Format.messages,
            messages(("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No.")),
            "turn 3 is by the assistant, not by the user",
        ),
        (
            Format.messages,  # an answer before the last is learned too
            messages(("user", "Hi?"), ("assistant", ""), ("user", "Hm?"), ("assistant", "Yes.")),
            "empty output",
        ),
        (
            Format.messages,
            messages(("user", "Hi?"), ("assistant", "Yes."), ("user", "\n"), ("assistant", "Yes.")),
            "turn 3 is empty",
        ),
        (Format.messages, sharegpt(("human", "Hi?")), "no answer at the end"),
        (
            Format.messages,  # this format has no scraped turns to leave off
            messages(("user", "Hi?"), ("assistant", "Yes."), ("user", "So?")),
            "no answer at the end",
        ),
        (Format.sharegpt, sharegpt(("gpt", "Yes.")), "no answer at the end"),
        (Format.sharegpt, sharegpt(("gpt", "Yes."), ("human", "Hi?")), "no answer at the end"),
        (
            Format.sharegpt,
            sharegpt(("gpt", "A."), ("gpt", "B."), ("human", "Hi?"), ("gpt", "Yes.")),
            "turn 1 is by the assistant, not by the user",
        ),
        (
            Format.sharegpt,
            sharegpt(("human", "Hi?"), ("human", "Hi?"), ("gpt", "Yes.")),
            "turn 2 is by the user, not by the assistant",
        ),
        (Format.sharegpt, sharegpt(("human", "Hi?"), ("gpt", "")), "empty output"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    format: Format, fields: dict[str, Any], expected: str
) -> None:
    assert why(format, fields) == expected


def test_an_empty_conversation_is_no_conversation() -> None:
    assert flaw(()) == "no answer at the end"


@pytest.mark.parametrize(
    ("format", "fields"),
    [
        (Format.alpaca, ALPACA | {"instruction": "Why? \ud83d"}),
        (Format.alpaca, ALPACA | {"input": "\ude00"}),
        (Format.prompt_completion, {"prompt": "1 + 1 =", "completion": " 2\udfff"}),
        (Format.guanaco, {"text": "### Human: Hi?\ud800### Assistant: Yes."}),
        (Format.messages, messages(("system", "\ud83d"), ("user", "Hi?"), ("assistant", "Yes."))),
    ],
)
def test_half_a_character_is_refused(format: Format, fields: dict[str, Any]) -> None:
    # valid JSON, half of an emoji cut in two, but no tokenizer takes it
    assert json.loads(json.dumps(fields)) == fields
    assert why(format, fields) == "the text holds half a character (a lone surrogate)"


def test_two_halves_in_json_are_a_character() -> None:
    fields = json.loads('{"instruction": "Why?", "output": "\\ud83d\\ude00"}')
    assert said(convert(Format.alpaca, fields)) == [(U, "Why?"), (A, "😀")]


def test_a_flaw_of_reading_stays_the_reason() -> None:
    item = convert(Format.alpaca, {}, flaw="not valid JSON")
    assert item == Refused("rows.json, row 1", "not valid JSON", 1)


def group(format: Format, fields: dict[str, Any]) -> str:
    item = convert(format, fields)
    assert isinstance(item, Example)
    return item.group


def test_rows_with_the_same_prompt_are_one_group_whatever_follows() -> None:
    one = group(Format.messages, messages(("user", "Hi?"), ("assistant", "Yes.")))
    assert one == group(Format.alpaca, {"instruction": "Hi?", "output": "No."})
    assert one == group(
        Format.guanaco, {"text": "### Human: Hi?### Assistant: A.### Human: B?### Assistant: C."}
    )
    assert one != group(Format.messages, messages(("user", "Hi!"), ("assistant", "Yes.")))
    assert one != group(Format.alpaca, {"instruction": "Hi?", "input": "Ho?", "output": "No."})


def test_a_system_prompt_that_all_rows_share_makes_no_group_of_them() -> None:
    # else a set with one system prompt would be held out whole, or not at all
    groups = {
        group(
            Format.messages, messages(("system", "Be brief."), ("user", f"{at}?"), ("assistant", "Yes."))
        )
        for at in range(20)
    }
    assert len(groups) == 20


def test_the_same_question_under_two_system_prompts_is_one_group() -> None:
    # its answers say much the same: one of them held out would not be new
    assert (
        len(
            {
                group(
                    Format.messages,
                    messages(("system", system), ("user", "Why?"), ("assistant", system)),
                )
                for system in ("Be brief.", "Be kind.")
            }
        )
        == 1
    )


MARKS = ("### Human:", "### Assistant:")
spoken = bytes_only().texts().filter(lambda found: not any(mark in found for mark in MARKS))


@given(exchanges=st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3))
@repeatable
def test_a_guanaco_row_is_rendered_as_published(exchanges: list[tuple[str, str]]) -> None:
    text = "".join(f"### Human: {user}### Assistant: {answer}" for user, answer in exchanges)
    item = convert(Format.guanaco, {"text": text})
    assert said(item) == [turn for pair in exchanges for turn in zip((U, A), pair, strict=True)]
    assert isinstance(item, Example)
    pieces = render(TemplateName.guanaco, item.turns, bytes_only().tokenizer)
    assert "".join(piece.text for piece in pieces) == text + "<|endoftext|>"


SAMPLES = [
    # samples/README.md counts them
    ("alpaca.json", Format.alpaca, 120),
    ("dolly.jsonl", Format.dolly, 24),
    ("evol_instruct_70k.json", Format.evol_instruct, 40),
    ("evol_instruct_v2.json", Format.evol_instruct, 20),
    ("guanaco.jsonl", Format.guanaco, 40),
    ("hh_rlhf.jsonl", Format.hh_rlhf, 24),
    ("messages.jsonl", Format.messages, 24),
    ("preference.jsonl", Format.preference, 24),
    ("prompt_completion.jsonl", Format.prompt_completion, 24),
    ("prompts.jsonl", Format.prompts, 24),
    ("sharegpt.json", Format.sharegpt, 24),
    ("ultrafeedback.jsonl", Format.ultrafeedback, 24),
    ("ultrafeedback_completions.jsonl", Format.ultrafeedback, 16),
    ("unpaired.jsonl", Format.unpaired, 24),
]


def sample(name: str, format: Format, use: Use) -> list[Example | Refused]:
    source = SourceConfig(format=format, path=f"sample:{name}")
    return list(examples("sample", source, read(source), use))


@pytest.mark.parametrize(("name", "format", "rows"), SAMPLES)
def test_every_row_of_a_shipped_sample_can_be_used_in_every_way(
    name: str, format: Format, rows: int
) -> None:
    for use in SERVES[format]:
        found = sample(name, format, use)
        left_out = [item for item in found if isinstance(item, Refused)]
        pair = use is Use.unpaired and format is not Format.unpaired
        group = pair and name == "ultrafeedback_completions.jsonl"  # four replies each
        # a pair is two replies; of unpaired.jsonl, 13 labels are true
        assert len(found) == (rows * 2 if pair and not group else rows)
        expected = 11 if (format, use) == (Format.unpaired, Use.demonstrations) else rows * group
        assert [item.by_rule for item in left_out] == [True] * expected, left_out


def test_the_new_samples_hold_what_their_readme_says() -> None:
    def made(name: str, format: Format, use: Use) -> list[Example]:
        return [item for item in sample(name, format, use) if isinstance(item, Example)]

    dolly = made("dolly.jsonl", Format.dolly, Use.demonstrations)
    assert sum(bool(item.prompt[0].given) for item in dolly) == 12
    left_off = Counter(
        why
        for item in made("sharegpt.json", Format.sharegpt, Use.demonstrations)
        for why in item.left_off
    )
    assert left_off == {NO_QUESTION: 2, NO_PROMPT: 1}
    hh = made("hh_rlhf.jsonl", Format.hh_rlhf, Use.preferences)
    assert sum(len(item.prompt) > 1 for item in hh) == 4
    pairs = made("ultrafeedback.jsonl", Format.ultrafeedback, Use.preferences)
    assert sum(item.replies[0].score == item.replies[1].score for item in pairs) == 2
    groups = made("ultrafeedback_completions.jsonl", Format.ultrafeedback, Use.preferences)
    assert {len(item.replies) for item in groups} == {4}
    assert sum(len({reply.rank for reply in item.replies}) < 4 for item in groups) == 6
    labels = [item.label for item in made("unpaired.jsonl", Format.unpaired, Use.unpaired)]
    assert (labels.count(True), labels.count(False)) == (13, 11)
    prompts = made("prompts.jsonl", Format.prompts, Use.prompts)
    assert sum(bool(item.reference) for item in prompts) == 21
    assert sum(len(item.prompt) > 1 for item in prompts) == 8


def test_the_samples_hold_what_their_readme_says() -> None:
    inputs = SourceConfig(format=Format.alpaca, path="sample:alpaca.json")
    given = [
        item.turns[0].given
        for item in examples("a", inputs, read(inputs), Use.demonstrations)
        if isinstance(item, Example)
    ]
    assert sum(map(bool, given)) == 53
    chats = SourceConfig(format=Format.messages, path="sample:messages.jsonl")
    kinds = Counter(
        (item.turns[0].role is S, len(item.turns))
        for item in examples("m", chats, read(chats), Use.demonstrations)
        if isinstance(item, Example)
    )
    assert sum(count for (system, _), count in kinds.items() if system) == 8
    assert sum(count for (system, turns), count in kinds.items() if turns - system == 4) == 8


def test_every_shipped_sample_is_tried() -> None:
    import ftpipe.samples

    shipped = {file.name for file in Path(ftpipe.samples.__file__).parent.glob("*.json*")}
    in_test_oasst = {"oasst1.jsonl", "oasst_trees.jsonl"}
    in_test_questions = {"questions.jsonl"}
    assert shipped == {name for name, _, _ in SAMPLES} | in_test_oasst | in_test_questions
    assert set(FORMATS) == {format for _, format, _ in SAMPLES}


def test_real_alpaca_rows_are_refused_only_for_an_empty_answer(shared: Path) -> None:
    path = shared / "data" / "alpaca" / "alpaca_first5000.json"
    empty = [
        at for at, row in enumerate(json.loads(path.read_text()), start=1) if not row["output"].strip()
    ]
    source = SourceConfig(format=Format.alpaca, path=str(path))
    refused = [
        item
        for item in examples("a", source, read(source), Use.demonstrations)
        if isinstance(item, Refused)
    ]
    assert [item.where for item in refused] == [f"{path}, row {at}" for at in empty]
    assert {item.why for item in refused} == {"empty output"}


# The spellings of "no input" among the first 5,000 rows, found by eye, and their counts.
NO_INPUT = {
    **{"Noinput": 19, "<no input>": 13, "No input": 11, "No input.": 8, "No input required.": 6},
    **{"noinput": 5, "`<noinput>`": 5, '"<noinput>"': 4, "NoInput": 4, "No Input": 4, "<No input>": 2},
    **{"No input required": 1, "<noinput": 1},
}


def test_an_input_that_says_there_is_none_is_none(shared: Path) -> None:
    path = shared / "data" / "alpaca" / "alpaca_first5000.json"
    raw = [row["input"] for row in json.loads(path.read_text())]
    assert {said: raw.count(said) for said in NO_INPUT} == NO_INPUT
    source = SourceConfig(format=Format.alpaca, path=str(path))
    given = [
        item.prompt[0].given
        for item in examples("a", source, read(source), Use.prompts)
        if isinstance(item, Example)
    ]
    assert len(given) == len(raw) == 5_000
    changed = Counter(before for before, after in zip(raw, given, strict=True) if before != after)
    assert changed == NO_INPUT


@pytest.mark.parametrize(
    "kept",
    ["<noinput> 8", "N/A", "none", "The input is no input", "no inputs", "Noinput\n\nA poem", "0"],
)
def test_an_input_that_says_more_is_kept(kept: str) -> None:
    item = convert(Format.alpaca, ALPACA | {"input": kept})
    assert isinstance(item, Example)
    assert item.prompt[0].given == kept


def test_real_sharegpt_rows_are_used_as_they_are(shared: Path) -> None:
    path = shared / "data" / "conversations" / "dummy_conversation.json"
    names = {"human": U, "gpt": A}
    raw = [row["conversations"] for row in json.loads(path.read_text())]
    expected = [[(names[turn["from"]], turn["value"]) for turn in row] for row in raw]
    for format in (Format.sharegpt, Format.messages):
        source = SourceConfig(format=format, path=str(path))
        assert [
            said(item) for item in examples("s", source, read(source), Use.demonstrations)
        ] == expected


# --- turns that are left off, and uses ---


def test_turns_that_are_left_off_are_told_of() -> None:
    # FastChat's train.py: "Skip the first one if it is not from human"
    item = convert(
        Format.sharegpt,
        sharegpt(
            ("system", "Be brief."), ("gpt", "..."), ("human", "Hi?"), ("gpt", "Yes."), ("human", "So?")
        ),
    )
    assert said(item) == [(S, "Be brief."), (U, "Hi?"), (A, "Yes.")]
    assert isinstance(item, Example)
    assert item.left_off == (NO_QUESTION, NO_PROMPT)
    item = convert(Format.guanaco, {"text": "### Human: Hi?### Assistant: Yes.### Human: So?"})
    assert isinstance(item, Example)
    assert item.left_off == (NO_PROMPT,)
    item = convert(Format.guanaco, {"text": "### Human: Hi?### Assistant: Yes."})
    assert isinstance(item, Example)
    assert item.left_off == ()


@pytest.mark.parametrize(
    ("format", "fields", "expected"),
    [
        (Format.alpaca, ALPACA | {"output": ""}, [(U, "Name it.\n\na thing")]),  # nobody needs an answer
        (Format.guanaco, {"text": "### Human: Hi?### Assistant: Yes."}, [(U, "Hi?")]),
        (
            Format.guanaco,  # the last prompt is one, answered or not
            {"text": "### Human: Hi?### Assistant: Yes.### Human: So?"},
            [(U, "Hi?"), (A, "Yes."), (U, "So?")],
        ),
        (
            Format.messages,
            messages(("system", "Be brief."), ("user", "Hi?")),
            [(S, "Be brief."), (U, "Hi?")],
        ),
        (Format.sharegpt, sharegpt(("gpt", "..."), ("human", "Hi?")), [(U, "Hi?")]),
        (Format.prompts, {"prompt": "Hi?"}, [(U, "Hi?")]),
        (Format.prompts, {"prompt": messages(("user", "Hi?"))["messages"]}, [(U, "Hi?")]),
    ],
)
def test_a_prompt_is_what_comes_before_the_last_answer(
    format: Format, fields: dict[str, Any], expected: Said
) -> None:
    item = convert(format, fields, use=Use.prompts)
    assert isinstance(item, Example), item
    assert [(turn.role, turn.text) for turn in item.prompt] == expected
    assert item.replies == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": ""}, "turn 1 is empty"),
        ({}, "no column 'prompt'; it has none"),
        ({"prompt": None}, "column 'prompt' holds null, not text"),
        ({"prompt": []}, "column 'prompt' is not a list of turns"),
        (
            {"prompt": messages(("user", "Hi?"), ("assistant", "Yes."))["messages"]},
            "no question at the end",
        ),
        ({"prompt": messages(("system", "Be brief."))["messages"]}, "no question at the end"),
        ({"prompt": "Hi?", "reference": ["4"]}, "column 'reference' holds list, not text or a number"),
        ({"prompt": "Hi?", "reference": True}, "column 'reference' holds bool, not text or a number"),
    ],
)
def test_a_prompt_that_cannot_be_asked_says_why(fields: dict[str, Any], expected: str) -> None:
    assert why(Format.prompts, fields, Use.prompts) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("#### 4", "#### 4"), (4, "4"), (0.5, "0.5"), (None, "")]
)
def test_a_reference_is_text_or_a_number(value: Any, expected: str) -> None:
    item = convert(Format.prompts, {"prompt": "2 + 2?", "reference": value}, use=Use.prompts)
    assert isinstance(item, Example)
    assert item.reference == expected


def test_a_seed_task_is_an_example_for_each_of_its_instances() -> None:
    task = {
        "id": "seed_task_0",
        "instruction": "Double it.",
        "instances": [{"input": "2", "output": "4"}, {"input": "", "output": "?"}],
        "output": "not this one",
        "is_classification": False,
    }
    source = SourceConfig(format=Format.alpaca, path="rows.json")
    found = list(examples("mine", source, [Row("line 1", task, None, 1)], Use.demonstrations))
    assert [said(item) for item in found] == [
        [(U, "Double it.\n\n2"), (A, "4")],
        [(U, "Double it."), (A, "?")],
    ]
    wrongs: list[Any] = [[], "x", [5], {}]
    for wrong in wrongs:
        assert why(Format.alpaca, task | {"instances": wrong}) == (
            "column 'instances' is not a list of inputs and outputs"
        )


# --- columns ---


def mapped(columns: dict[str, str], fields: dict[str, Any]) -> Example | Refused:
    source = SourceConfig(format=Format.prompts, path="rows.json", columns=columns)
    source.check("data.sources.mine")
    (item,) = examples("mine", source, [Row("line 1", fields, None, 1)], Use.prompts)
    return item


def test_columns_have_this_sets_names() -> None:
    row = {"question": "2 + 2?", "answer": "#### 4", "prompt": "another thing"}
    item = mapped({"prompt": "question", "reference": "answer"}, row)
    assert isinstance(item, Example)
    assert (item.prompt[0].content, item.reference) == ("2 + 2?", "#### 4")
    swapped = mapped(
        {"prompt": "reference", "reference": "prompt"}, {"prompt": "4", "reference": "2 + 2?"}
    )
    assert isinstance(swapped, Example)
    assert (swapped.prompt[0].content, swapped.reference) == ("2 + 2?", "4")


def test_a_dot_leads_into_a_column() -> None:
    nested = {"a": {"b": {"q": "Hi?"}}, "a.c": "4"}
    item = mapped({"prompt": "a.b.q", "reference": "a.c"}, nested)
    assert isinstance(item, Example)
    assert (item.prompt[0].content, item.reference) == ("Hi?", "4")


@pytest.mark.parametrize("own", ["question", "a.b", "prompt.text"])
def test_a_mapped_column_that_is_not_there_is_named(own: str) -> None:
    item = mapped({"prompt": own}, {"prompt": "not this one", "a": {"c": "x"}})
    assert isinstance(item, Refused)
    assert item.why == f"no column 'prompt'; it has a (by columns, 'prompt' is its '{own}')"


def test_a_mapped_column_may_be_null() -> None:
    item = mapped({"prompt": "q"}, {"q": None})
    assert isinstance(item, Refused)
    assert item.why == "column 'prompt' holds null, not text"


def test_a_column_that_the_format_has_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        mapped({"promt": "question"}, {})
    assert str(error.value) == (
        "data.sources.mine.columns: the format prompts has no column 'promt'. Did you mean 'prompt'? "
        "Known: prompt, reference."
    )
