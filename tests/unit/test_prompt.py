"""Prompts as the policy was trained on them, and what ends an answer, for every template."""

from __future__ import annotations

import pytest

from ftpipe.choices import Role, TemplateName
from ftpipe.data.encode import encode
from ftpipe.data.example import Turn
from ftpipe.data.prompt import Endings, Template
from ftpipe.data.templates import render
from ftpipe.errors import ConfigError, DataError
from ftpipe.tokenizer import EOS, add_tokens, byte_level

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nHi\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: Hi ASSISTANT:"
)
# The published prompt for the question "Hi", what comes before an answer's first word, the marks that
# end an answer beside eos, and the space before its end.
PUBLISHED = {
    "tokenizer": ("<|user|>\nHi<|endoftext|>\n<|assistant|>\n", "", (), ""),
    "plain": ("Hi", " ", (), ""),
    "alpaca": (ALPACA, "", (), ""),
    "guanaco": ("### Human: Hi### Assistant:", " ", ("### Human:",), ""),
    "vicuna": (VICUNA, " ", (), ""),
    "wizardlm": ("Hi\n\n### Response:", "", (), ""),
    "oasst": ("<|prompter|>Hi<|endoftext|><|assistant|>", "", (), ""),
    "chatml": ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "", ("<|im_end|>",), ""),
    "hh": ("\n\nHuman: Hi\n\nAssistant:", " ", ("\n\nHuman:",), ""),
    "llama2": ("[INST] Hi [/INST]", " ", (), " "),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        *("", ("<|eot_id|>",), ""),
    ),
    "mistral": (" [INST] Hi [/INST]", " ", (), ""),
    "zephyr": ("<|user|>\nHi<|endoftext|>\n<|assistant|>\n", "", (), ""),
}


def hi(*more: str) -> list[Turn]:
    roles = (Role.user, Role.assistant)
    return [Turn(roles[at % 2], text) for at, text in enumerate(("Hi", *more))]


def test_every_template_is_looked_at() -> None:
    assert set(PUBLISHED) == {name.value for name in TemplateName}


@pytest.mark.parametrize("name", list(TemplateName))
def test_a_prompt_is_the_published_one(name: TemplateName) -> None:
    tokenizer = byte_level()
    text, lead, marks, trail = PUBLISHED[name.value]
    template = Template(name, tokenizer)
    prompt = template.prompt(hi())
    assert (prompt.text, prompt.lead) == (text, lead)
    assert tokenizer.decode(list(prompt.ids)) == text
    assert template.endings == Endings(frozenset({tokenizer.eos_token_id or -1}), marks, trail)


@pytest.mark.parametrize("name", list(TemplateName))
def test_a_prompt_is_the_beginning_of_the_row_that_was_trained_on(name: TemplateName) -> None:
    tokenizer = byte_level()
    template = Template(name, tokenizer)
    turns = hi("Hello.", "And you?") if template.remembers else hi()
    whole = [*turns, Turn(Role.assistant, "Fine.")]
    (row,) = encode([render(name, whole, tokenizer)], tokenizer, [Role.assistant])
    prompt = template.prompt(turns)
    assert row.input_ids[: len(prompt.ids)].tolist() == list(prompt.ids)
    # and what is learned next is the answer, which its lead begins
    learned = [token for token in row.labels.tolist() if token >= 0]
    assert str(tokenizer.decode(learned)).endswith(
        f"{prompt.lead}Fine.{PUBLISHED[name.value][3]}"
        + (EOS if not PUBLISHED[name.value][2] or name in ("guanaco", "hh") else "")
        + (f"{PUBLISHED[name.value][2][0]}{EOS}" if name in ("chatml", "llama3") else "")
    )


def test_only_alpaca_holds_a_single_question() -> None:
    tokenizer = byte_level()
    forgetful = [name for name in TemplateName if not Template(name, tokenizer).remembers]
    assert forgetful == [TemplateName.alpaca]
    system = [Turn(Role.system, "Be brief."), *hi()]
    assert "one instruction" in str(Template(TemplateName.alpaca, tokenizer).accepts(system))
    assert Template(TemplateName.vicuna, tokenizer).accepts(system) is None


def test_marks_that_are_tokens_end_an_answer_as_tokens() -> None:
    tokenizer = byte_level()
    added = add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    endings = Template(TemplateName.chatml, tokenizer).endings
    assert endings == Endings(frozenset({added["<|im_end|>"], tokenizer.eos_token_id or -1}))


def test_words_that_would_end_their_own_turn_are_refused() -> None:
    template = Template(TemplateName.chatml, byte_level())
    with pytest.raises(DataError, match=r"special token '<\|endoftext\|>'"):
        template.prompt([Turn(Role.user, f"Hi{EOS}")])
    with pytest.raises(DataError, match="lone surrogate"):
        template.prompt([Turn(Role.user, "\ud800")])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Template(TemplateName.tokenizer, tokenizer)
