"""Prompts byte for byte, as their publishers have them, and what an answer's prompt is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from ftpipe.choices import Format, Role, TemplateName, Use
from ftpipe.config import SourceConfig
from ftpipe.data.example import Refused, Turn
from ftpipe.data.formats import examples
from ftpipe.data.pieces import Piece, final_reply, only_final
from ftpipe.data.rows import read
from ftpipe.data.templates import missing_marks, render
from ftpipe.errors import ConfigError, DataError
from tests.unit.data.toys import (
    CHATML,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    TOYS,
    ZEPHYR,
    Toy,
    byte_bpe,
    bytes_only,
    fast,
    few,
    metaspace_bpe,
    pad_is_eos,
    repeatable,
    text,
    turns,
    unigram,
    whose,
    with_marks,
)

S, U, A = Role.system, Role.user, Role.assistant
OWN = TemplateName.tokenizer
NAMED = [name for name in TemplateName if name is not OWN]

ONE = turns("Hi?", "Yes.")
TWO = turns("Hi?", "Yes.", "Sure?", "No.")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)

# Of a tokenizer whose eos is <|endoftext|> and that puts no bos.
PUBLISHED = [
    (TemplateName.plain, turns("POST: Hi.\n\nTL;DR:", "Hi"), "POST: Hi.\n\nTL;DR: Hi<|endoftext|>"),
    (
        TemplateName.plain,
        turns("Hi?", "Yes.", "Sure?", "No.", system="Be brief."),
        "Be brief.\n\nHi? Yes.<|endoftext|>Sure? No.<|endoftext|>",
    ),
    (
        TemplateName.alpaca,
        ONE,
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nHi?\n\n### Response:Yes.<|endoftext|>",
    ),
    (
        TemplateName.alpaca,
        (Turn(U, "Name {input}.", given="a {b}\nc"), Turn(A, "Yes.")),
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Name {input}.\n\n### Input:\na {b}\nc\n\n### Response:Yes.<|endoftext|>",
    ),
    (TemplateName.guanaco, ONE, "### Human: Hi?### Assistant: Yes.<|endoftext|>"),
    (
        TemplateName.guanaco,
        TWO,
        "### Human: Hi?### Assistant: Yes.### Human: Sure?### Assistant: No.<|endoftext|>",
    ),
    (TemplateName.hh, ONE, "\n\nHuman: Hi?\n\nAssistant: Yes.<|endoftext|>"),
    (
        TemplateName.hh,
        turns("Hi?", "Yes.", "Sure?", "No.", system="Be brief."),
        "Be brief.\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant: No.<|endoftext|>",
    ),
    (TemplateName.vicuna, ONE, VICUNA + "USER: Hi? ASSISTANT: Yes.<|endoftext|>"),
    (
        TemplateName.vicuna,
        TWO,
        VICUNA + "USER: Hi? ASSISTANT: Yes.<|endoftext|>USER: Sure? ASSISTANT: No.<|endoftext|>",
    ),
    (
        TemplateName.vicuna,
        turns("Hi?", "Yes.", system="Be brief."),
        "Be brief. USER: Hi? ASSISTANT: Yes.<|endoftext|>",
    ),
    (TemplateName.wizardlm, ONE, "Hi?\n\n### Response:Yes.<|endoftext|>"),
    (
        TemplateName.wizardlm,
        TWO,
        "Hi?\n\n### Response:Yes.<|endoftext|>Sure?\n\n### Response:No.<|endoftext|>",
    ),
    (
        TemplateName.oasst,
        turns("Hi?", "Yes.", system="Be brief."),
        "<|system|>Be brief.<|endoftext|><|prompter|>Hi?<|endoftext|><|assistant|>Yes.<|endoftext|>",
    ),
    (
        TemplateName.oasst,
        TWO,
        "<|prompter|>Hi?<|endoftext|><|assistant|>Yes.<|endoftext|>"
        "<|prompter|>Sure?<|endoftext|><|assistant|>No.<|endoftext|>",
    ),
    (
        TemplateName.chatml,
        turns("Hi?", "Yes.", "Sure?", "No.", system="Be brief."),
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|><|endoftext|>",
    ),
    (
        TemplateName.llama2,
        turns(" Hi?\n", " Yes. ", "Sure?", "No.", system="Be brief."),
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi? [/INST] Yes. <|endoftext|>"
        "[INST] Sure? [/INST] No. <|endoftext|>",
    ),
    (
        TemplateName.llama3,
        turns(" Hi?\n", " Yes. ", "Sure?", "No.", system="Be brief."),
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|><|endoftext|>",
    ),
    (
        TemplateName.mistral,
        turns("Hi?", "Yes.", "Sure?", "No.", system="Be brief."),
        " [INST] Be brief.\n\nHi? [/INST] Yes.<|endoftext|> [INST] Sure? [/INST] No.<|endoftext|>",
    ),
    (
        TemplateName.zephyr,
        turns("Hi?", "Yes.", system="Be brief."),
        "<|system|>\nBe brief.<|endoftext|>\n<|user|>\nHi?<|endoftext|>\n"
        "<|assistant|>\nYes.<|endoftext|>\n",
    ),
]


@pytest.mark.parametrize(("name", "said", "expected"), PUBLISHED)
def test_a_prompt_is_the_published_one(
    name: TemplateName, said: tuple[Turn, ...], expected: str
) -> None:
    assert text(render(name, said, bytes_only().tokenizer)) == expected


def test_vicuna_ends_answers_with_the_eos_of_llama_and_starts_with_its_bos() -> None:
    expected = f"<s>{VICUNA}USER: Hi? ASSISTANT: Yes.</s>USER: Sure? ASSISTANT: No.</s>"
    assert text(render(TemplateName.vicuna, TWO, metaspace_bpe().tokenizer)) == expected


def test_chatml_needs_no_eos_after_the_last_turn_where_the_turns_end_in_it() -> None:
    expected = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert text(render(TemplateName.chatml, ONE, pad_is_eos().tokenizer)) == expected


def test_bos_is_put_only_where_the_tokenizer_puts_it_by_default() -> None:
    # pad_is_eos has a bos token, <|im_start|>, as SmolLM2 does, but never puts it before a text
    for name, starts in (("pad_is_eos", "Hi?"), ("byte_bpe", "Hi?"), ("metaspace_first", "<s>Hi?")):
        assert text(render(TemplateName.wizardlm, ONE, TOYS[name]().tokenizer)).startswith(starts)


def test_the_given_text_follows_its_instruction_where_a_template_has_no_place_for_it() -> None:
    said = (Turn(U, "Translate.", given="mountain"), Turn(A, "Berg."))
    rendered = text(render(TemplateName.wizardlm, said, bytes_only().tokenizer))
    assert rendered == "Translate.\n\nmountain\n\n### Response:Berg.<|endoftext|>"


@pytest.mark.parametrize("said", [TWO, turns("Hi?", "Yes.", system="Be brief.")])
def test_alpaca_holds_one_instruction_and_one_answer(said: tuple[Turn, ...]) -> None:
    with pytest.raises(DataError, match="alpaca template holds one instruction and one answer"):
        render(TemplateName.alpaca, said, bytes_only().tokenizer)


@pytest.mark.parametrize("name", NAMED)
def test_a_tokenizer_without_eos_could_not_teach_to_stop(name: TemplateName) -> None:
    tokenizer = bytes_only().tokenizer
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        render(name, ONE, tokenizer)


# The models' own chat templates, rendered by transformers: what the named ones must give.


def llama3_like() -> Toy:
    """Meta-Llama-3-8B-Instruct: bos by default, ``<|eot_id|>`` is the eos."""
    toy = with_marks(metaspace_bpe("first"), "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    toy.tokenizer.eos_token = "<|eot_id|>"
    return toy


MODELS = {
    TemplateName.chatml: (CHATML, pad_is_eos),
    TemplateName.llama2: (LLAMA2, metaspace_bpe),
    TemplateName.llama3: (LLAMA3, llama3_like),
    TemplateName.mistral: (MISTRAL, unigram),
    TemplateName.zephyr: (ZEPHYR, byte_bpe),
}


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@repeatable
def test_a_template_is_the_models_own(data: st.DataObject, name: TemplateName) -> None:
    template, make = MODELS[name]
    toy = make()
    said = data.draw(st.lists(st.tuples(toy.texts(), toy.texts()), min_size=1, max_size=3))
    system = data.draw(st.just("") | toy.texts())
    talk = turns(*(words for pair in said for words in pair), system=system)
    toy.tokenizer.chat_template = template
    chat = [{"role": str(turn.role), "content": turn.text} for turn in talk]
    assert text(render(name, talk, toy.tokenizer)) == toy.tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    # what comes before the last answer is what the model is given to answer
    pieces = render(name, talk, toy.tokenizer)
    prompt = text(pieces[: final_reply(pieces)])
    assert prompt == toy.tokenizer.apply_chat_template(
        chat[:-1], tokenize=False, add_generation_prompt=True
    )
    # and two ways to whose words are where give one answer
    assert whose(pieces) == whose(render(OWN, talk, toy.tokenizer))


@pytest.mark.parametrize("name", [TemplateName.llama2, TemplateName.mistral])
def test_bos_is_put_as_often_as_the_model_puts_it(name: TemplateName) -> None:
    said = turns("Hi?", "Yes.", "Sure?", "No.", "Well?", "Yes.")
    times = {TemplateName.llama2: 3, TemplateName.mistral: 1}[name]
    assert text(render(name, said, metaspace_bpe().tokenizer)).count("<s>") == times
    assert "<s>" not in text(render(name, said, byte_bpe().tokenizer))


def test_bos_is_found_under_padding_and_truncation() -> None:
    tokenizer = metaspace_bpe().tokenizer
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=64, pad_token="<unk>")
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert text(render(TemplateName.wizardlm, ONE, tokenizer)).startswith("<s>Hi?")


# The pieces.


@pytest.mark.parametrize("name", NAMED)
@given(data=st.data())
@few
def test_the_last_answer_follows_its_prompt(data: st.DataObject, name: TemplateName) -> None:
    toy = data.draw(st.sampled_from(sorted(set(TOYS) - {"stories260k"})).map(lambda key: TOYS[key]()))
    most = 1 if name is TemplateName.alpaca else 3
    said = data.draw(st.lists(st.tuples(toy.texts(), toy.texts()), min_size=1, max_size=most))
    system = "" if name is TemplateName.alpaca else data.draw(st.just("") | toy.texts())
    talk = turns(*(words for pair in said for words in pair), system=system)
    pieces = render(name, talk, toy.tokenizer)
    start = final_reply(pieces)
    prompt, reply = text(pieces[:start]), text(pieces[start:])
    *_, (question, answer) = said

    # whatever the last answer says, it is asked for in the same words
    other = render(name, (*talk[:-1], Turn(A, "Other.")), toy.tokenizer)
    assert text(other[: final_reply(other)]) == prompt
    if answer == answer.strip():
        assert text(other[final_reply(other) :]) == reply.replace(answer, "Other.", 1)
    assert question.strip() in prompt
    assert reply.lstrip().startswith(answer.strip())
    assert toy.tokenizer.eos_token in reply

    final = only_final(pieces)
    assert text(final) == text(pieces)
    assert "".join(piece.text for piece in final if piece.role is A) == "".join(
        piece.text for piece in pieces[start:] if piece.role is A
    )
    assert {piece.role for piece in final} <= {A, None}
    assert not any(piece.role for piece in final[:start])
    assert final_reply(final) == start


def test_a_mark_that_opens_an_answer_belongs_to_its_prompt() -> None:
    pieces = render(TemplateName.guanaco, TWO, bytes_only().tokenizer)
    assert text(pieces[: final_reply(pieces)]) == (
        "### Human: Hi?### Assistant: Yes.### Human: Sure?### Assistant:"
    )
    assert whose(only_final(pieces))[-1] == (" No.<|endoftext|>", A)


def test_the_space_before_a_reply_to_a_transcript_is_the_replys() -> None:
    # preference_datasets.py: the prompt ends with "Assistant:", so the reply starts with a space
    pieces = render(TemplateName.hh, TWO, bytes_only().tokenizer)
    prompt = text(pieces[: final_reply(pieces)])
    assert prompt == "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"
    assert whose(only_final(pieces))[-1] == (" No.<|endoftext|>", A)


def test_real_transcripts_are_rendered_as_they_are_published(shared: Path) -> None:
    path = shared / "data" / "preferences" / "harmless-base_test.jsonl.gz"
    source = SourceConfig(format=Format.hh_rlhf, path=str(path), rows=300)
    raw = [row.fields for row in read(source)]
    tokenizer = bytes_only().tokenizer
    same = 0
    for item in examples("hh", source, read(source), Use.preferences):
        if isinstance(item, Refused):
            continue
        for side, reply in zip(("chosen", "rejected"), item.replies, strict=True):
            rendered = text(render(TemplateName.hh, item.with_reply(reply), tokenizer))
            assert rendered == raw[item.row - 1][side] + "<|endoftext|>"
            same += 1
    assert same > 590


def test_pieces_without_an_answer_have_no_last_one() -> None:
    for pieces in ([], [Piece("Hi?", U)], [Piece("### Assistant:", A, words=False)]):
        with pytest.raises(ValueError, match="no piece is an answer"):
            final_reply(pieces)


def test_what_follows_the_last_answer_is_none_of_its_prompt() -> None:
    pieces = [Piece("Q"), Piece("yes", A), Piece("Q"), Piece(" n", A), Piece("o", A), Piece("\n")]
    assert final_reply(pieces) == 3
    assert [piece.role for piece in only_final(pieces)] == [None, None, None, A, A, None]


# Marks that are no tokens.


def test_marks_that_a_tokenizer_lacks_are_named() -> None:
    for toy in (byte_bpe(), metaspace_bpe(), unigram()):
        tokenizer = toy.tokenizer
        assert missing_marks(TemplateName.oasst, tokenizer) == [
            "<|system|>",
            "<|prompter|>",
            "<|assistant|>",
        ]
        assert missing_marks(TemplateName.llama3, tokenizer) == [
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ]
        tokenizer.add_tokens(["<|prompter|>"])
        assert missing_marks(TemplateName.oasst, tokenizer) == ["<|system|>", "<|assistant|>"]
        with_marks(toy, "<|system|>", "<|assistant|>")
        assert missing_marks(TemplateName.oasst, tokenizer) == []
        # one token each, wherever they stand
        spelled = tokenizer("say<|system|>x<|assistant|> y<|prompter|>", add_special_tokens=False)
        for mark in ("<|system|>", "<|assistant|>", "<|prompter|>"):
            assert spelled["input_ids"].count(tokenizer.convert_tokens_to_ids(mark)) == 1


def test_a_mark_that_is_unknown_is_missing() -> None:
    words = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    tokenizer = fast(Tokenizer(words), unk_token="<unk>", eos_token="</s>")
    assert tokenizer("<|im_end|>")["input_ids"] == [0]  # one token, though not its own
    assert missing_marks(TemplateName.chatml, tokenizer) == ["<|im_start|>", "<|im_end|>"]


def test_chatml_lacks_nothing_where_it_is_the_tokenizers_own() -> None:
    assert missing_marks(TemplateName.chatml, pad_is_eos().tokenizer) == []
    assert missing_marks(TemplateName.chatml, byte_bpe().tokenizer) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("name", [TemplateName.zephyr, TemplateName.mistral, TemplateName.alpaca, OWN])
def test_marks_that_are_ordinary_text_where_they_come_from_are_not_missed(name: TemplateName) -> None:
    assert missing_marks(name, byte_bpe().tokenizer) == []


def test_a_word_of_the_vocabulary_is_no_mark_where_it_is_not_cut_out() -> None:
    # in the vocabulary, but no merge leads there: a conversation never has it
    tokenizer = metaspace_bpe().tokenizer
    core = tokenizer.backend_tokenizer
    state = json.loads(core.to_str())
    state["model"]["vocab"]["<|im_end|>"] = 5000
    tokenizer._tokenizer = core.from_str(json.dumps(state))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 5000
    assert "<|im_end|>" in missing_marks(TemplateName.chatml, tokenizer)
