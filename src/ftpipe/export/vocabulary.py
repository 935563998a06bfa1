"""A tokenizer as a GGUF file holds it: pieces, their kinds, and what decides how a text is cut.

Two families, as llama.cpp has them (src/llama-vocab.cpp): ``llama`` is SentencePiece's BPE, which joins
the pair whose piece scores highest; ``gpt2`` is BPE of bytes, which joins by a list of merges after a
text was split by a rule that has a name there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftpipe.data.templates import leading_bos
from ftpipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
OTHER = "set export.converter to llama.cpp's convert_hf_to_gguf.py, which knows more of them"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The rules by which texts are split before BPE, and their names: llama-vocab.cpp, regex_exprs.
RULES: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA3, "whole"): "llama-bpe",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "whole"): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: ``llama`` or ``gpt2``.
        rule: the name of the rule that splits a text.
        kinds: of each piece, as gguf.TokenType has them.
        scores: of each piece; empty for ``gpt2``.
        merges: pairs with a space between; empty for ``llama``.
        prefixed: whether a text begins with a space that it does not show.
    """

    model: str
    rule: str
    pieces: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    prefixed: bool


def of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Return what a GGUF file says of a tokenizer.

    Args:
        rows: of the embedding; pieces that the tokenizer lacks are filled up.

    Raises:
        ModelError: if it is of neither family, or splits texts by a rule that has no name.
    """
    told: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"GGUF: a tokenizer of type {model.get('type')} is not known here; {OTHER}.")
    by_number = {number: piece for piece, number in tokenizer.get_vocab().items()}
    pieces = [by_number.get(at, f"[PAD{at}]") for at in range(max(rows, max(by_number) + 1))]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    kinds = [
        _kind(at, piece, tokenizer, sentencepiece) if at in by_number else UNUSED
        for at, piece in enumerate(pieces)
    ]
    if sentencepiece:
        return Vocabulary(
            "llama", "default", pieces, kinds, _scores(pieces, merges), (), _prefixed(told)
        )
    if not merges:
        raise ModelError(
            "GGUF: the tokenizer has one token for each byte and no merges, which llama.cpp needs; "
            "leave export.gguf out."
        )
    return Vocabulary("gpt2", _rule(told), pieces, kinds, (), merges, False)


def _kind(number: int, piece: str, tokenizer: PreTrainedTokenizerBase, sentencepiece: bool) -> int:
    added = tokenizer.added_tokens_decoder.get(number)
    if sentencepiece and piece == tokenizer.unk_token:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER_DEFINED
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return BYTE if sentencepiece and is_byte else NORMAL


def _scores(pieces: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return scores under which the pair that merges first scores highest.

    SentencePiece's own are minus the piece's place in the order of learning; transformers makes the list
    of merges from them, in that order (convert_slow_tokenizer.py).
    """
    place: dict[str, int] = {}
    for at, pair in enumerate(merges):
        place.setdefault(pair.replace(" ", ""), at)
    return [-float(place.get(piece, len(merges))) for piece in pieces]


def _prefixed(told: dict[str, Any]) -> bool:
    """Return whether a space is put before a text: a normalizer or a pre-tokenizer says so."""
    parts = [*_parts(told.get("normalizer")), *_parts(told.get("pre_tokenizer"))]
    return any(
        part["type"] == "Prepend"
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    several: list[dict[str, Any]] | None = part.get("pretokenizers") or part.get("normalizers")
    return several if several is not None else [part]


def _rule(told: dict[str, Any]) -> str:
    """Return the name of the rule by which a byte-level tokenizer splits texts."""
    steps = []
    for part in _parts(told.get("pre_tokenizer")):
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                steps.append("bytes" if regex else "whole")
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                steps.append(pattern)
            case _:
                steps.append(f"{part['type']} with other settings")
    plain = all(part["type"] == "NFC" for part in _parts(told.get("normalizer")))
    if tuple(steps) not in RULES or not plain:
        raise ModelError(
            "GGUF: the tokenizer splits texts by a rule that has no name here "
            f"({', '.join(steps) or 'none'}{'' if plain else ', after another normalizer'}); {OTHER}."
        )
    return RULES[tuple(steps)]


def write(
    writer: GGUFWriter,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    ends: Sequence[int],
) -> None:
    """Put a vocabulary, the special tokens and the chat template into a GGUF file.

    Args:
        ends: the tokens that end an answer, eos first.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(list(vocabulary.pieces))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.prefixed)
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (next((end for end in ends if end != tokenizer.eos_token_id), None), writer.add_eot_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(bool(leading_bos(tokenizer)))
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)
