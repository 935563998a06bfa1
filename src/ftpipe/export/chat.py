"""The template that a policy was trained with, as the chat template that its tokenizer carries.

Jinja as transformers reads it (huggingface.co/docs/transformers/chat_templating): rendered and cut into
tokens, it gives the ids that the policy was trained on. Each form below is the one of the same name in
``data/templates.py``, which names its source.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ftpipe.choices import Role, TemplateName
from ftpipe.data import templates
from ftpipe.data.chat_template import on_one_day
from ftpipe.data.example import Turn
from ftpipe.errors import ConfigError
from ftpipe.tokenizer import special_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

# What a form holds for the end of text, and for what the tokenizer puts before every text.
EOS, BOS = "@eos@", "@bos@"
SPLIT = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
LAST = "loop.last"


def _text(words: str) -> str:
    """Return words as a Jinja expression that renders them; Jinja drops a newline after a block."""
    return "{{ " + json.dumps(words, ensure_ascii=False) + " }}" if words else ""


def _turns(user: str, answer: str, prompt: str = "", system: str = "") -> str:
    """Return a template of turns with one form for each role.

    Args:
        user, answer: what a turn becomes.
        prompt: what asks for an answer.
        system: what comes of a system prompt.
    """
    first = "{% if system %}" + system + "{% endif %}" if system else ""
    asked = "{% if add_generation_prompt %}" + prompt + "{% endif %}" if prompt else ""
    return (
        SPLIT
        + first
        + "{% for message in turns %}{% if message['role'] == 'assistant' %}"
        + answer
        + "{% else %}"
        + user
        + "{% endif %}{% endfor %}"
        + asked
    )


def _ended(end: str, own: str = "") -> str:
    """Return the eos that follows the last answer alone, and what follows any other instead."""
    return "{% if " + LAST + " %}" + end + "{% else %}" + own + "{% endif %}"


CONTENT = "{{ message['content'] }}"
STRIPPED = "{{ message['content'].strip() }}"
SYSTEM = "{{ system }}"
ROLE = "{{ message['role'] }}"

_ALPACA = (
    SPLIT
    + "{% if system or turns | length > 2 %}"
    + "{{ raise_exception('the alpaca template holds one instruction and one answer') }}{% endif %}"
    + "{% for message in turns %}{% if message['role'] == 'assistant' %}"
    + CONTENT
    + EOS
    + "{% elif message['input'] %}"
    + _text(templates.ALPACA_INPUT)
    + "{% else %}"
    + _text(templates.ALPACA_NO_INPUT)
    + "{% endif %}{% endfor %}"
)
_ALPACA = _ALPACA.replace("{instruction}", "\" + message['content'] + \"").replace(
    "{input}", "\" + message['input'] + \""
)


def _each(opening: str, ending: str, words: str, prompt: str) -> str:
    """Return a template that has one form for all roles."""
    turn = opening + words + ending
    return (
        "{% for message in messages %}"
        + turn
        + "{% endfor %}{% if add_generation_prompt %}"
        + prompt
        + "{% endif %}"
    )


FORMS: Mapping[TemplateName, str] = {
    TemplateName.plain: _turns(CONTENT, _text(" ") + CONTENT + EOS, system=SYSTEM + _text("\n\n")),
    TemplateName.alpaca: _ALPACA,
    TemplateName.guanaco: _turns(
        _text("### Human: ") + CONTENT,
        _text("### Assistant: ") + CONTENT + _ended(EOS),
        _text("### Assistant:"),
        SYSTEM + _text("\n"),
    ),
    TemplateName.hh: _turns(
        _text("\n\nHuman: ") + CONTENT,
        _text("\n\nAssistant: ") + CONTENT + _ended(EOS),
        _text("\n\nAssistant:"),
        SYSTEM,
    ),
    TemplateName.vicuna: _turns(
        _text("USER: ") + CONTENT,
        _text(" ASSISTANT: ") + CONTENT + EOS,
        _text(" ASSISTANT:"),
    ).replace(SPLIT, SPLIT + "{{ system or " + json.dumps(templates.VICUNA_SYSTEM) + " }}" + _text(" ")),
    TemplateName.wizardlm: _turns(
        CONTENT + _text("\n\n"),
        _text("### Response:") + CONTENT + EOS,
        _text("### Response:"),
        SYSTEM + _text("\n\n"),
    ),
    TemplateName.oasst: _each(
        "{{ {'system': '<|system|>', 'user': '<|prompter|>', 'assistant': '<|assistant|>'}"
        "[message['role']] }}",
        EOS,
        CONTENT,
        _text("<|assistant|>"),
    ),
    TemplateName.chatml: _each(
        _text("<|im_start|>") + ROLE + _text("\n"),
        _text("<|im_end|>") + "@end:<|im_end|>@",
        CONTENT,
        _text("<|im_start|>assistant\n"),
    ),
    TemplateName.llama2: _turns(
        "{% if not loop.first %}"
        + BOS
        + "{% endif %}"
        + _text("[INST] ")
        + "{% if system and loop.first %}"
        + _text("<<SYS>>\n")
        + SYSTEM
        + _text("\n<</SYS>>\n\n")
        + "{{ message['content'].rstrip() }}{% else %}"
        + STRIPPED
        + "{% endif %}"
        + _text(" [/INST]"),
        _text(" ") + STRIPPED + _text(" ") + EOS,
    ),
    TemplateName.llama3: _each(
        _text("<|start_header_id|>") + ROLE + _text("<|end_header_id|>\n\n"),
        _text("<|eot_id|>") + "@end:<|eot_id|>@",
        STRIPPED,
        _text("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    TemplateName.mistral: _turns(
        _text(" [INST] ")
        + "{% if system and loop.first %}"
        + SYSTEM
        + _text("\n\n")
        + "{% endif %}"
        + CONTENT
        + _text(" [/INST]"),
        _text(" ") + CONTENT + EOS,
    ),
    TemplateName.zephyr: _each(
        _text("<|") + ROLE + _text("|>\n"),
        EOS + _text("\n"),
        CONTENT,
        _text("<|assistant|>\n"),
    ),
}
# What stands between turns in a template whose answers end with a mark of its own.
BETWEEN = {TemplateName.chatml: ("<|im_end|>", "\n"), TemplateName.llama3: ("<|eot_id|>", "")}


def jinja(name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that renders conversations as they were rendered for training.

    Raises:
        ConfigError: if the tokenizer lacks what the template needs.
    """
    if name is TemplateName.tokenizer:
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.template=tokenizer, but the tokenizer has no chat template; choose one by name."
            )
        return on_one_day(str(tokenizer.chat_template))
    bos, eos = templates.leading_bos(tokenizer), templates.end_of_text(tokenizer)
    form = FORMS[name]
    if name in BETWEEN:
        end, between = BETWEEN[name]
        answered = "message['role'] == 'assistant' and " + LAST
        last = "{% if " + answered + " %}" + EOS + "{% else %}" + _text(between) + "{% endif %}"
        form = form.replace(f"@end:{end}@", _text(between) if eos == end else last)
    form = form.replace(EOS, "{{ eos_token }}").replace(BOS, "{{ bos_token }}" if bos else "")
    return ("{{ bos_token }}" if bos else "") + form


def ends(name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: eos, and those that the template ends one with."""
    asked = (Turn(Role.user, "a"), Turn(Role.assistant, "b"))
    found = [tokenizer.eos_token_id]
    for turns in (asked, (*asked, *asked)):
        try:
            pieces = templates.render(name, turns, tokenizer)
        except ValueError:  # one exchange alone, as Alpaca's
            continue
        for piece in pieces:
            if piece.role is Role.assistant:
                marks = special_tokens(tokenizer).findall(piece.text)
                found += [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
    return list(dict.fromkeys(token for token in found if token is not None))
