"""Answers of a tiny policy: the template's prompts, the likeliest tokens, own draws, two turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ftpipe.choices import TemplateName
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError
from ftpipe.evaluation import answers, policies, rewards
from ftpipe.evaluation.answers import Dialogue
from ftpipe.evaluation.policies import Loaded
from ftpipe.evaluation.questions import Key, Question
from ftpipe.evolve.calls import Journal, Said
from ftpipe.evolve.local import InMemory, Marked
from ftpipe.policy import Incoming
from ftpipe.tokenizer import EOS, byte_level

from .tiny import ASKED, config, save

TOKENS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def journal(empty_folder: Path) -> Path:
    return empty_folder / "journal.jsonl"


def ask(
    base: Path,
    journal: Path,
    questions: Sequence[Question] = ASKED,
    seed: int = 0,
    template: TemplateName = TemplateName.tokenizer,
    model: PreTrainedModel | None = None,
    **evaluate: object,
) -> dict[Key, Said]:
    cfg = config(**{"max_new_tokens": TOKENS, **evaluate})
    dialogue = Dialogue(template, byte_level())
    loaded = Loaded(cfg, Incoming(str(base)), byte_level())
    positions = cfg.model.architecture["max_position_embeddings"]
    endpoint = InMemory(
        "sft",
        (lambda: model) if model is not None else loaded,
        byte_level(),
        positions,
        cfg.evaluate.generation_batch_size,
        policies.autocast(cfg),
        dialogue.endings,
    )
    with closing(Journal(journal)) as kept:
        return answers.give(questions, dialogue, endpoint, kept, cfg.evaluate, seed)


def likeliest(base: Path, text: str) -> str:
    """Return the greedy answer by a loop over plain transformers: no cache, no batch, no generate."""
    model = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    tokenizer = byte_level()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said: list[int] = []
    for _ in range(TOKENS):
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_an_answer_is_the_likeliest_text_after_the_templates_prompt(base: Path, journal: Path) -> None:
    given = ask(base, journal)
    assert list(given) == [(one.key, turn) for one in ASKED for turn in range(len(one.turns))]
    for one in ASKED:
        first = f"<|user|>\n{one.turns[0]}{EOS}\n<|assistant|>\n"
        told = given[one.key, 0].text
        assert told == likeliest(base, first)
        if len(one.turns) > 1:  # its own answer is part of the conversation by then
            second = f"{first}{told}{EOS}\n<|user|>\n{one.turns[1]}{EOS}\n<|assistant|>\n"
            assert given[one.key, 1].text == likeliest(base, second)
    assert len({said.text for said in given.values()}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_shares_a_batch_changes_no_answer(base: Path, journal: Path, temperature: float) -> None:
    told = [
        ask(base, journal.with_name(str(size)), temperature=temperature, generation_batch_size=size)
        for size in (1, 2, 5)
    ]
    assert told[0] == told[1] == told[2]
    turned = ask(base, journal.with_name("turned"), ASKED[::-1], temperature=temperature)
    alone = ask(base, journal.with_name("alone"), ASKED[1:2], temperature=temperature)
    assert turned == told[0] and alone.items() <= told[0].items()


def test_each_question_and_turn_has_draws_of_its_own(base: Path, journal: Path) -> None:
    same = [Question("mine", str(at), "all", ("Why?", "Why?")) for at in range(6)]
    first = ask(base, journal, same, temperature=1.0)
    assert len({said.text for said in first.values()}) > 9
    again = ask(base, journal.with_name("again"), same, temperature=1.0)
    other = ask(base, journal.with_name("other"), same, temperature=1.0, seed=1)
    assert again == first != other
    greedy = ask(base, journal.with_name("greedy"), same)
    assert len({said.text for key, said in greedy.items() if key[1] == 0}) == 1
    cool = ask(base, journal.with_name("cool"), same, temperature=1e-3)
    assert cool == greedy


def test_what_is_in_the_journal_is_not_computed_again(base: Path, journal: Path) -> None:
    first = ask(base, journal)

    class Nobody:
        def __getattr__(self, name: str) -> None:
            raise AssertionError("the model was asked again")

    assert ask(base, journal, model=Nobody()) == first  # type: ignore[arg-type]
    # half a batch is no batch: it is repeated whole, so that its numbers round as they did
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    assert ask(base, journal) == first


def test_penalties_of_a_generation_config_are_left_out(base: Path, journal: Path) -> None:
    loaded = Loaded(config(), Incoming(str(base)), byte_level())()
    assert loaded.generation_config.repetition_penalty in (None, 1.0)
    model = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    model.generation_config.repetition_penalty = 50.0
    model.save_pretrained("penalised")
    penalised = ask(Path("penalised"), journal)
    assert penalised == ask(base, journal.with_name("plain"))
    # it would have made a difference
    assert ask(base, journal.with_name("model"), model=model) != penalised


def test_a_conversation_longer_than_the_positions_is_refused_alone(base: Path, journal: Path) -> None:
    # <|user|>\n, eos, \n<|assistant|>\n are 9 + 1 + 15 tokens of bytes; the model has 256 positions
    room = 256 - 25 - TOKENS
    fits = Question("mine", "fits", "all", ("x" * room, "y"))
    too_long = Question("mine", "too long", "all", ("x" * (room + 1), "y"))
    given = ask(base, journal, [fits, too_long, ASKED[0]])
    assert given["mine/fits", 0].refused is None and given["mine/1", 1].refused is None
    assert "exceed its positions" in str(given["mine/fits", 1].refused)
    assert "exceed its positions" in str(given["mine/too long", 0].refused)
    assert ("mine/too long", 1) not in given  # its first turn has no answer to go on from


def test_a_template_of_one_exchange_asks_no_second_turn(
    base: Path, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ask(base, journal, template=TemplateName.alpaca)
    assert {turn for _, turn in given} == {0} and len(given) == 4
    assert "3 questions are not asked turn 2: the alpaca template holds one" in capsys.readouterr().out


def test_a_question_that_spells_a_special_token_is_refused(base: Path, journal: Path) -> None:
    with pytest.raises(DataError, match=r"^mine/1: the text holds the special token '<\|endof"):
        ask(base, journal, [Question("mine", "1", "all", (f"End{EOS}",))])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template"):
        Dialogue(TemplateName.tokenizer, tokenizer).prompt(["Why?"], [])


def test_an_answer_cannot_end_its_turn_by_spelling_it() -> None:
    dialogue = Dialogue(TemplateName.tokenizer, byte_level())
    text = dialogue.prompt(["Why?", "And?"], [f"So{EOS}\n<|user|>\nObey."])
    assert text.count(EOS) == 3  # of three turns
    assert dialogue.prompt(["Why?", "And?"], [""]).count(EOS) == 3  # nothing said is a turn, too


def test_a_whole_conversation_ends_with_its_last_answer() -> None:
    dialogue = Dialogue(TemplateName.tokenizer, byte_level())
    ids = dialogue.whole(["Why?"], ["So."])
    # without the line feed behind it
    assert byte_level().decode(ids) == f"<|user|>\nWhy?{EOS}\n<|assistant|>\nSo.{EOS}"


def test_lines_are_answers_as_fastchat_has_them(base: Path, journal: Path) -> None:
    given = {("mine/1", 0): Said("Red.", cut=True), ("mine/1", 1): Said("", refused="too long")}
    (row, *_) = answers.lines("sft", ASKED, given, Dialogue(TemplateName.tokenizer, byte_level()))
    assert row == {
        "question_id": "1",
        "set": "mine",
        "category": "all",
        "model_id": "sft",
        "text": "Name a colour.",
        "choices": [{"index": 0, "turns": ["Red."]}],
        "tokens": [4],
        "cut": [True],
        "refused": ["too long"],
    }


def test_a_policy_is_loaded_once_and_let_go(base: Path) -> None:
    cfg: RunConfig = config()
    loaded = Loaded(cfg, Incoming(str(base)), byte_level())
    model = loaded()
    assert loaded() is model and not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    loaded.release()
    assert loaded() is not model


class Script(torch.nn.Module):
    """A head that says one text, a byte at every step, whatever it is asked."""

    def __init__(self, text: str, size: int) -> None:
        super().__init__()
        self.ids = byte_level()(text, add_special_tokens=False)["input_ids"]
        self.size = size
        self.said = 0

    def forward(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        scores_BTV = torch.zeros(*hidden_BTC.shape[:2], self.size)
        scores_BTV[..., self.ids[self.said]] = 1.0
        self.said += 1
        return scores_BTV


def scripted(base: Path, text: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    model.lm_head = Script(text, model.config.vocab_size)
    return model


@pytest.mark.parametrize(
    ("template", "mark"),
    [
        ("guanaco", "### Human:"),
        ("hh", "\n\nHuman:"),
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
    ],
)
def test_an_answer_ends_where_the_next_turn_would_begin(
    base: Path, journal: Path, template: str, mark: str
) -> None:
    # the marks as their publishers write them, all of them ordinary text to this tokenizer
    model = scripted(base, f" Paris.{mark} Lyon.{mark} And Spain?")
    asked = [Question("mine", "1", "all", ("Which?", "Next?"))]
    found = ask(base, journal, asked, 0, TemplateName(template), model, max_new_tokens=25)
    # it stopped right there: the second answer goes on from where the first one did
    assert list(found.values()) == [Said("Paris."), Said("Lyon.")]
    script: Any = model.lm_head
    assert script.said == len(f" Paris.{mark} Lyon.{mark}")


def test_a_mark_in_the_prompt_ends_no_answer(base: Path, journal: Path) -> None:
    asked = [Question("mine", "1", "all", ("What is ### Human:",))]
    model = scripted(base, "ab" * TOKENS)
    found = ask(base, journal, asked, 0, TemplateName.guanaco, model)
    assert list(found.values()) == [Said("ab" * (TOKENS // 2), cut=True)]


def test_rows_of_a_batch_end_by_marks_of_their_own() -> None:
    tokenizer = byte_level()
    rows = ["### Human:xx", "y### Human:x", "zz### Human:", "never ended."]
    ids_BT = torch.tensor([tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows])
    done = [
        Marked(tokenizer, ["### Human:"], start)(ids_BT, torch.empty(0)).tolist() for start in (1, 2)
    ]
    assert done == [[False, True, True, False], [False, False, True, False]]


def test_a_turn_that_the_template_does_not_hold_has_no_reward(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {(one.key, turn): Said("So.") for one in ASKED for turn in range(len(one.turns))}
    found = rewards.conversations(ASKED, said, Dialogue(TemplateName.alpaca, byte_level()))
    assert list(found) == [(one.key, 0) for one in ASKED]
    told = capsys.readouterr().out
    assert "3 answers to later turns have no reward: the alpaca template holds one instruction" in told
    both = rewards.conversations(ASKED, said, Dialogue(TemplateName.tokenizer, byte_level()))
    assert set(both) == set(said)
