"""A chat with a model that says what is wanted: commands, history, pipes, Ctrl-C."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftpipe.choices import Device, Ended, Format, Role, TemplateName, Use
from ftpipe.config import SourceConfig
from ftpipe.data import rows
from ftpipe.data.example import Example, Turn
from ftpipe.data.formats import examples
from ftpipe.data.prompt import Template
from ftpipe.errors import ConfigError, DataError
from ftpipe.serving import verb
from ftpipe.serving.chat import Chat, Screen, piped
from ftpipe.serving.engine import Engine
from ftpipe.serving.load import Voice
from ftpipe.serving.sampling import Sampling
from ftpipe.serving.source import Source
from ftpipe.tokenizer import byte_level
from tests import parrot

GREEDY = Sampling(temperature=0)
HI = Turn(Role.user, "Hi")
SAID = Turn(Role.assistant, parrot.ANSWER)


def made(template: TemplateName, positions: int) -> Voice:
    tokenizer = byte_level()
    source = Source("parrot", Path("parrot"), None, template)
    engine = Engine(parrot.model(positions=positions), tokenizer, positions)
    return Voice(source, Template(template, tokenizer), engine)


@pytest.fixture
def voice() -> Iterator[Voice]:
    one = made(TemplateName.tokenizer, 256)
    yield one
    one.engine.close()
    one.engine.join()


def shown(chat: Chat, *lines: str | None, live: bool = True, as_json: bool = False) -> None:
    Screen(chat, live, as_json).run(iter(lines))


def test_what_is_said_is_remembered_and_taken_back(
    voice: Voice, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(voice, GREEDY, "Be kind.")
    shown(chat, "Hi", "Hi")
    system = Turn(Role.system, "Be kind.")
    assert chat.turns == [system, HI, SAID, HI, SAID]
    assert capsys.readouterr().out == f"{parrot.ANSWER}\n" * 2
    shown(chat, "/undo")
    assert chat.turns == [system, HI, SAID]
    shown(chat, "/reset", "/undo")
    assert chat.turns == [system]
    assert capsys.readouterr().err == "taken back\nnothing was said yet\n"
    shown(chat, "/quit", "Hi")
    assert chat.turns == [system]


def test_what_it_saves_is_a_row_to_train_on(
    voice: Voice, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(voice, GREEDY, "Be kind.")
    shown(chat, "/save talk.jsonl")
    assert "nothing was said yet" in capsys.readouterr().err and not list(empty_folder.iterdir())
    shown(chat, "Hi", "/save talk.jsonl", "Hi", "/save talk.jsonl", "/save none/talk.jsonl", "/save")
    said = capsys.readouterr().err
    assert "written: talk.jsonl" in said and "talk.jsonl is there already" in said
    assert "none/talk.jsonl cannot be written (No such file" in said and "/save takes a FILE" in said
    source = SourceConfig(format=Format.messages, path="talk.jsonl")
    (row,) = rows.read(source)
    assert [one["content"] for one in row.fields["messages"]] == ["Be kind.", "Hi", parrot.ANSWER]
    (example,) = examples("mine", source, [row], Use.demonstrations)
    assert isinstance(example, Example)
    assert example.turns == (Turn(Role.system, "Be kind."), HI, SAID)


def test_a_context_that_is_full_loses_its_oldest_turns_and_says_so(
    voice: Voice, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(voice, Sampling(temperature=0, max_tokens=128))
    shown(chat, "Hi", "Hi", "Hi")
    # <|user|>\nHi, eos, newline; <|assistant|>\n, ten tokens with eos, newline: 13 + 25 an exchange
    assert capsys.readouterr().err == "" and chat.dropped == 0
    shown(chat, "Hi")
    said = capsys.readouterr()
    assert said.err == "the first 2 turns are left out: no room is left\n"
    assert said.out == f"{parrot.ANSWER}\n" and chat.dropped == 2
    assert len(chat.turns) == 8  # they are left out of the prompt, not of what is saved
    shown(chat, "x" * 300)
    assert "takes 325 tokens with its template, but there is room for 128" in capsys.readouterr().err
    assert len(chat.turns) == 8


def test_a_template_of_one_question_forgets_each(capsys: pytest.CaptureFixture[str]) -> None:
    voice = made(TemplateName.alpaca, 4096)
    chat = Chat(voice, Sampling(temperature=0, max_tokens=3))
    shown(chat, "Hi", "Hi")
    assert capsys.readouterr().out == ":::\n:::\n"  # the last character of its prompt, on and on
    assert chat.dropped == 0
    with pytest.raises(ConfigError, match="--system: the alpaca template holds one instruction"):
        Chat(voice, GREEDY, "Be kind.")
    voice.engine.close()


def test_no_room_for_a_question_is_refused_before_one_is_asked(voice: Voice) -> None:
    with pytest.raises(ConfigError, match=r"--max-tokens=256 leaves no room .* knows 256 positions"):
        Chat(voice, Sampling(max_tokens=256))


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    voice: Voice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(voice, GREEDY)
    show = Screen._show
    parts: list[str] = []

    def interrupted(self: Screen, text: str) -> None:
        show(self, text)
        parts.append(text)
        if len(parts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "_show", interrupted)
    shown(chat, "Hi", None, "Hi")
    assert chat.turns == [HI, Turn(Role.assistant, "Blu"), HI, SAID]
    assert capsys.readouterr().err == "\nstopped\n"


def test_an_iterator_that_is_closed_ends_its_answer(voice: Voice) -> None:
    chat = Chat(voice, GREEDY)
    answer = chat.ask("Hi")
    assert [next(answer), next(answer)] == ["B", "l"]
    answer.close()
    assert chat.turns == [HI, Turn(Role.assistant, "Bl")] and chat.ended is Ended.cancelled


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "no command '/rest'. Did you mean '/reset'? Known: /reset, /undo, /save,"),
        ("/undo 2", "/undo takes nothing"),
        ("Hi<|endoftext|>", "the text holds the special token '<|endoftext|>'"),
        ("\udcff", "the text holds half a character"),
        ("x" * 400, "it takes 425 tokens with its template, but there is room for 128"),
    ],
)
def test_a_line_that_cannot_be_answered_ends_a_pipe_and_no_chat(
    voice: Voice, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Chat(voice, Sampling(temperature=0, max_tokens=128))
    shown(chat, line, "Hi")
    got = capsys.readouterr()
    assert got.err.startswith(said) and got.out == f"{parrot.ANSWER}\n"
    with pytest.raises(DataError, match=r"^line 2: ") as caught:
        shown(chat, "Hi", line, live=False)
    assert said in str(caught.value)


def test_a_pipe_has_an_answer_for_each_line(voice: Voice, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(voice, Sampling(temperature=0, max_tokens=3))
    Screen(chat, live=False, as_json=True).run(piped(io.StringIO("Hi\r\n\n  \nHi")))
    said = capsys.readouterr()
    answer = {"content": parrot.ANSWER[:3], "finish_reason": "length"}
    assert [json.loads(line) for line in said.out.splitlines()] == [answer, answer]
    assert said.err == "cut; --max-tokens sets how long an answer may be\n" * 2
    assert [turn.content for turn in chat.turns] == ["Hi", "Blu"] * 2


def test_an_answer_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(parrot.model({"\n": "a\x1b[2J\t"}, 256), byte_level(), 256)
    source = Source("parrot", Path("parrot"), None, TemplateName.tokenizer)
    voice = Voice(source, Template(TemplateName.tokenizer, byte_level()), engine)
    shown(Chat(voice, GREEDY), "Hi")
    shown(Chat(voice, GREEDY), "Hi", live=False)
    assert capsys.readouterr().out == "a<U+001B>[2J\t\na\x1b[2J\t\n"
    engine.close()


def test_nothing_said_is_no_turn(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(parrot.model({"\n": ""}, 256), byte_level(), 256)  # eos at once
    source = Source("parrot", Path("parrot"), None, TemplateName.tokenizer)
    chat = Chat(Voice(source, Template(TemplateName.tokenizer, byte_level()), engine), GREEDY)
    shown(chat, "Hi")
    assert chat.turns == [] and "the policy said nothing" in capsys.readouterr().err
    engine.close()


def test_an_answer_that_spells_a_special_token_does_not_end_the_chat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = byte_level()
    engine = Engine(parrot.model({"\n": "a<x>"}, 256), tokenizer, 256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    source = Source("parrot", Path("parrot"), None, TemplateName.tokenizer)
    chat = Chat(Voice(source, Template(TemplateName.tokenizer, tokenizer), engine), GREEDY)
    shown(chat, "Hi", "Hi", live=False)  # through a pipe a refusal would raise
    said = capsys.readouterr()
    assert said.out == "a<x>\n" * 2 and chat.turns == []
    assert said.err.splitlines()[0] == (
        "the question and its answer are not remembered: the text holds the special token '<x>'"
    )
    engine.close()


def test_a_folder_answers_through_the_command(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot.write(empty_folder / "parrot", 256)
    monkeypatch.setattr(verb, "quiet_libraries", lambda: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert verb.chat(["parrot", "--temperature=0", "--device=cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == parrot.ANSWER
    (empty_folder / "parrot/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"parrot has no chat template.*--template chatml"):
        verb.chat(["parrot"])
    (empty_folder / "parrot/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer of parrot cannot be loaded"):
        verb.chat(["parrot", f"--device={Device.cpu}"])
