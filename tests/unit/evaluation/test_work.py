"""What the stage refuses before it measures anything, and what its notes count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ftpipe.benchmark_config import HarnessConfig, HarnessTaskConfig, MmluConfig
from ftpipe.errors import ConfigError, DataError
from ftpipe.evaluate_config import JudgeConfig, TextsConfig
from ftpipe.evaluation import rewards
from ftpipe.evolve.calls import Said
from ftpipe.reward import model as reward_model
from ftpipe.stages.evaluate import Work
from ftpipe.tokenizer import EOS

from .tiny import config, save


@pytest.fixture
def base(empty_folder: Path) -> Path:
    return save(empty_folder / "base")  # of 256 positions


def asked(*turns: str) -> dict[str, TextsConfig]:
    rows = [{"question_id": at, "turns": [text]} for at, text in enumerate(turns)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"mine": TextsConfig(path="asked.jsonl")}


def work(**settings: object) -> Work:
    cfg = config(**{"max_new_tokens": 8, **settings})
    Path("out").mkdir(exist_ok=True)
    return Work(cfg, {}, Path("out"))


def test_a_special_token_in_any_question_is_refused_at_once(base: Path) -> None:
    work(prompts=asked("Why?", "How?")).check()
    with pytest.raises(DataError, match=r"^mine/1: the text holds the special token"):
        work(prompts=asked("Why?", f"How{EOS}")).check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"max_new_tokens": 256},
            "evaluate.max_new_tokens=256 leaves no room for a question: base knows",
        ),
        (
            {"mmlu": MmluConfig(path="mmlu.json", max_length=257)},
            "evaluate.mmlu.max_length=257 is more than the 256 positions of base",
        ),
        (
            {"harness": HarnessConfig({"x": HarnessTaskConfig()}, max_length=300)},
            "evaluate.harness.max_length=300 is more than the 256 positions of base",
        ),
    ],
)
def test_lengths_that_leave_no_room_are_refused_at_once(
    settings: Mapping[str, Any], said: str, base: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        work(prompts=asked("Why?"), **settings).check()
    assert str(refused.value).startswith(said)
    work(prompts=asked("Why?"), max_new_tokens=255).check()


def test_files_of_mmlu_are_read_at_once(base: Path) -> None:
    Path("mmlu.json").write_text('[{"subject": "law", "input": "1?", "output": "E"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"the answer is 'E', not one of A, B, C, D"):
        work(mmlu=MmluConfig(path="mmlu.json")).check()


@pytest.mark.slow  # lm-eval reads all its tasks
def test_a_task_that_lm_eval_lacks_is_refused_at_once(base: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = {"gsm8kk": HarnessTaskConfig(files={"test": "asked.jsonl"}, shots=0)}
    with pytest.raises(ConfigError, match=r"no task 'gsm8kk'\. Did you mean 'gsm8k'"):
        work(harness=HarnessConfig(tasks)).check()


def test_answers_without_a_reward_are_counted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = work(prompts=asked("Why?", "How?", "When?"), judge=JudgeConfig(reward_model="rm"))
    found.given = {
        "sft": {("mine/0", 0): Said("So."), ("mine/1", 0): Said("x" * 300), ("mine/2", 0): Said("Now.")},
        "dpo": {("mine/0", 0): Said("So."), ("mine/1", 0): Said("", refused="too long")},
    }
    monkeypatch.setattr(reward_model, "load", lambda *_, **__: None)
    # a reward model of 256 positions, as its score() leaves out what is longer
    monkeypatch.setattr(
        rewards,
        "score",
        lambda _, wanted, *__: {key: 1.0 for key, ids in wanted.items() if len(ids) <= 256},
    )
    assert {name: len(one) for name, one in found._rewards(Path("rm")).items()} == {"sft": 2, "dpo": 1}
    (note,) = [note for note in found._notes() if "have no reward" in note]
    assert note.startswith("sft: 1 answers have no reward") and "left out" in note
