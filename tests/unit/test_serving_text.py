"""Tokens that become text as they come: whole characters, no stop string, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftpipe.serving.text import Answer, Decoder
from ftpipe.tokenizer import byte_level

BYTES = byte_level()


def read(tokenizer: object, prompt: list[int], answer: list[int]) -> list[str]:
    decoder = Decoder(tokenizer, prompt)  # type: ignore[arg-type]
    return [*(decoder.add(token) for token in answer), decoder.rest()]


@given(st.text(), st.text())
def test_a_text_comes_back_in_whole_characters(before: str, text: str) -> None:
    prompt, ids = (list(BYTES(words)["input_ids"]) for words in (before, text))
    pieces = read(BYTES, prompt, ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 257), max_size=40))
def test_tokens_that_are_no_text_lose_none_of_what_is(ids: list[int]) -> None:
    prompt = list(BYTES("go on:")["input_ids"])
    whole = BYTES.decode(prompt + ids, skip_special_tokens=True)
    assert "go on:" + "".join(read(BYTES, prompt, ids)) == whole


def test_a_character_of_four_tokens_comes_with_its_last() -> None:
    ids = list(BYTES("🙂!")["input_ids"])
    assert read(BYTES, [], ids) == ["", "", "", "🙂", "!", ""]
    assert read(BYTES, [], ids[:2]) == ["", "", "\ufffd"]


def test_the_space_before_a_first_word_is_not_lost(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models" / "stories260k"))
    text = "Once upon a time there was a little girl"
    ids = list(tokenizer(text)["input_ids"])
    for at in range(2, len(ids)):  # the first two tokens are bos and a piece
        said = "".join(read(tokenizer, ids[:at], ids[at:]))
        assert f"{tokenizer.decode(ids[:at], skip_special_tokens=True)}{said}" == text


def told(answer: Answer, parts: list[str], turn_ended: bool = False) -> list[str]:
    return [*(answer.add(part) for part in parts), answer.end(turn_ended)]


@given(st.data())
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(data: st.DataObject) -> None:
    text = data.draw(st.text("ab#", max_size=20))
    stops = data.draw(st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    # who reads one character after the other stops at the first end of a stop string
    seen = [text[:at] for at in range(len(text) + 1)]
    stopped = next((one for one in seen if one.endswith(tuple(stops))), None)
    longest = max((len(stop) for stop in stops if stopped and stopped.endswith(stop)), default=0)
    expected = text if stopped is None else stopped[: len(stopped) - longest]
    answer = Answer(stops)
    assert "".join(told(answer, parts)) == expected
    assert answer.stopped == (stopped is not None)


def test_nothing_is_held_back_that_cannot_be_a_stop_string() -> None:
    answer = Answer(["###", "\nUser:"])
    assert answer.add("one #") == "one "
    assert answer.add("1 ##") == "#1 "
    assert answer.add("\nUse") == "##"
    assert answer.add("less\n") == "\nUseless"
    assert answer.add("User: and") == ""
    assert answer.stopped and answer.add("more") == "" and answer.end(False) == ""


def test_what_a_template_puts_around_an_answer_is_not_the_answers() -> None:
    assert told(Answer([], lead=" ", trail=" "), [" ", "One. ", "", "Two. "], turn_ended=True) == [
        *("", "One.", "", " Two.", ""),
    ]
    # cut by its length, or without the space: all of it is the answer's
    assert "".join(told(Answer([], " ", " "), ["One. "])) == "One. "
    assert "".join(told(Answer([], "\n\n", ""), ["\n", "One"])) == "\nOne"
    assert "".join(told(Answer([], "\n\n", ""), ["\n"])) == "\n"
    assert "".join(told(Answer([], " ", ""), ["  two"])) == " two"


@pytest.mark.parametrize("parts", [["a ", "##"], ["a", " ", "#", "#"]])
def test_a_stop_string_that_never_ends_is_text(parts: list[str]) -> None:
    assert "".join(told(Answer(["###"], trail=" "), parts, turn_ended=True)) == "a ##"


def test_words_that_begin_with_their_space_keep_it() -> None:
    """A SentencePiece tokenizer drops the space before the first token it is given."""
    core = Tokenizer(WordLevel({"▁one": 0, "▁two": 1, "s": 2, "</s>": 3}, unk_token="s"))
    core.decoder = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer.decode([1, 2]) == "twos"
    assert read(tokenizer, [0], [1, 2, 1, 1, 3, 0]) == [" two", "s", " two", " two", "", " one", ""]
    assert read(tokenizer, [0, 1, 2], [2]) == ["s", ""]
    assert read(tokenizer, [3], [1]) == ["two", ""]  # nothing but a special token is before it
