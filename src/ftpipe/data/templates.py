"""Prompt templates by name: the published strings, byte for byte.

What a piece of a role holds is that role's own words plus the mark that ends its turn; all else is
scaffolding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ftpipe.choices import Role, TemplateName
from ftpipe.data.chat_template import by_tokenizer
from ftpipe.data.example import Turn
from ftpipe.data.pieces import Piece, Pieces
from ftpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Ends(NamedTuple):
    """What a tokenizer puts before every text ("" for nothing) and what ends one."""

    bos: str
    eos: str


def plain(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """No marks: the user's words as they are, a space, the answer and eos; a system prompt in front.

    TL;DR as vwxyzjn/summarize_from_feedback_details has it (tldr_dataset.py): what the user says ends
    with ``TL;DR:``. The space before an answer counts to it: BPE makes one token of space and word.
    """
    system, spoken = _split_system(turns)
    pieces = [Piece(f"{system}\n\n", Role.system)] if system else []
    for turn in spoken:
        answer = turn.role is Role.assistant
        pieces.append(Piece(f" {turn.text}{ends.eos}" if answer else turn.text, turn.role))
    return pieces


def alpaca(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """stanford_alpaca train.py PROMPT_DICT; no space after ``### Response:``; target = output + eos.

    Raises:
        DataError: for more than one exchange, which the format does not know.
    """
    system, spoken = _split_system(turns)
    if system or len(spoken) != 2:
        raise DataError("the alpaca template holds one instruction and one answer")
    user, answer = spoken
    form = ALPACA_INPUT if user.given else ALPACA_NO_INPUT
    prompt = form.format_map({"instruction": user.content, "input": user.given})
    return [Piece(prompt), Piece(answer.text + ends.eos, Role.assistant)]


def guanaco(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """qlora.py on openassistant-guanaco: ``### Human: ...### Assistant: ...`` and one eos at the end."""
    system, spoken = _split_system(turns)
    pieces = [Piece(f"{system}\n", Role.system)] if system else []
    for turn in spoken:
        mark = "### Assistant:" if turn.role is Role.assistant else "### Human:"
        # the published target is the whole row, so the marks are learned with the turn they open
        pieces += [Piece(mark, turn.role, words=False), Piece(f" {turn.text}", turn.role)]
    return [*pieces, Piece(ends.eos, Role.assistant)]


def hh(turns: Sequence[Turn], ends: Ends) -> Pieces:
    r"""anthropics/hh-rlhf: ``\n\nHuman: ...\n\nAssistant: ...``, as the transcripts themselves are.

    One eos at the end, and the space before an answer counts to it: preference_datasets.py of
    eric-mitchell/direct-preference-optimization.
    """
    system, spoken = _split_system(turns)
    pieces = [Piece(system, Role.system)] if system else []
    for turn in spoken:
        mark = "Assistant" if turn.role is Role.assistant else "Human"
        pieces += [Piece(f"\n\n{mark}:"), Piece(f" {turn.text}", turn.role)]
    return [*pieces, Piece(ends.eos, Role.assistant)]


def vicuna(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """FastChat conversation.py vicuna_v1.1: ``USER: ... ASSISTANT: ...</s>``, separators " " and eos.

    The space before an answer counts to it: SentencePiece makes one token of space and first word.
    """
    system, spoken = _split_system(turns)
    pieces = [Piece(system, Role.system) if system else Piece(VICUNA_SYSTEM), Piece(" ")]
    for turn in spoken:
        if turn.role is Role.assistant:
            pieces += [Piece(" ASSISTANT:"), Piece(f" {turn.text}{ends.eos}", turn.role)]
        else:
            pieces += [Piece("USER:"), Piece(f" {turn.text}", turn.role)]
    return pieces


def wizardlm(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """nlpxucan/WizardLM 7B: ``{instruction}\\n\\n### Response:`` then the answer and eos."""
    system, spoken = _split_system(turns)
    pieces = [Piece(f"{system}\n\n", Role.system)] if system else []
    for turn in spoken:
        if turn.role is Role.assistant:
            pieces += [Piece("### Response:"), Piece(turn.text + ends.eos, turn.role)]
        else:
            pieces.append(Piece(f"{turn.text}\n\n", turn.role))
    return pieces


def oasst(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """LAION-AI/Open-Assistant: ``<|prompter|>...{eos}<|assistant|>...{eos}``."""
    marks = {Role.system: "<|system|>", Role.user: "<|prompter|>", Role.assistant: "<|assistant|>"}
    pieces = []
    for turn in turns:
        pieces += [Piece(marks[turn.role]), Piece(turn.text + ends.eos, turn.role)]
    return pieces


def chatml(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """openai/openai-python chatml.md: ``<|im_start|>role\\n...<|im_end|>\\n``.

    Where ``<|im_end|>`` is not the tokenizer's eos, the eos follows the last answer, so that
    generation stops.
    """
    end = "<|im_end|>"
    pieces: Pieces = []
    for turn in turns:
        pieces += [
            Piece(f"<|im_start|>{turn.role}\n"),
            Piece(turn.text + end, turn.role),
            Piece("\n"),
        ]
    if ends.eos == end:
        return pieces
    return [*pieces[:-1], Piece(ends.eos, Role.assistant)]


def llama2(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """meta-llama/llama generation.py: ``<s>[INST] ... [/INST] ... </s>`` for every exchange.

    What stands between the marks is stripped as one, the system prompt with the first question.
    bos is put where the tokenizer puts one before a text, then before every exchange.
    """
    system, spoken = _split_system(turns)
    pieces: Pieces = []
    for at, turn in enumerate(spoken):
        if turn.role is Role.assistant:
            pieces.append(Piece(f" {turn.text.strip()} {ends.eos}", turn.role))
            continue
        pieces.append(Piece(f"{ends.bos if at else ''}[INST] "))
        words = turn.text.strip()
        if system and not at:
            pieces += [Piece("<<SYS>>\n"), Piece(system, Role.system), Piece("\n<</SYS>>\n\n")]
            words = turn.text.rstrip()
        pieces += [Piece(words, turn.role), Piece(" [/INST]")]
    return pieces


def llama3(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """meta-llama/llama3 tokenizer.py ChatFormat: header, blank line, stripped words, ``<|eot_id|>``.

    Where ``<|eot_id|>`` is not the tokenizer's eos, the eos follows the last answer, so that
    generation stops.
    """
    end = "<|eot_id|>"
    pieces: Pieces = []
    for turn in turns:
        pieces += [
            Piece(f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n"),
            Piece(turn.text.strip() + end, turn.role),
        ]
    return pieces if ends.eos == end else [*pieces, Piece(ends.eos, Role.assistant)]


def mistral(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """mistralai/mistral-common InstructTokenizerV1, of Mistral-7B-Instruct-v0.1 and v0.2.

    ``<s> [INST] ... [/INST] ...</s>``; the spaces are those that SentencePiece puts before each part.
    The system prompt opens the first question.
    """
    system, spoken = _split_system(turns)
    pieces: Pieces = []
    for at, turn in enumerate(spoken):
        if turn.role is Role.assistant:
            pieces.append(Piece(f" {turn.text}{ends.eos}", turn.role))
            continue
        pieces.append(Piece(" [INST] "))
        if system and not at:
            pieces += [Piece(system, Role.system), Piece("\n\n")]
        pieces += [Piece(turn.text, turn.role), Piece(" [/INST]")]
    return pieces


def zephyr(turns: Sequence[Turn], ends: Ends) -> Pieces:
    """huggingface/alignment-handbook chat template of Zephyr-7B: ``<|user|>\\n...</s>\\n``.

    The marks are ordinary text there, not special tokens.
    """
    pieces: Pieces = []
    for turn in turns:
        pieces += [Piece(f"<|{turn.role}|>\n"), Piece(turn.text + ends.eos, turn.role), Piece("\n")]
    return pieces


def _split_system(turns: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
    if turns and turns[0].role is Role.system:
        return turns[0].text, turns[1:]
    return "", turns


TEMPLATES: Mapping[TemplateName, Callable[[Sequence[Turn], Ends], Pieces]] = {
    TemplateName.plain: plain,
    TemplateName.alpaca: alpaca,
    TemplateName.guanaco: guanaco,
    TemplateName.hh: hh,
    TemplateName.vicuna: vicuna,
    TemplateName.wizardlm: wizardlm,
    TemplateName.oasst: oasst,
    TemplateName.chatml: chatml,
    TemplateName.llama2: llama2,
    TemplateName.llama3: llama3,
    TemplateName.mistral: mistral,
    TemplateName.zephyr: zephyr,
}

# Marks that are one token each in the models a template comes from.
MARKS: Mapping[TemplateName, tuple[str, ...]] = {
    TemplateName.oasst: ("<|system|>", "<|prompter|>", "<|assistant|>"),
    TemplateName.chatml: ("<|im_start|>", "<|im_end|>"),
    TemplateName.llama3: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def render(name: TemplateName, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Return the pieces of a conversation, the tokenizer's bos first where it has one by default.

    Raises:
        ConfigError: if the tokenizer lacks what the template needs.
        DataError: if the conversation does not fit the template.
    """
    if name is TemplateName.tokenizer:
        return by_tokenizer(turns, tokenizer)
    ends = Ends(leading_bos(tokenizer), end_of_text(tokenizer))
    pieces = TEMPLATES[name](turns, ends)
    return [Piece(ends.bos), *pieces] if ends.bos else pieces


def missing_marks(name: TemplateName, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the marks of a template that the tokenizer spells in several tokens, or does not know.

    What is learned is right all the same; added as tokens, a mark costs one token and cannot be taken
    for text.
    """
    unknown = tokenizer.unk_token_id
    missing = []
    for mark in MARKS.get(name, ()):
        token = tokenizer.convert_tokens_to_ids(mark)
        # between words, as in a conversation: a piece of a vocabulary need not be cut out there
        spelled = tokenizer(f"a{mark}b", add_special_tokens=False)["input_ids"]
        if token is None or token == unknown or token not in spelled:
            missing.append(mark)
    return missing


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the eos token's text.

    Raises:
        ConfigError: if there is none: nothing would teach the model to stop.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no eos token, so the model could not learn to stop.")
    return str(tokenizer.eos_token)


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the bos token's text where the tokenizer puts one before every text, else nothing."""
    if tokenizer.bos_token_id is None:
        return ""
    # a call of the tokenizer itself takes ten times as long, and every row comes here
    encoding = tokenizer.backend_tokenizer.encode("x")
    first = encoding.ids[encoding.attention_mask.index(1)]  # padding may come before
    return str(tokenizer.bos_token) if first == tokenizer.bos_token_id else ""
