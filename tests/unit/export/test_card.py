"""The model card and the notes on licences: what the Hub reads, and what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from ftpipe import artifacts
from ftpipe.artifacts import Artifact
from ftpipe.choices import Format, Gguf, Init, Method, Start
from ftpipe.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, SourceConfig
from ftpipe.evaluation.report import write
from ftpipe.evaluation.scores import Score
from ftpipe.evaluation.table import Row, Tally
from ftpipe.export import card
from ftpipe.export.card import Told
from ftpipe.export.parity import Parity

COMMIT = "0" * 40
PARITY = Parity("demonstrations/test", 3, 99, 1e-5, 2e-4, 0.1, 0.9876, 2.0, 2.25)


@pytest.fixture
def cfg() -> RunConfig:
    source = SourceConfig(
        format=Format.alpaca, path="someone/rows", revision=COMMIT, license="apache-2.0"
    )
    return RunConfig(
        name="mine",
        stages=["prepare", "sft", "export"],
        model=ModelConfig(path="someone/base", revision=COMMIT, license="apache-2.0"),
        adapter=AdapterConfig(method=Method.lora),
        data=DataConfig(sources={"rows": source}),
    )


def made(root: Path, stage: str, kind: str, **inputs: Artifact) -> Artifact:
    """Publish an empty artifact."""
    with artifacts.building(root, stage, stage.encode().hex()) as partial:
        manifest: dict[str, Any] = {"kind": kind, "stage": stage, "metrics": {"accuracy": 0.5}}
        manifest |= {"fingerprint": "0" * 16}
        manifest |= {"inputs": {name: one.path.name for name, one in inputs.items()}}
        return artifacts.publish(partial, manifest)


@pytest.fixture
def told(cfg: RunConfig, tmp_path: Path) -> Told:
    dataset = made(tmp_path, "prepare", "dataset")
    sft = made(tmp_path, "sft", "policy", dataset=dataset)
    dpo = made(tmp_path, "dpo", "policy", dataset=dataset, policy=sft)
    files = {Gguf.q8_0: ("mine-q8_0.gguf", PARITY), Gguf.f16: ("mine-f16.gguf", None)}
    return Told(cfg, {"policy": dpo, "dataset": dataset}, "export-12", PARITY, files)


def matter(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_the_hub_reads_its_front_matter(told: Told) -> None:
    front = matter(card.card(told))
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == ["someone/base"] and front["datasets"] == ["someone/rows"]
    assert front["tags"] == ["ftpipe", "sft", "dpo", "lora", "gguf"]
    data: Any = ModelCardData(**front)  # the hub's own reader
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"


def test_a_base_alone_was_tuned_on_nothing(cfg: RunConfig) -> None:
    cfg.export.start = Start.model
    cfg.data.sources["rows"].license = "mit"
    front = matter(card.card(Told(cfg, {}, "export-12", PARITY)))
    assert front["base_model"] == ["someone/base"] and front["license"] == "apache-2.0"
    assert not {"datasets", "base_model_relation"} & front.keys()
    assert "someone/rows" not in card.notes(cfg)


@pytest.mark.parametrize("stated", [None, "mit", "other"])
def test_a_licence_is_claimed_only_where_all_are_one(stated: str | None, told: Told) -> None:
    told.cfg.data.sources["rows"].license = stated
    front = matter(card.card(told))
    assert (front["license"], front["license_link"]) == ("other", "LICENSE-NOTES.md")
    notes = card.notes(told.cfg)
    assert "| base model | https://huggingface.co/someone/base | apache-2.0 |" in notes
    rows = "https://huggingface.co/datasets/someone/rows"
    assert f"| data: rows | {rows} | {stated or 'not stated'} |" in notes


@pytest.mark.parametrize("stated", [None, "other"])
def test_a_licence_that_nobody_names_is_none_though_all_are_one(stated: str | None, told: Told) -> None:
    told.cfg.data.sources["rows"].license = told.cfg.model.license = stated
    assert matter(card.card(told))["license_name"] == "see-notes"


def test_local_inputs_are_not_named(told: Told, empty_folder: Path) -> None:
    (empty_folder / "secret-rows.json").write_text("[]")
    (empty_folder / "secret-base").mkdir()
    rows = told.cfg.data.sources["rows"]
    rows.path, rows.revision = "secret-rows.json", None
    told.cfg.model.path, told.cfg.model.revision = "secret-base", None
    text = card.card(told) + card.notes(told.cfg)
    assert "secret" not in text and "a local file" in text and "a local model" in text
    assert not {"base_model", "datasets"} & matter(text).keys()


def test_random_weights_have_no_licence_of_their_own(told: Told) -> None:
    told.cfg.model.init = Init.random
    assert "| base model | random weights | none needed |" in card.notes(told.cfg)
    assert matter(card.card(told))["license"] == "apache-2.0"  # of the data
    assert "base_model" not in matter(card.card(told))


def test_it_says_where_it_comes_from_and_how_far_it_is(told: Told) -> None:
    text = card.card(told)
    for one in told.inputs.values():
        manifest = artifacts.digest(one.path / "manifest.json")
        assert f"`{one.path.name}` ({one.kind}), manifest sha256 `{manifest}`" in text
    assert "| safetensors | 1e-05 | 0.0002 | 98.76% | +0.25 |" in text
    assert "| mine-q8_0.gguf (q8_0) | 1e-05 | 0.0002 | 98.76% | +0.25 |" in text
    assert "| mine-f16.gguf (f16) | not measured: transformers cannot load it | | | |" in text
    assert "ftpipe verify mine-" in text and "ftpipe runs lineage export-12" in text
    assert "## Measured" not in text


def test_the_report_gives_numbers_with_their_intervals(told: Told, tmp_path: Path) -> None:
    report = made(tmp_path, "evaluate", "report")
    mmlu = Score("mmlu", 0.25, 0.2, 0.3, 1531, "share", True)
    change = Score("mmlu", 0.0125, -0.01, 0.035, 1531, "share", True)
    bare = Score("loss", 1.5, None, None, 40, "nats", False)
    won = Score("win rate", 0.75, 0.5, 0.9, 80, "share", True)
    table = [Row("base", bare), Row("base", mmlu), Row("dpo", mmlu, "base", change)]
    tally = Tally("reward", "dpo", "base", 60, 0, 20, 0, 0, 0, won, None, {})
    write(report.path, {"base": None, "dpo": "base"}, table, [tally], [])  # as the stage does
    text = card.card(Told(told.cfg, {**told.inputs, "report": report}, "export-12", PARITY))
    assert "| measure | policy | value | 95% interval | n | change | its interval |" in text
    assert "| mmlu | base | 0.25 | 0.2 to 0.3 | 1,531 |  |  |" in text
    assert "| mmlu | dpo | 0.25 | 0.2 to 0.3 | 1,531 | +0.0125 | -0.01 to +0.035 |" in text
    assert "| loss | base | 1.5 |  | 40 |  |  |" in text
    assert "Win rate of dpo over base, judged by reward: 0.75 (0.5 to 0.9)" in text


def test_a_lineage_goes_on_where_an_input_is_gone(told: Told) -> None:
    policy = told.inputs["policy"]
    assert [one.stage for one in card.lineage(policy)] == ["dpo", "prepare", "sft"]
    (told.inputs["dataset"].path / "manifest.json").unlink()
    assert [one.stage for one in card.lineage(policy)] == ["dpo", "sft"]
