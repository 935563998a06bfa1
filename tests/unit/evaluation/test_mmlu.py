"""MMLU: its prompts against a published file, its answers against a plain count of each choice."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from ftpipe import stopping
from ftpipe.benchmark_config import MmluConfig
from ftpipe.choices import MmluMethod
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.evaluation import continuations, mmlu
from ftpipe.evaluation.mmlu_prompts import CATEGORIES, LETTERS, category, questions
from ftpipe.tokenizer import byte_level
from tests.unit.evaluation.benchmarks import TABLES, adapted, plain_logp, tiny, write_tables

FIRST = "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
SHOTS = [
    "Who signs a treaty?\nA. A\nB. The president\nC. Nobody\nD. All\nAnswer: B\n\n",
    'What was the "Long Telegram"?\nA. A cable\nB. A song\nC. A ship\nD. A law\nAnswer: A\n\n',
]
ASKED = "Which doctrine is of 1823?\nA. Truman's\nB. Monroe's\nC. Nixon's\nD. None\nAnswer:"
# the right letters of TABLES, by subject in the order of their names
RIGHT = "ACD" + "BA"

Models = Callable[[str], Any]


@pytest.fixture(scope="module")
def models() -> Models:
    made: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            made[kind] = adapted(tiny("gpt2")) if kind == "gpt2 with LoRA" else tiny(kind)
        return made[kind]

    return model


def config(**keys: Any) -> RunConfig:
    cfg = RunConfig()
    cfg.evaluate.mmlu = MmluConfig(**keys)
    return cfg


def tables(folder: Path, **keys: Any) -> RunConfig:
    return config(**{"path": str(write_tables(folder / "mmlu")), "shots": 1, **keys})


def measured(cfg: RunConfig, model: Any, out: Path, tokenizer: Any = None) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    mmlu.run(cfg, model, tokenizer or byte_level(), out)
    lines = (out / "mmlu-answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- prompts ---


def test_a_prompt_is_a_header_examples_and_the_question(tmp_path: Path) -> None:
    cfg = tables(tmp_path, shots=2)
    asked = questions(cfg.evaluate.mmlu)
    assert [LETTERS[one.answer] for one in asked] == list(RIGHT)
    assert [one.subject for one in asked] == ["anatomy"] * 3 + ["us_foreign_policy"] * 2
    one = asked[3]
    assert one.where == "test/us_foreign_policy_test.csv, row 1"
    assert one.prompt(2) == FIRST + SHOTS[0] + SHOTS[1] + ASKED
    assert one.prompt(1) == FIRST + SHOTS[0] + ASKED  # the last example goes first
    assert one.prompt(0) == FIRST + ASKED
    fewer = questions(tables(tmp_path / "fewer", shots=1).evaluate.mmlu)[3]
    assert fewer.prompt(5) == FIRST + SHOTS[0] + ASKED
    none = questions(tables(tmp_path / "none", shots=0).evaluate.mmlu)[3]
    assert none.prompt(5) == FIRST + ASKED


def test_a_subject_a_limit_and_a_split_choose_the_questions(tmp_path: Path) -> None:
    keys = {"limit": 1, "subjects": ["us_foreign_policy"]}
    (one,) = questions(tables(tmp_path, **keys).evaluate.mmlu)
    assert one.where == "test/us_foreign_policy_test.csv, row 1"
    asked = questions(tables(tmp_path, split="dev", shots=0, limit=1).evaluate.mmlu)
    assert [one.where for one in asked] == [
        "dev/anatomy_dev.csv, row 1",
        "dev/us_foreign_policy_dev.csv, row 1",
    ]


def test_an_archive_is_a_folder_and_five_is_the_number_of_shots(tmp_path: Path) -> None:
    five = {
        subject: {"test": splits["test"], "dev": (splits["dev"] * 3)[:5]}
        for subject, splits in TABLES.items()
    }
    folder = write_tables(tmp_path / "mmlu", five)
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        for file in folder.rglob("*.csv"):
            archive.write(file, f"data/{file.relative_to(folder).as_posix()}")
    asked = questions(MmluConfig(path=str(tmp_path / "mmlu.zip")))
    assert [one.prompt(9) for one in asked] == [
        one.prompt(9) for one in questions(MmluConfig(path=str(folder), shots=5))
    ]
    assert asked[3].prompt(9) == FIRST + "".join([*SHOTS, *SHOTS, SHOTS[0]]) + ASKED


def test_without_examples_the_prompts_are_those_that_qlora_published(shared: Path) -> None:
    folder = shared / "data" / "evaluation"
    own = questions(MmluConfig(path=str(folder / "mmlu.zip"), split="val", shots=0))
    rows = [json.loads(line) for line in (folder / "zero_shot_mmlu_val.json").read_text().splitlines()]
    assert len(own) == len(rows) == 1531
    published = {(row["subject"], row["input"], row["output"]) for row in rows}
    assert {(one.subject, one.prompt(0), LETTERS[one.answer]) for one in own} == published
    ready = questions(MmluConfig(path=str(folder / "zero_shot_mmlu_val.json")))
    assert {(one.subject, one.prompt(0), LETTERS[one.answer]) for one in ready} == published


def test_the_categories_are_lm_evals_but_for_anatomy(shared: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra 'eval')")
    theirs = {}
    for file in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"):
        (tag,) = re.findall(r'"tag": "mmlu_(\w+)_tasks"', file.read_text())
        theirs[file.stem.removeprefix("mmlu_")] = tag
    ours = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}
    # hendrycks/test, categories.py: "anatomy": ["health"], which is in "other (business, health, misc.)"
    assert theirs.pop("anatomy") == "stem" and ours.pop("anatomy") == "other"
    assert ours == theirs and len(ours) == 56
    real = questions(MmluConfig(path=str(shared / "data/evaluation/mmlu.zip"), shots=0, limit=1))
    assert {one.subject for one in real} == {*ours, "anatomy"}
    assert category("tea_tasting") is None


# --- answers ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2 with LoRA"])
def test_a_choice_is_as_likely_as_a_plain_count_finds_it(
    kind: str, models: Models, tmp_path: Path
) -> None:
    model, tokenizer = models(kind), byte_level()
    cfg = tables(tmp_path)
    lines = measured(cfg, model, tmp_path / "out")
    for line, one in zip(lines, questions(cfg.evaluate.mmlu), strict=True):
        text = one.prompt(1)
        prompt = tokenizer(text)["input_ids"]
        # " A" is two tokens of bytes
        plain = [
            plain_logp(model, prompt, tokenizer(f"{text} {letter}")["input_ids"][len(prompt) :])
            for letter in LETTERS
        ]
        assert line["logps"] == pytest.approx(plain, abs=1e-4)
        assert line["chosen"] == LETTERS[plain.index(max(plain))]
        assert (line["answer"], line["shots"], line["cut"]) == (LETTERS[one.answer], 1, False)
    assert len({line["chosen"] for line in lines}) > 1  # else the choice would prove little


def test_qloras_way_asks_for_the_letters_own_token_after_bos(models: Models, tmp_path: Path) -> None:
    model, tokenizer = models("llama"), byte_level()
    tokenizer.bos_token = tokenizer.eos_token
    rows = [
        {"subject": "b", "input": "Is it so?\nAnswer:", "output": "B"},
        {"subject": "a", "input": "Is it not, or\nis it?\nAnswer:", "output": "D"},
    ]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(path=str(tmp_path / "rows.json"), method=MmluMethod.qlora)
    lines = measured(cfg, model, tmp_path / "out", tokenizer)
    assert [line["subject"] for line in lines] == ["a", "b"]
    for line, row in zip(lines, rows[::-1], strict=True):
        prompt = [tokenizer.eos_token_id, *tokenizer(row["input"])["input_ids"]]
        plain = [plain_logp(model, prompt, tokenizer(letter)["input_ids"]) for letter in LETTERS]
        assert line["logps"] == pytest.approx(plain, abs=1e-4)
        assert line["answer"] == row["output"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2 with LoRA"])
def test_neither_padding_nor_the_batch_changes_an_answer(
    kind: str, models: Models, tmp_path: Path
) -> None:
    found = []
    for size in (1, 2, 5):
        cfg = tables(tmp_path, batch_size=size)
        found.append(measured(cfg, models(kind), tmp_path / f"out{size}"))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert one["logps"] == pytest.approx(same["logps"], abs=1e-4)
            assert {**one, "logps": 0} == {**same, "logps": 0}


def test_a_real_model_is_asked_real_questions(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True).eval()
    keys = {"subjects": ["anatomy", "virology"], "limit": 3, "shots": 1, "batch_size": 4}
    cfg = config(path=str(shared / "data" / "evaluation" / "mmlu.zip"), **keys)
    lines = measured(cfg, model, tmp_path, tokenizer)
    assert len(lines) == 6
    for line, one in zip(lines, questions(cfg.evaluate.mmlu), strict=True):
        text = one.prompt(1)
        prompt = tokenizer(text)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id
        ends = [tokenizer(f"{text} {letter}")["input_ids"][len(prompt) :] for letter in LETTERS]
        assert [len(end) for end in ends] == [2, 1, 2, 2]  # its 512 pieces have " B" alone
        assert line["logps"] == pytest.approx([plain_logp(model, prompt, end) for end in ends], abs=1e-4)
    # the first token of "A", "C" and "D" is one and the same: QLoRA's way tells nothing here
    cfg.evaluate.mmlu.method = MmluMethod.qlora
    with pytest.raises(ModelError, match="the same tokens for several letters"):
        mmlu.run(cfg, model, tokenizer, tmp_path)


def test_one_row_serves_all_continuations_that_differ_in_their_last_token() -> None:
    shared_row = continuations.Asked([1, 2], ((7, 3), (7, 4), (8, 3), (9,)))
    assert shared_row.rows() == [(1, 2, 7), (1, 2, 8), (1, 2)]
    assert [shared_row.row_of(at) for at in range(4)] == [0, 0, 1, 2]


def test_continuations_of_unlike_lengths_are_each_counted_whole(models: Models) -> None:
    model = models("gpt2")
    prompts = [[3, 4, 5, 6, 7, 8, 9], [10, 11]]
    choices: tuple[tuple[int, ...], ...] = ((7, 3, 9), (7, 4), (8, 3, 2, 1), (9,))
    found = continuations.logps(model, [continuations.Asked(one, choices) for one in prompts], pad=0)
    for prompt, row in zip(prompts, found, strict=True):
        assert row == pytest.approx([plain_logp(model, prompt, list(one)) for one in choices], abs=1e-4)


# --- room ---


def test_what_does_not_fit_loses_examples_and_then_its_start(models: Models, tmp_path: Path) -> None:
    # bytes are tokens: a prompt takes its length, and " A" one more that is read
    cfg = tables(tmp_path, shots=2, subjects=["us_foreign_policy"])
    first, _ = questions(cfg.evaluate.mmlu)
    for lost, room in ((0, len(first.prompt(2)) + 1), (1, len(first.prompt(2)))):
        cfg.evaluate.mmlu.max_length = room
        line, other = measured(cfg, models("llama"), tmp_path / f"out{lost}")
        assert (line["shots"], line["cut"]) == (2 - lost, False)
        assert other["shots"] == 2  # it is shorter
        record = json.loads((tmp_path / f"out{lost}" / "mmlu.json").read_text())
        assert (record["fewer_shots"], record["cut"], record["max_length"]) == (lost, 0, room)
    cfg.evaluate.mmlu.max_length = 60
    line, _ = measured(cfg, models("llama"), tmp_path / "cut")
    assert (line["shots"], line["cut"]) == (0, True)
    tokenizer = byte_level()
    kept = tokenizer(ASKED[-59:])["input_ids"]
    ends = [tokenizer(f" {letter}")["input_ids"] for letter in LETTERS]
    plain = [plain_logp(models("llama"), kept, end) for end in ends]
    assert line["logps"] == pytest.approx(plain, abs=1e-4)
    assert json.loads((tmp_path / "cut" / "mmlu.json").read_text())["cut"] == 2


def test_the_models_own_length_is_the_most(models: Models, tmp_path: Path) -> None:
    cfg = tables(tmp_path, max_length=513)
    for kind in ("llama", "gpt2", "gpt2 with LoRA"):
        with pytest.raises(ConfigError, match=r"max_length=513 is more than the 512 tokens that"):
            mmlu.run(cfg, models(kind), byte_level(), tmp_path)
    assert list(tmp_path.glob("mmlu-*")) == []


# --- scores ---


def test_micro_macro_categories_and_subjects(models: Models, tmp_path: Path) -> None:
    more = {**TABLES, "virology": {**TABLES["anatomy"], "test": TABLES["anatomy"]["test"][:2]}}
    cfg = config(path=str(write_tables(tmp_path / "mmlu", more)), shots=1)
    found = mmlu.run(cfg, models("llama"), byte_level(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "mmlu-answers.jsonl").read_text().splitlines()]
    right = [line["answer"] == line["chosen"] for line in lines]
    ana, usf, vir = right[:3], right[3:5], right[5:]
    assert len(vir) == 2 and 0 < sum(right) < 7
    assert found["mmlu"].value == pytest.approx(sum(right) / 7)
    assert found["mmlu/macro"].value == pytest.approx((sum(ana) / 3 + sum(usf) / 2 + sum(vir) / 2) / 3)
    assert found["mmlu/other"].value == pytest.approx(sum(ana + vir) / 5)
    assert found["mmlu/social_sciences"].value == pytest.approx(sum(usf) / 2)
    assert set(found) == {"mmlu", "mmlu/macro", "mmlu/other", "mmlu/social_sciences"}
    record = json.loads((tmp_path / "mmlu.json").read_text())
    scores = record["scores"]
    subjects = {f"mmlu/subject/{subject}" for subject in more}
    assert set(scores) == {*found, *subjects}
    for name, part in (("mmlu", right), ("mmlu/subject/anatomy", ana), ("mmlu/other", ana + vir)):
        ends = binomtest(sum(part), len(part)).proportion_ci(method="wilson")
        assert (scores[name]["low"], scores[name]["high"]) == pytest.approx((ends.low, ends.high))
        assert (scores[name]["n"], scores[name]["interval"]) == (len(part), "Wilson")
        assert scores[name]["higher_is_better"] is True
    assert (record["questions"], record["subjects"], record["shots"]) == (7, 3, 1)
    chosen = [line["chosen"] for line in lines]
    assert record["chosen"] == {letter: chosen.count(letter) for letter in LETTERS}


def test_the_macro_mean_has_the_error_of_a_stratified_one() -> None:
    score = mmlu.macro([[1, 0], [1, 1, 0, 0], [1, 1, 1]])
    # by hand: p = 1/2, 1/2, 1; variances 1/4 / 1, 1/4 / 3, 0; z = 1.959964
    assert score.value == pytest.approx(2 / 3)
    half = 1.959963985 * (1 / 4 + 1 / 12) ** 0.5 / 3
    assert score.low == pytest.approx(2 / 3 - half)
    assert score.high == 1 < 2 / 3 + half  # no share is more
    assert score.n == 9 and str(score.interval) == "stratified"
    four = mmlu.macro([[1, 1, 0, 0]] * 4)
    half = 1.959963985 * (4 * 1 / 12) ** 0.5 / 4
    assert [four.low, four.high] == pytest.approx([0.5 - half, 0.5 + half])
    lone = mmlu.macro([[1, 0], [1]])  # nothing is known of the spread within a subject of one
    assert (lone.value, lone.low, lone.high) == (0.75, None, None)


def test_the_record_tells_prompts_apart(models: Models, tmp_path: Path) -> None:
    prompts = []
    for name, keys in (("a", {}), ("b", {"shots": 0}), ("c", {"method": MmluMethod.qlora})):
        (tmp_path / name).mkdir()
        cfg = tables(tmp_path / name, **keys)
        measured(cfg, models("llama"), tmp_path / name)
        prompts.append(json.loads((tmp_path / name / "mmlu.json").read_text())["prompts"])
    assert len(set(prompts)) == 3


def test_nothing_is_measured_where_nothing_is_asked(tmp_path: Path) -> None:
    assert mmlu.run(RunConfig(), None, byte_level(), tmp_path) == {}  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- going on ---


def test_what_was_answered_before_an_end_is_not_asked_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("llama")
    cfg = tables(tmp_path, batch_size=2)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    measured(cfg, model, whole)
    halved.mkdir()
    (tmp_path / "stop").touch()
    rows: list[int] = []
    real = continuations.logps

    def counted(model: Any, asked: Any, pad: int) -> list[list[float]]:
        rows.append(len(asked))
        return real(model, asked, pad)

    monkeypatch.setattr(continuations, "logps", counted)
    journal = halved / "mmlu-answers.jsonl"
    for done in (2, 4):
        with monkeypatch.context() as patch:
            patch.setenv(stopping.FILE, str(tmp_path / "stop"))
            with pytest.raises(stopping.Stopped, match=f"with {done} questions of MMLU answered"):
                mmlu.run(cfg, model, byte_level(), halved)
        assert not (halved / "mmlu.json").exists()
        if done == 2:  # a kill tears a line; another is damaged
            journal.write_bytes(journal.read_bytes() + b'{"key": "damaged\n{"key": "torn')
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(others))  # half of a batch is asked again as a whole
    measured(cfg, model, halved)
    assert rows == [2, 2, 2, 1] and len(first) > 20
    for name in ("mmlu.json", "mmlu-answers.jsonl"):
        assert (halved / name).read_bytes() == (whole / name).read_bytes()
    rows.clear()
    measured(cfg, model, halved)  # and a finished one is read back
    assert rows == []
    assert (halved / "mmlu-answers.jsonl").read_bytes() == (whole / "mmlu-answers.jsonl").read_bytes()


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"subjects": ["anatomi"]},
            r"subjects: no subject 'anatomi'\. Did you mean 'anatomy'\? Known: ",
        ),
        ({"shots": 3}, r"shots=3, but the split dev has 2 examples of anatomy\."),
        ({"split": "tests"}, r"no split 'tests'\. Did you mean 'test'\? Known: dev, test\."),
        ({"path": "none.zip"}, r"no file none\.zip \(evaluate\.mmlu\.path\); it was looked for from "),
    ],
)
def test_questions_that_cannot_be_had_are_one_sentence(
    keys: dict[str, Any], said: str, empty_folder: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=said) as refused:
        questions(tables(empty_folder, **keys).evaluate.mmlu)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"subject": "a", "input": "Q", "output": "E"},
            "line 1: the answer is 'E', not one of A, B, C, D.",
        ),
        ({"subject": "a", "output": "A"}, "line 1 has no text 'input'; rows of ready prompts"),
        ({"subject": 3, "input": "Q", "output": "A"}, "line 1 has no text 'subject'"),
    ],
)
def test_a_row_that_is_no_question_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as refused:
        questions(MmluConfig(path=str(tmp_path / "rows.jsonl")))
    assert said in str(refused.value)


def test_a_letter_that_is_no_answer_is_named(tmp_path: Path) -> None:
    rows = {"x": {"test": [["Q", "1", "2", "3", "4", "E"]], "dev": []}}
    cfg = config(path=str(write_tables(tmp_path, rows)), shots=0)
    with pytest.raises(DataError, match=r"x_test\.csv, row 1: the answer is 'E'"):
        questions(cfg.evaluate.mmlu)


def test_a_tokenizer_that_cannot_ask_is_refused() -> None:
    class Ending:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text), 0]}

    class Blind(Ending):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text)}

    for tokenizer, said in ((Ending(), "puts tokens after the end"), (Blind(), "the same tokens for")):
        with pytest.raises(ModelError, match=said):
            mmlu.letter_tokens(tokenizer, MmluMethod.hendrycks)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the same tokens for several letters"):
        mmlu.letter_tokens(Blind(), MmluMethod.qlora)  # type: ignore[arg-type]
