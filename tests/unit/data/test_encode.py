"""Which tokens are learned: checked token by token against the bytes that each one spells."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftpipe.choices import Role, TemplateName
from ftpipe.data.encode import Encoded, encode
from ftpipe.data.example import Turn
from ftpipe.data.pieces import Piece
from ftpipe.data.templates import render
from tests.unit.data.toys import TOYS, Toy, bytes_only, fast, few, gpt2_bytes, repeatable

S, U, A = Role.system, Role.user, Role.assistant
LEARN = [{A}, {U, A}, {U}, {S, U, A}]
NAMED = [name for name in TemplateName if name is not TemplateName.tokenizer]


class Part(NamedTuple):
    """A stretch of the published text: who learns it, and whether it is part of what was said."""

    text: str
    role: Role | None = None
    said: bool = True


class Talk(NamedTuple):
    system: str
    exchanges: list[tuple[str, str]]

    @property
    def turns(self) -> tuple[Turn, ...]:
        opening = [Turn(S, self.system)] if self.system else []
        spoken = [turn for user, answer in self.exchanges for turn in (Turn(U, user), Turn(A, answer))]
        return (*opening, *spoken)


def published(name: TemplateName, talk: Talk, toy: Toy) -> list[Part]:
    """Return the published text of a conversation in parts, without the bos in front."""
    eos = toy.tokenizer.eos_token
    if name in WHOLES:
        bos = toy.tokenizer.bos_token if toy.adds_bos else ""
        return [part for part in WHOLES[name](talk, bos, eos) if part.text]
    opening = [part for part in OPENINGS[name](talk.system, eos) if part.text]
    exchanges = [part for pair in talk.exchanges for part in EXCHANGES[name](*pair, eos)]
    if name in ONE_EOS:
        exchanges.append(Part(eos, A))
    if name is TemplateName.chatml and eos != "<|im_end|>":
        exchanges[-1] = Part(eos, A)  # in place of the last newline
    return opening + exchanges


def llama2(talk: Talk, bos: str, eos: str) -> list[Part]:
    parts: list[Part] = []
    for number, (user, answer) in enumerate(talk.exchanges):
        parts.append(Part((bos if number else "") + "[INST] "))
        if talk.system and not number:
            parts += [Part("<<SYS>>\n"), Part(talk.system, S), Part("\n<</SYS>>\n\n")]
            parts.append(Part(user.rstrip(), U))
        else:
            parts.append(Part(user.strip(), U))
        parts += [Part(" [/INST]"), Part(f" {answer.strip()} {eos}", A)]
    return parts


def llama3(talk: Talk, _: str, eos: str) -> list[Part]:
    parts = []
    for turn in talk.turns:
        parts.append(Part(f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n"))
        parts.append(Part(turn.text.strip() + "<|eot_id|>", turn.role))
    return [*parts, Part(eos, A)]


def mistral(talk: Talk, _: str, eos: str) -> list[Part]:
    parts = [Part(" [INST] "), Part(talk.system, S), Part("\n\n" if talk.system else "")]
    for user, answer in talk.exchanges:
        parts += [Part(user, U), Part(" [/INST]"), Part(f" {answer}{eos}", A), Part(" [INST] ")]
    return parts[:-1]


def zephyr(talk: Talk, _: str, eos: str) -> list[Part]:
    parts = []
    for turn in talk.turns:
        parts += [Part(f"<|{turn.role}|>\n"), Part(turn.text + eos, turn.role), Part("\n")]
    return parts


WHOLES = {
    TemplateName.llama2: llama2,
    TemplateName.llama3: llama3,
    TemplateName.mistral: mistral,
    TemplateName.zephyr: zephyr,
}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ONE_EOS = (TemplateName.guanaco, TemplateName.hh)  # at the end of the whole text
# What each template puts in front for a system prompt, which may be empty.
OPENINGS: dict[TemplateName, Callable[[str, str], list[Part]]] = {
    TemplateName.plain: lambda system, _: [Part(system and system + "\n\n", S)],
    TemplateName.alpaca: lambda *_: [],
    TemplateName.guanaco: lambda system, _: [Part(system and system + "\n", S)],
    TemplateName.hh: lambda system, _: [Part(system, S)],
    TemplateName.vicuna: lambda system, _: [Part(system or VICUNA, S if system else None), Part(" ")],
    TemplateName.wizardlm: lambda system, _: [Part(system and system + "\n\n", S)],
    TemplateName.oasst: lambda system, eos: (
        [Part("<|system|>"), Part(system + eos, S)] if system else []
    ),
    TemplateName.chatml: lambda system, _: (
        [Part("<|im_start|>system\n"), Part(system + "<|im_end|>", S), Part("\n")] if system else []
    ),
}
# What each template makes of a question and its answer.
EXCHANGES: dict[TemplateName, Callable[[str, str, str], list[Part]]] = {
    TemplateName.plain: lambda user, answer, eos: [Part(user, U), Part(f" {answer}{eos}", A)],
    TemplateName.alpaca: lambda user, answer, eos: [
        Part(
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{user}\n\n### Response:"
        ),
        Part(answer + eos, A),
    ],
    TemplateName.guanaco: lambda user, answer, _: [
        *(Part("### Human:", U, said=False), Part(" " + user, U)),
        *(Part("### Assistant:", A, said=False), Part(" " + answer, A)),
    ],
    TemplateName.hh: lambda user, answer, _: [
        *(Part("\n\nHuman:"), Part(" " + user, U)),
        *(Part("\n\nAssistant:"), Part(" " + answer, A)),
    ],
    TemplateName.vicuna: lambda user, answer, eos: [
        *(Part("USER:"), Part(f" {user}", U)),
        *(Part(" ASSISTANT:"), Part(f" {answer}{eos}", A)),
    ],
    TemplateName.wizardlm: lambda user, answer, eos: [
        *(Part(user + "\n\n", U), Part("### Response:"), Part(answer + eos, A)),
    ],
    TemplateName.oasst: lambda user, answer, eos: [
        *(Part("<|prompter|>"), Part(user + eos, U)),
        *(Part("<|assistant|>"), Part(answer + eos, A)),
    ],
    TemplateName.chatml: lambda user, answer, _: [
        *(Part("<|im_start|>user\n"), Part(user + "<|im_end|>", U), Part("\n")),
        *(Part("<|im_start|>assistant\n"), Part(answer + "<|im_end|>", A), Part("\n")),
    ],
}


def as_tokenized(parts: list[Part], toy: Toy) -> list[Part]:
    """Put bos in front, and a space where the tokenizer puts one: before text after a special token."""
    bos = [Part(toy.tokenizer.bos_token)] if toy.adds_bos else []
    special = re.compile(f"({'|'.join(map(re.escape, toy.specials))})")  # split() keeps a group
    cut: list[Part] = []
    at_start = True
    for part in [*bos, *parts]:
        for text in filter(None, special.split(part.text)):
            bare = at_start and toy.prefixed and not special.fullmatch(text) and text[0] != " "
            at_start = bool(special.fullmatch(text))
            cut.append(part._replace(text=" " + text if bare else text))
    if toy.tidies:  # it takes away the spaces before a special token
        for at, after in enumerate(cut[1:]):
            if special.fullmatch(after.text):
                cut[at] = cut[at]._replace(text=cut[at].text.rstrip(" "))
    return cut


def spans(parts: list[Part], wanted: Callable[[Part], bool]) -> list[range]:
    """Return the bytes of each wanted part, as places in the whole text."""
    ends = list(accumulate(len(part.text.encode()) for part in parts))
    whole = zip(parts, [0, *ends], ends, strict=False)
    return [range(start, end) for part, start, end in whole if wanted(part)]


def touching(tokens: list[bytes], ranges: list[range]) -> list[int]:
    """Return which tokens spell a byte of the ranges."""
    inside = {byte for places in ranges for byte in places}
    touched, at = [], 0
    for number, token in enumerate(tokens):
        if not inside.isdisjoint(range(at, at + len(token))):
            touched.append(number)
        at += len(token)
    return touched


def encoded(name: TemplateName, talk: Talk, toy: Toy, learn: Collection[Role]) -> Encoded:
    (row,) = encode([render(name, talk.turns, toy.tokenizer)], toy.tokenizer, learn)
    return row


def runs(row: Encoded) -> Iterator[list[int]]:
    """Yield each stretch of learned tokens."""
    for learned, stretch in groupby(row.labels.tolist(), lambda label: label != -100):
        if learned:
            yield list(stretch)


def talks(toy: Toy, most: int = 3) -> st.SearchStrategy[Talk]:
    texts = toy.texts()
    exchanges = st.lists(st.tuples(texts, texts), min_size=1, max_size=most)
    return st.builds(Talk, st.one_of(st.just(""), texts) if most > 1 else st.just(""), exchanges)


@pytest.fixture(params=sorted(TOYS), scope="module")
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]()


@pytest.mark.parametrize("name", NAMED)
@given(data=st.data())
@few
def test_a_token_is_learned_when_it_spells_a_byte_of_a_learned_part(
    data: st.DataObject, toy: Toy, name: TemplateName
) -> None:
    talk = data.draw(talks(toy, 1 if name is TemplateName.alpaca else 3))
    learn = data.draw(st.sampled_from(LEARN))
    row = encoded(name, talk, toy, learn)
    parts = as_tokenized(published(name, talk, toy), toy)
    ids = row.input_ids.tolist()
    tokens = toy.spelled(ids)

    assert b"".join(tokens) == "".join(part.text for part in parts).encode()
    learned = set(touching(tokens, spans(parts, lambda part: part.role in learn)))
    expected = [token if at in learned else -100 for at, token in enumerate(ids)]
    assert row.labels.tolist() == expected
    said = spans(parts, lambda part: part.role is A and part.said)[:1]
    assert row.prompt == touching(tokens, said)[0]
    assert row.supervised == sum(label >= 0 for label in expected[1:])
    assert toy.tokenizer.pad_token_id in (None, toy.tokenizer.eos_token_id) or (
        toy.tokenizer.pad_token_id not in ids
    )
    if toy.adds_bos:
        bos = toy.tokenizer.bos_token_id
        assert ids[0] == bos
        assert ids.count(bos) == (len(talk.exchanges) if name is TemplateName.llama2 else 1)
        assert bos not in expected
    if A in learn:
        reads_as_the_answers(name, talk, toy, encoded(name, talk, toy, {A}), parts)


def reads_as_the_answers(
    name: TemplateName, talk: Talk, toy: Toy, row: Encoded, parts: list[Part]
) -> None:
    """Check what the learned tokens say, by the tokenizer's own decoder, and where they end."""
    near = groupby(parts, lambda part: part.role is A)
    answers = ["".join(part.text for part in stretch) for mine, stretch in near if mine]
    found = list(runs(row))
    assert len(found) == len(answers) == len(row.learned())
    for stretch, answer in zip(found, answers, strict=True):
        decoded = toy.tokenizer.decode(stretch)
        # SentencePiece's decoder takes one space away, which it takes for the one put before the text
        shown = answer.removeprefix(" ") if toy.pieces else answer
        # a token may reach over a border: "?###" is learned for its "?"
        spelled = toy.spelled(stretch)
        spill = len(spelled[0]) - 1 + len(spelled[-1]) - 1
        assert shown in decoded
        assert len(decoded.encode()) - len(shown.encode()) <= spill
    eos = toy.tokenizer.eos_token_id
    own_end = {TemplateName.chatml: "<|im_end|>", TemplateName.llama3: "<|eot_id|>"}.get(name)
    once = name in ONE_EOS or own_end not in (None, toy.tokenizer.eos_token)
    assert row.labels.tolist().count(eos) == (1 if once else len(talk.exchanges))
    assert row.labels[row.labels != -100][-1] == eos


@pytest.mark.parametrize("name", NAMED)
@given(data=st.data())
@repeatable
def test_parts_encoded_alone_give_the_same_row(data: st.DataObject, name: TemplateName) -> None:
    # One token a byte, numbered in the order of GPT-2's alphabet: no tokenizer and no offsets here.
    number = {byte: at for at, (_, byte) in enumerate(sorted(gpt2_bytes().items()))}
    toy = bytes_only()
    talk = data.draw(talks(toy, 1 if name is TemplateName.alpaca else 3))
    learn = data.draw(st.sampled_from(LEARN))
    ids: list[int] = []
    labels: list[int] = []
    for part in published(name, talk, toy):
        for text in re.split("(<[|]endoftext[|]>)", part.text):
            mine = [257] if text == "<|endoftext|>" else [number[byte] for byte in text.encode()]
            ids += mine
            labels += mine if part.role in learn else [-100] * len(mine)
    row = encoded(name, talk, toy, learn)
    assert (row.input_ids.tolist(), row.labels.tolist()) == (ids, labels)


def row_of(ids: list[int], labels: list[int], prompt: int) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), prompt)


def merging(*pairs: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and the given merges."""
    characters = {character: at for at, character in enumerate(sorted(gpt2_bytes()))}
    vocabulary = characters | {left + right: 256 + at for at, (left, right) in enumerate(pairs)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(pairs)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return fast(core, eos_token="<eos>")


def test_a_token_over_the_border_is_learned_with_the_answer() -> None:
    tokenizer = merging((":", "a"), ("b", "!"))
    (row,) = encode([[Piece("Q:"), Piece("ab", A), Piece("!\n")]], tokenizer, {A})
    assert tokenizer.convert_ids_to_tokens(row.input_ids.tolist()) == ["Q", ":a", "b!", "Ċ"]
    assert row.labels.tolist() == [-100, *row.input_ids[1:3], -100]
    assert (row.prompt, row.supervised) == (1, 2)


def test_bytes_of_one_character_are_learned_together() -> None:
    # 🙂 is four bytes, of which only the last two have become one token
    tokenizer = merging(("Ļ", "Ĥ"))
    assert bytes(gpt2_bytes()[character] for character in "ðŁĻĤ") == "🙂".encode()
    (row,) = encode([[Piece("é"), Piece("🙂", A), Piece("é")]], tokenizer, {A})
    assert [label != -100 for label in row.labels] == [False] * 2 + [True] * 3 + [False] * 2


def test_each_row_of_a_batch_has_its_own_mask() -> None:
    alone = [[Piece("Q:"), Piece("long answer", A)], [Piece("A longer question:"), Piece("a", A)]]
    tokenizer = bytes_only().tokenizer
    first, second = encode(alone, tokenizer, {A})
    assert [label != -100 for label in first.labels] == [False] * 2 + [True] * 11
    assert [label != -100 for label in second.labels] == [False] * 18 + [True]
    assert (first.prompt, second.prompt) == (2, 18)


def test_the_prompt_ends_at_the_first_answer_and_holds_the_mark_before_it() -> None:
    pieces = [Piece("q"), Piece("A:", A, words=False), Piece("one", A), Piece("q"), Piece("two", A)]
    (row,) = encode([pieces], bytes_only().tokenizer, {A})
    assert row.prompt == 3
    assert [label != -100 for label in row.labels] == [False] + [True] * 5 + [False] + [True] * 3


def test_a_row_without_an_answer_is_all_prompt() -> None:
    (row,) = encode([[Piece("question", U)]], bytes_only().tokenizer, {A})
    assert (row.prompt, row.supervised, set(row.labels.tolist())) == (8, 0, {-100})


def test_the_first_token_of_a_row_is_predicted_from_nothing() -> None:
    (row,) = encode([[Piece("abc", A)]], bytes_only().tokenizer, {A})
    assert row.labels.tolist() == row.input_ids.tolist()
    assert row.supervised == 2


def test_no_token_is_added_and_none_is_left_out() -> None:
    # a tokenizer.json may ask for padding, truncation and a bos; a row gets none of them
    toy = TOYS["metaspace_always"]()
    toy.tokenizer.backend_tokenizer.enable_truncation(4)
    toy.tokenizer.backend_tokenizer.enable_padding(length=64)
    (row,) = encode([[Piece("the quick brown fox", A)]], toy.tokenizer, {A})
    assert b"".join(toy.spelled(row.input_ids.tolist())) == b" the quick brown fox"
    assert row.labels.tolist() == row.input_ids.tolist()


@pytest.mark.parametrize(
    ("length", "ids", "labels", "prompt"),
    [(4, [5, 6, 7, 8], [-100, -100, 7, 8], 2), (3, [5, 6, 7], [-100, -100, 7], 2), (1, [5], [-100], 1)],
)
def test_a_row_is_cut_at_its_end(length: int, ids: list[int], labels: list[int], prompt: int) -> None:
    cut = row_of([5, 6, 7, 8], [-100, -100, 7, 8], prompt=2).cut(length)
    assert (cut.input_ids.tolist(), cut.labels.tolist(), cut.prompt) == (ids, labels, prompt)


def test_a_row_that_fits_is_not_cut() -> None:
    row = row_of([5, 6, 7], [-100, 6, 7], prompt=1)
    assert row.cut(3) is row
    assert row.cut(4) is row
