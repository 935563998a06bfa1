"""lm-evaluation-harness on models in memory: its tasks from local files, and figures by hand."""

from __future__ import annotations

import builtins
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from ftpipe import logs, stopping
from ftpipe.benchmark_config import HarnessConfig, HarnessTaskConfig
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, ModelError, UserError
from ftpipe.evaluation import harness, harness_tasks, mmlu
from ftpipe.evaluation.mmlu_prompts import CATEGORIES
from ftpipe.tokenizer import byte_level
from tests.unit.evaluation.benchmarks import TABLES, adapted, plain_logp, tiny, write_tables

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra 'eval')")
TASKS = Path(lm_eval.__file__).parent / "tasks"
PACKAGED = harness_tasks.packaged.__wrapped__
pytestmark = pytest.mark.slow  # to import lm-eval alone takes seconds

# rows in the schemas of allenai/ai2_arc, openai/gsm8k, truthfulqa/truthful_qa
ARC = [
    {
        "id": str(number),
        "question": f"What is {number} and one?",
        "choices": {"text": [str(number), str(number + 1), "many"], "label": ["A", "B", "C"]},
        "answerKey": key,
    }
    for number, key in enumerate("BABCAB")
]
GSM = [
    {"question": f"Ann has {n} apples and eats one. How many?", "answer": f"{n} - 1.\n#### {n - 1}"}
    for n in range(3, 7)
]
TRUTH = [
    {
        "question": question,
        "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["Yes.", "Sure.", "No."], "labels": [1, 1, 0]},
    }
    for question in ("Is water wet?", "Do cats meow?", "Is it so?")
]


@pytest.fixture(scope="module", autouse=True)
def few_tasks() -> Iterator[None]:
    """Let lm-eval read some of its 14,000 files: all take it half a minute."""
    from lm_eval.tasks import TaskManager

    folders = ("mmlu/default", "gsm8k", "arc", "truthfulqa", "humaneval", "glue", "belebele", "squadv2")
    manager = TaskManager(include_defaults=False, include_path=[TASKS / name for name in folders])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_tasks, "packaged", lambda: manager)
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", length=1024)


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(name: str, files: dict[str, str], **keys: Any) -> RunConfig:
    cfg = RunConfig()
    cfg.evaluate.harness = HarnessConfig(tasks={name: HarnessTaskConfig(files=files, **keys)})
    cfg.evaluate.harness.batch_size = 4
    return cfg


def arc(folder: Path, **keys: Any) -> RunConfig:
    files = {
        "test": jsonl(folder / "arc.jsonl", ARC),
        "train": jsonl(folder / "arc-train.jsonl", ARC[:3]),
    }
    return config("arc_challenge", files, **{"shots": 2, **keys})


def of_mmlu(folder: Path, tables: Any = TABLES, name: str = "mmlu_anatomy", **keys: Any) -> RunConfig:
    where = str(write_tables(folder / "tables", tables))
    return config(name, {"test": where, "dev": where}, **{"shots": 2, **keys})


def record(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "harness" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    figures = json.loads((folder / "harness" / f"{name}.json").read_text(encoding="utf-8"))
    return figures, [json.loads(line) for line in lines]


# --- figures ---


def test_a_task_is_counted_as_by_hand(llama: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    found = harness.run(arc(tmp_path), llama, tokenizer, tmp_path)
    figures, lines = record(tmp_path, "arc_challenge")
    right, normalised = [], []
    for line, row in zip(lines, ARC, strict=True):
        (prompt, *_) = (lines[0]["arguments"][0]) if line is lines[0] else ("",)
        choices: list[str] = row["choices"]["text"]  # type: ignore[index]
        if line is lines[0]:
            assert prompt.endswith("\n\nQuestion: What is 0 and one?\nAnswer:")
            assert prompt.count("Question: ") == 3
            ids = tokenizer(prompt)["input_ids"]
            plain = [plain_logp(llama, ids, tokenizer(f" {one}")["input_ids"]) for one in choices]
            logps = [float(answer[0]) for answer in line["filtered_resps"]]
            assert logps == pytest.approx(plain, abs=1e-3)
        values = [float(answer[0]) for answer in line["filtered_resps"]]
        gold = "ABC".index(str(row["answerKey"]))
        right.append(values.index(max(values)) == gold)
        by_length = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        normalised.append(by_length.index(max(by_length)) == gold)
    assert set(found) == {"harness/arc_challenge/acc", "harness/arc_challenge/acc_norm"}
    for metric, values_ in (("acc", right), ("acc_norm", normalised)):
        score = found[f"harness/arc_challenge/{metric}"]
        ends = binomtest(sum(values_), 6).proportion_ci(method="wilson")
        assert (score.value, score.n, score.unit) == (sum(values_) / 6, 6, "share")
        assert [score.low, score.high] == pytest.approx([ends.low, ends.high])
        assert score.higher_is_better is True
    assert figures["shots"] == {"arc_challenge": 2}
    assert figures["versions"] == {"arc_challenge": 1.0} and figures["lm_eval"] == lm_eval.__version__
    assert (figures["questions"], figures["of"]) == ({"arc_challenge": 6}, {"arc_challenge": 6})
    assert figures["cut"] == {"arc_challenge": 0}


def test_a_share_of_likelihood_has_the_interval_of_its_error(llama: Any, tmp_path: Path) -> None:
    cfg = config("truthfulqa_mc2", {"validation": jsonl(tmp_path / "t.jsonl", TRUTH)})
    (score,) = harness.run(cfg, llama, byte_level(), tmp_path).values()
    _, lines = record(tmp_path, "truthfulqa_mc2")
    shares = []
    for line in lines:
        odds = [math.exp(float(answer[0])) for answer in line["filtered_resps"]]
        shares.append((odds[0] + odds[1]) / sum(odds))
    mean = sum(shares) / 3
    error = (sum((one - mean) ** 2 for one in shares) / 2 / 3) ** 0.5
    assert score.value == pytest.approx(mean)
    assert score.low == pytest.approx(mean - 1.959964 * error)
    assert (score.n, score.unit, str(score.interval)) == (3, "share", "normal")


def test_answers_are_written_greedily_and_filtered(llama: Any, tmp_path: Path) -> None:
    files = {"test": jsonl(tmp_path / "gsm8k.jsonl", GSM)}
    cfg = config("gsm8k", files, shots=0, limit=2)
    found = harness.run(cfg, llama, byte_level(), tmp_path)
    figures, lines = record(tmp_path, "gsm8k")
    assert set(found) == {
        "harness/gsm8k/exact_match/strict-match",
        "harness/gsm8k/exact_match/flexible-extract",
    }
    assert len(lines) == 4 and figures["questions"] == {"gsm8k": 2} and figures["of"] == {"gsm8k": 4}
    prompt, settings = lines[0]["arguments"][0]
    assert prompt == "Question: Ann has 3 apples and eats one. How many?\nAnswer:"
    assert settings["do_sample"] is False
    ids = torch.tensor([byte_level()(prompt)["input_ids"]])
    plain = llama.generate(ids, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids))
    text = byte_level().decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    answer = lines[0]["resps"][0][0]
    assert answer[:20] == text[:20] or len(answer) < 20


# --- lm-eval's own command line ---


def as_text(value: Any) -> Any:
    """Return a value with its numbers as text: the command line writes some so."""
    return [as_text(one) for one in value] if isinstance(value, list) else str(value)


def same_answer(ours: Any, theirs: Any) -> bool:
    """Compare what was written, or a likelihood (rounded unlike) and whether it is greedy."""
    if isinstance(ours, str):
        return bool(ours == theirs)
    (value, greedy), (other, also) = ours, theirs
    return str(greedy) == str(also) and float(value) == pytest.approx(float(other), rel=1e-5)


def test_the_figures_are_those_of_lm_evals_command_line(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    tables = str(write_tables(tmp_path / "tables"))
    gsm = jsonl(tmp_path / "gsm8k.jsonl", GSM)
    arc_ = jsonl(tmp_path / "arc.jsonl", ARC)
    cfg = RunConfig()
    keys: dict[str, Any] = {"shots": 2, "limit": 5}
    tasks = cfg.evaluate.harness.tasks = {
        "mmlu_anatomy": HarnessTaskConfig(files={"test": tables, "dev": tables}, **keys),
        "gsm8k": HarnessTaskConfig(files={"test": gsm, "train": gsm}, **keys),
        "arc_challenge": HarnessTaskConfig(files={"test": arc_, "train": arc_}, **keys),
    }
    cfg.evaluate.harness.batch_size = 2
    for name, task in tasks.items():
        harness_tasks.written(name, task, tmp_path / "tasks")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--batch_size", "2"]
    command += ["--tasks", *tasks, "--num_fewshot", "2", "--limit", "5", "--log_samples"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "theirs")]
    # a copy of the program with these tasks alone: it reads the files of all at its start
    skip = shutil.ignore_patterns("__pycache__")
    for part in (".", "tasks/mmlu/default", "tasks/gsm8k", "tasks/arc"):
        ignore = shutil.ignore_patterns("__pycache__", "tasks") if part == "." else skip
        shutil.copytree(TASKS.parent / part, tmp_path / "lib" / "lm_eval" / part, ignore=ignore)
    for file in TASKS.glob("*.py"):
        shutil.copy(file, tmp_path / "lib" / "lm_eval" / "tasks")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    said = json.loads(theirs.read_text(encoding="utf-8"))
    found = harness.run(cfg, llama, byte_level(), tmp_path)
    values = {score.value for score in found.values()}
    assert len(found) == 5 and values != {0.0}  # else equal figures would prove little
    for name in tasks:
        figures, lines = record(tmp_path, name)
        listed = {key: one for key, one in said["results"][name].items() if key not in ("name", "alias")}
        assert figures["results"][name] == listed
        assert (figures["versions"], figures["shots"]) == (
            {name: said["versions"][name]},
            {name: said["n-shot"][name]},
        )
        (file,) = (tmp_path / "theirs").rglob(f"samples_{name}_*.jsonl")
        for line, same in zip(lines, file.read_text(encoding="utf-8").splitlines(), strict=True):
            other = json.loads(same)
            for column in ("doc_id", "doc", "prompt_hash", "target_hash", "filter"):
                assert as_text(line[column]) == as_text(other[column]), column
            for ours, answer in zip(line["filtered_resps"], other["filtered_resps"], strict=True):
                assert same_answer(ours, answer)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> tuple[Path, dict[str, Any]]:
    """Return where all of MMLU, small, was measured, and what came of it."""
    folder = tmp_path_factory.mktemp("mmlu")
    one = {"dev": TABLES["anatomy"]["dev"][:1], "test": TABLES["anatomy"]["test"][:1]}
    tables = {subject: one for subjects in CATEGORIES.values() for subject in subjects}
    cfg = of_mmlu(folder, {**tables, **TABLES}, name="mmlu", shots=1)
    return folder, harness.run(cfg, llama, byte_level(), folder)


def test_a_group_has_the_figures_of_its_groups(everything: tuple[Path, dict[str, Any]]) -> None:
    folder, found = everything
    figures, lines = record(folder, "mmlu")
    groups = ("mmlu", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem")
    assert sorted(found) == sorted(f"harness/{group}/acc" for group in groups)
    assert next(iter(found)) == "harness/mmlu/acc"
    right = [line["acc"] for line in lines]
    assert len(right) == 57 - 2 + 3 + 2
    whole = found["harness/mmlu/acc"]
    assert (whole.value, whole.n) == (pytest.approx(sum(right) / len(right)), 60)
    ends = binomtest(int(sum(right)), 60).proportion_ci(method="wilson")
    assert [whole.low, whole.high] == pytest.approx([ends.low, ends.high])
    assert sum(found[f"harness/{group}/acc"].n for group in groups[1:]) == 60
    assert figures["results"]["mmlu_anatomy"]["sample_len"] == 3
    assert figures["shots"]["mmlu_anatomy"] == 1


# --- our MMLU and theirs ---


def test_where_the_prompts_are_equal_so_are_the_answers(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval has one space before the subject where hendrycks has two; all else is equal here."""
    cfg = of_mmlu(tmp_path)
    written = harness_tasks.written

    def with_two_spaces(name: str, task: HarnessTaskConfig, folder: Path) -> Any:
        manager = written(name, task, folder)
        file = folder / "mmlu_anatomy.yaml"
        described = "The following are multiple choice questions (with answers) about  anatomy.\n\n"
        file.write_text(f"{file.read_text()}description: {json.dumps(described)}\n")
        return manager

    theirs = harness.run(cfg, llama, byte_level(), tmp_path)["harness/mmlu_anatomy/acc"]
    _, spaced = record(tmp_path, "mmlu_anatomy")
    monkeypatch.setattr(harness_tasks, "written", with_two_spaces)
    (tmp_path / "equal").mkdir()
    theirs = harness.run(cfg, llama, byte_level(), tmp_path / "equal")["harness/mmlu_anatomy/acc"]
    _, equal = record(tmp_path / "equal", "mmlu_anatomy")
    cfg.evaluate.mmlu.path = str(tmp_path / "tables")
    cfg.evaluate.mmlu.subjects, cfg.evaluate.mmlu.shots = ["anatomy"], 2
    ours = mmlu.run(cfg, llama, byte_level(), tmp_path)["mmlu"]
    lines = [json.loads(line) for line in (tmp_path / "mmlu-answers.jsonl").read_text().splitlines()]
    for line, same, other in zip(lines, equal, spaced, strict=True):
        assert line["logps"] == pytest.approx(
            [float(one[0]) for one in same["filtered_resps"]], abs=1e-3
        )
        assert line["logps"] != pytest.approx(
            [float(one[0]) for one in other["filtered_resps"]], abs=1e-3
        )
    assert (ours.value, ours.low, ours.high) == (theirs.value, theirs.low, theirs.high)


# --- the model and its tokenizer are left as they were ---


def test_what_is_measured_is_left_alone(tmp_path: Path) -> None:
    model, tokenizer = adapted(tiny("llama")), byte_level()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    said = model(ids).logits
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    cfg = arc(tmp_path, limit=1)
    harness.run(cfg, model, tokenizer, tmp_path)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert torch.equal(model(ids).logits, said) and not model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    # and the adapter counts: its base answers otherwise
    _, with_adapter = record(tmp_path, "arc_challenge")
    (tmp_path / "base").mkdir()
    with model.disable_adapter():
        harness.run(cfg, model, tokenizer, tmp_path / "base")
    _, without = record(tmp_path / "base", "arc_challenge")
    assert with_adapter[0]["prompt_hash"] == without[0]["prompt_hash"]
    assert with_adapter[0]["resps"] != without[0]["resps"]


def test_new_tokens_in_tied_embeddings_are_measured(tmp_path: Path) -> None:
    # lm-eval ties weights when it is given a model; PEFT's rows of new tokens are in the way
    from peft import LoraConfig, get_peft_model

    base = tiny("llama", tied=True)
    config_ = LoraConfig(
        r=2, target_modules="all-linear", trainable_token_indices=[5], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config_).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens" in name:
                weight.add_(1.0)
    ids = torch.tensor([[5, 6, 7]])
    said = model(ids).logits
    with model.disable_adapter():
        assert not torch.equal(model(ids).logits, said)
    assert len(harness.run(arc(tmp_path, limit=1), model, byte_level(), tmp_path)) == 2
    assert torch.equal(model(ids).logits, said)
    assert "tie_weights" not in vars(model)


def test_a_log_gets_lines_and_no_bars(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.0)
    harness.run(arc(tmp_path), llama, byte_level(), tmp_path)
    printed = capfd.readouterr()
    assert "2 batches of lm-eval, " in printed.out and "it/s" not in printed.err
    assert "harness/arc_challenge/acc: " in printed.out


def test_the_random_numbers_are_lm_evals_own(llama: Any, tmp_path: Path) -> None:
    prompts = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        out = tmp_path / str(seed)
        out.mkdir()
        harness.run(arc(tmp_path, limit=2), llama, byte_level(), out)
        prompts.append(record(out, "arc_challenge")[0]["prompts"])
    assert prompts[0] == prompts[1]


def test_the_record_names_no_place_and_no_time(llama: Any, tmp_path: Path) -> None:
    harness.run(arc(tmp_path), llama, byte_level(), tmp_path)
    for file in (tmp_path / "harness").iterdir():
        text = file.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(TASKS) not in text
    (tmp_path / "again").mkdir()
    harness.run(arc(tmp_path), llama, byte_level(), tmp_path / "again")
    for name in ("arc_challenge.json", "arc_challenge.jsonl"):
        first, again = tmp_path / "harness" / name, tmp_path / "again" / "harness" / name
        assert first.read_bytes() == again.read_bytes()


def test_a_finished_task_is_not_run_again(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = harness.run(arc(tmp_path), llama, byte_level(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "_wrapped", None)
        assert harness.run(arc(tmp_path), llama, byte_level(), tmp_path) == first
    (tmp_path / "harness" / "arc_challenge.json").unlink()  # the questions are written before it
    assert harness.run(arc(tmp_path), llama, byte_level(), tmp_path) == first


def test_between_tasks_it_stops_where_it_is_asked_to(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = arc(tmp_path, limit=1)
    tasks = cfg.evaluate.harness.tasks
    tasks["arc_easy"] = tasks["arc_challenge"]
    (tmp_path / "stop").touch()
    monkeypatch.setenv(stopping.FILE, str(tmp_path / "stop"))
    with pytest.raises(stopping.Stopped, match="with the task arc_challenge measured"):
        harness.run(cfg, llama, byte_level(), tmp_path)
    assert sorted(file.stem for file in (tmp_path / "harness").glob("*.json")) == ["arc_challenge"]
    monkeypatch.delenv(stopping.FILE)
    assert len(harness.run(cfg, llama, byte_level(), tmp_path)) == 4


def test_prompts_that_are_too_long_are_counted(llama: Any, tmp_path: Path) -> None:
    cfg = arc(tmp_path)
    prompt_and_choice = len("Question: What is 0 and one?\nAnswer: many")
    cfg.evaluate.harness.tasks["arc_challenge"].shots = 0
    for room, cut in ((prompt_and_choice - 1, 0), (prompt_and_choice - 2, 6)):
        cfg.evaluate.harness.max_length = room
        (tmp_path / str(room)).mkdir()
        harness.run(cfg, llama, byte_level(), tmp_path / str(room))
        assert record(tmp_path / str(room), "arc_challenge")[0]["cut"] == {"arc_challenge": cut}


def test_the_chat_template_makes_turns_of_the_shots(llama: Any, tmp_path: Path) -> None:
    cfg = arc(tmp_path, limit=1, shots=1)
    cfg.evaluate.harness.chat_template = True
    tokenizer = byte_level()
    harness.run(cfg, llama, tokenizer, tmp_path)
    figures, lines = record(tmp_path, "arc_challenge")
    prompt = lines[0]["arguments"][0][0]
    (shot,) = [row for row in ARC[:3] if prompt.startswith(f"<|user|>\nQuestion: {row['question']}")]
    right: str = shot["choices"]["text"]["ABC".index(str(shot["answerKey"]))]  # type: ignore[index]
    turns = [
        {"role": "user", "content": f"Question: {shot['question']}\nAnswer:"},
        {"role": "assistant", "content": right},
        {"role": "user", "content": "Question: What is 0 and one?\nAnswer:"},
    ]
    assert prompt == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert figures["chat_template"] is True


# --- shots ---


@pytest.mark.parametrize(
    ("name", "asked", "shots"),
    [("arc_challenge", None, 25), ("arc_challenge", 3, 3), ("mmlu", None, 5), ("arc_easy", None, None)],
)
def test_the_leaderboards_number_of_shots_is_the_default(
    name: str, asked: int | None, shots: int | None
) -> None:
    # https://huggingface.co/docs/leaderboards/en/open_llm_leaderboard/archive
    assert harness_tasks.shots_of(name, HarnessTaskConfig(shots=asked)) == shots


def test_a_task_without_a_number_has_no_shots(llama: Any, tmp_path: Path) -> None:
    cfg = config(
        "arc_easy", {"test": jsonl(tmp_path / "arc.jsonl", ARC), "train": str(tmp_path / "arc.jsonl")}
    )
    harness.run(cfg, llama, byte_level(), tmp_path)
    figures, lines = record(tmp_path, "arc_easy")
    assert figures["shots"] == {"arc_easy": 0}
    assert lines[0]["arguments"][0][0].count("Question: ") == 1


# --- what is refused ---


def test_tasks_without_lm_eval_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(harness_tasks, "packaged", PACKAGED)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'ftpipe\[eval\]'\.$"):
        harness.run(arc(tmp_path), None, byte_level(), tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "harness").exists()


def refusals(folder: Path) -> dict[str, tuple[RunConfig, str]]:
    good = jsonl(folder / "arc.jsonl", ARC)
    (folder / "bad.jsonl").write_text('{"question": "x"\n')
    (folder / "rows.csv").write_text("question\nx\n")
    whole = {"test": good, "train": good}
    tables = str(write_tables(folder / "tables"))
    return {
        "task": (
            config("arc_chalenge", whole),
            r"no task 'arc_chalenge'\. Did you mean 'arc_challenge'\?",
        ),
        "file": (
            config("arc_easy", {"test": "none.jsonl"}),
            r"files\.test: no file none\.jsonl; it was",
        ),
        "split": (
            config("arc_easy", {**whole, "tset": good}),
            r"no split 'tset'\. Did you mean 'test'\? Known: train, validation, test\.",
        ),
        "questions": (
            config("arc_easy", {"train": good}),
            "files lacks the split 'test', which arc_easy takes its questions from; add it.",
        ),
        "examples": (
            config("arc_challenge", {"test": good}),
            r"lacks the split 'train', which arc_challenge takes its examples from; add it, or set "
            r"evaluate\.harness\.tasks\.arc_challenge\.shots=0\.",
        ),
        "kind": (
            config("arc_easy", {"test": str(folder / "rows.csv")}),
            r"files\.test=rows\.csv is none of \.json, \.jsonl, \.parquet",
        ),
        "json": (config("arc_easy", {"test": str(folder / "bad.jsonl")}), "questions cannot be read"),
        "schema": (
            config("arc_easy", {"test": jsonl(folder / "gsm.jsonl", GSM)}),
            "questions cannot be read",
        ),
        "group": (
            config("mmlu", whole),
            "it is a group of 57 tasks, and a file serves one; name single",
        ),
        "subject": (
            config("mmlu_virology", {"test": tables, "dev": tables}),
            r"has no table virology_test\.csv",
        ),
        "tables": (
            config("arc_easy", {"test": tables}),
            "arc_easy does not ask MMLU's questions; give rows",
        ),
        "shots": (
            config("truthfulqa_mc2", {"validation": jsonl(folder / "t.jsonl", TRUTH)}, shots=3),
            r"shots=3: truthfulqa_mc2 is asked without examples",
        ),
        "code": (
            config("humaneval", {"test": jsonl(folder / "h.jsonl", HUMAN)}, shots=0),
            "runs code that the model writes",
        ),
        "python": (config("squadv2", {"validation": good}), "is Python code of lm-eval"),
    }


HUMAN = [
    {"task_id": "a", "prompt": "def f():", "test": "x", "entry_point": "f", "canonical_solution": "1"}
]


@pytest.mark.parametrize(
    "case",
    [
        *("task", "file", "split", "questions", "examples", "kind", "json", "schema", "group"),
        *("subject", "tables", "shots", "code", "python"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    case: str, llama: Any, empty_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg, said = refusals(empty_folder)[case]
    with pytest.raises(UserError, match=said) as refused:
        harness.run(cfg, llama, byte_level(), empty_folder)
    assert "\n" not in str(refused.value) and isinstance(refused.value, ConfigError | DataError)
    assert list((empty_folder / "harness").iterdir()) == []


def test_a_model_that_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    files = {"test": jsonl(tmp_path / "gsm8k.jsonl", GSM)}
    with pytest.raises(
        ModelError, match=r"takes 256 tokens, which leaves no room .* the 256 that gsm8k"
    ):
        harness.run(config("gsm8k", files, shots=0), tiny("llama", 256), byte_level(), tmp_path)
    cfg = arc(tmp_path)
    cfg.evaluate.harness.max_length = 513
    with pytest.raises(ConfigError, match="max_length=513 is more than the 512 tokens that the model"):
        harness.run(cfg, tiny("llama"), byte_level(), tmp_path)
    cfg.evaluate.harness.chat_template = True
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="the tokenizer has no chat template; set it to false"):
        harness.run(cfg, tiny("llama"), tokenizer, tmp_path)


def test_no_task_is_no_work(tmp_path: Path) -> None:
    assert harness.run(RunConfig(), None, byte_level(), tmp_path) == {}  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_questions_of_the_hub_are_asked_for_at_their_commit(tmp_path: Path) -> None:
    task = HarnessTaskConfig(revision="0" * 40)
    manager = harness_tasks.written("mmlu_stem", task, tmp_path)
    entry = manager.task_index["mmlu_college_physics"]
    assert entry.cfg["dataset_kwargs"] == {"revision": "0" * 40}
    assert (entry.cfg["dataset_path"], entry.cfg["dataset_name"]) == ("cais/mmlu", "college_physics")
    assert entry.cfg["doc_to_choice"] == ["A", "B", "C", "D"]
    assert len(manager.task_index["mmlu_stem_tasks"].tags) == 19
