"""The keys of the benchmarks: what is refused, what is in the fingerprint, what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ftpipe import pins, schema
from ftpipe.benchmark_config import HarnessTaskConfig, MmluConfig
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError
from ftpipe.pins import Digests, benchmark_pins

COMMIT = "0123456789abcdef" * 2 + "01234567"
KEY = "evaluate.harness.tasks.gsm8k"


def harness(**keys: Any) -> dict[str, Any]:
    return {"harness": {"tasks": {"gsm8k": {"files": {"test": "x.jsonl"}, **keys}}}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (harness(shots=-1), f"{KEY}.shots=-1 is out of range; allowed: 0 or more, or null."),
        (harness(limit=0), f"{KEY}.limit=0 is out of range; allowed: at least 1, or null."),
        (harness(files={}), f"{KEY} says not where its questions come from; give files by {KEY}.files,"),
        (harness(files={}, revision="main"), f"{KEY}.revision=main is out of range; allowed: a commit"),
        (
            harness(revision=COMMIT),
            f"{KEY}.revision={COMMIT} would be read by nothing beside {KEY}.files.",
        ),
        ({"harness": {"batch_size": 0}}, "evaluate.harness.batch_size=0 is out of range"),
        (
            {"harness": {"max_length": 7}},
            "evaluate.harness.max_length=7 is out of range; allowed: at least",
        ),
        (
            {"mmlu": {"shots": -1}},
            "evaluate.mmlu.shots=-1 is out of range; allowed: 0 or more, or null.",
        ),
        ({"mmlu": {"limit": 0}}, "evaluate.mmlu.limit=0 is out of range"),
        ({"mmlu": {"batch_size": 0}}, "evaluate.mmlu.batch_size=0 is out of range"),
        ({"mmlu": {"max_length": 7}}, "evaluate.mmlu.max_length=7 is out of range"),
        (
            {"mmlu": {"path": "rows.json", "shots": 5}},
            "evaluate.mmlu.shots=5 would be read by nothing: the rows of rows.json are whole prompts.",
        ),
        ({"mmlu": {"path": "rows.jsonl", "split": "val"}}, "evaluate.mmlu.split=val would be read by"),
    ],
)
def test_what_cannot_work_is_one_sentence(tree: dict[str, Any], said: str) -> None:
    cfg = schema.from_composed(OmegaConf.create({"evaluate": tree}))
    with pytest.raises(ConfigError) as refused:
        for part in (cfg.evaluate.harness, cfg.evaluate.mmlu):
            part.check()
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (harness(shot=1), r"unknown key .*gsm8k\.shot'\. Did you mean '.*\.shots'\?"),
        (
            {"mmlu": {"method": "hendrix"}},
            r"method=hendrix is not one of hendrycks, qlora\. Did you mean",
        ),
        ({"mmlu": {"pth": "x"}}, r"unknown key 'evaluate\.mmlu\.pth'\. Did you mean '.*path'\?"),
    ],
)
def test_misspelled_words_are_met_by_the_nearest(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schema.from_composed(OmegaConf.create({"evaluate": tree}))


def test_what_works_is_not_refused(cfg: RunConfig) -> None:
    cfg.evaluate.harness.tasks = {
        "gsm8k": HarnessTaskConfig(files={"test": "x.jsonl"}, shots=0),
        "mmlu": HarnessTaskConfig(revision=COMMIT, limit=1),
    }
    for mmlu in (MmluConfig(path="mmlu.zip", split="val", shots=0), MmluConfig(path="rows.json")):
        cfg.evaluate.mmlu = mmlu
        cfg.check()
    cfg.evaluate.mmlu.batch_size = 0
    with pytest.raises(ConfigError, match=r"evaluate\.mmlu\.batch_size=0"):
        cfg.check()


# --- the fingerprint ---


def pinned(cfg: RunConfig) -> dict[str, str]:
    return benchmark_pins(cfg, Digests())


@pytest.mark.usefixtures("empty_folder")
def test_questions_count_by_content_and_not_by_place() -> None:
    cfg = RunConfig()
    assert pinned(cfg) == {} and pins.PINS["benchmarks"] is benchmark_pins
    Path("a.jsonl").write_text("1\n")
    Path("b.jsonl").write_text("1\n")
    for name in ("a.jsonl", "b.jsonl"):
        cfg.evaluate.mmlu.path = name
        cfg.evaluate.harness.tasks["gsm8k"] = HarnessTaskConfig(files={"test": name})
        found = pinned(cfg)
        # sha256sum of "1\n"
        digest = "4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865"
        assert found == {"mmlu": f"{digest}.jsonl", "harness/gsm8k/test": f"{digest}.jsonl"}
    Path("b.jsonl").write_text("2\n")
    assert all(pinned(cfg)[name] != value for name, value in found.items())
    cfg.evaluate.harness.tasks["gsm8k"] = HarnessTaskConfig(revision=COMMIT)
    assert pinned(cfg)["harness/gsm8k"] == f"hub:gsm8k@{COMMIT}"


@pytest.mark.usefixtures("empty_folder")
def test_a_folder_counts_by_its_tables() -> None:
    cfg = RunConfig()
    cfg.evaluate.mmlu.path = "tables"
    Path("tables/test").mkdir(parents=True)
    with pytest.raises(DataError, match=r"^evaluate\.mmlu\.path=tables holds no \.csv file\.$"):
        pinned(cfg)
    Path("tables/test/x_test.csv").write_text("q,1,2,3,4,A\n")
    first = pinned(cfg)
    Path("tables/notes.txt").write_text("read by nobody")
    assert pinned(cfg) == first
    Path("tables/test/x_test.csv").write_text("q,1,2,3,4,B\n")
    assert pinned(cfg) != first


@pytest.mark.usefixtures("empty_folder")
def test_questions_that_are_not_there_are_missed_before_anything_is_loaded() -> None:
    cfg = RunConfig()
    cfg.evaluate.mmlu.path = "none.zip"
    with pytest.raises(DataError, match=r"^evaluate\.mmlu\.path: no file none\.zip; it was looked for"):
        pinned(cfg)
    cfg.evaluate.mmlu.path = None
    cfg.evaluate.harness.tasks["gsm8k"] = HarnessTaskConfig(files={"test": "empty.jsonl"})
    with pytest.raises(DataError, match=r"^evaluate\.harness\.tasks\.gsm8k\.files\.test: no file empty"):
        pinned(cfg)
    Path("empty.jsonl").touch()
    with pytest.raises(DataError, match=r"gsm8k\.files\.test=empty\.jsonl is empty\.$"):
        pinned(cfg)


def test_their_paths_are_recorded_without_the_home(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    cfg.evaluate.mmlu.path = "/home/ada/mmlu.zip"
    cfg.evaluate.harness.tasks["gsm8k"] = HarnessTaskConfig(files={"test": "/home/ada/gsm8k.jsonl"})
    text = schema.dump(cfg)
    assert "/home/ada" not in text and text.count("~/") == 2
    Path("run.yaml").write_text(text, encoding="utf-8")
    assert schema.load(Path("run.yaml")).evaluate == cfg.evaluate
