"""What the stage writes beside the weights, where the base model alone is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ftpipe import pipeline
from ftpipe.choices import Format, Method, Start, TemplateName
from ftpipe.config import AdapterConfig, RunConfig, SourceConfig
from ftpipe.stages import export
from ftpipe.tokenizer import byte_level
from tests.unit.evaluation import tiny

PUBLISHED = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}  # as of Llama 2: it does not sample


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    where = tmp_path_factory.mktemp("export")
    base = tiny.save(where / "base")
    (base / "generation_config.json").write_text(json.dumps(PUBLISHED))
    cfg = tiny.config()
    cfg.name, cfg.stages, cfg.seed = "alone", ["export"], 1
    cfg.model.path, cfg.model.revision, cfg.model.license = str(base), None, "mit"
    cfg.adapter = AdapterConfig(method=Method.qlora)
    source = SourceConfig(format=Format.alpaca, path="a/b", revision="0" * 40, license="apache-2.0")
    cfg.data.sources = {"rows": source}
    cfg.data.template = TemplateName.tokenizer
    cfg.export.start = Start.model
    out = where / "export-0"
    out.mkdir()
    export.run(cfg, {}, out)
    return cfg, out


def test_how_a_base_generates_is_as_it_was_published(made: tuple[RunConfig, Path]) -> None:
    told = json.loads((made[1] / "generation_config.json").read_text())
    assert {key: told[key] for key in PUBLISHED} == PUBLISHED
    assert told["eos_token_id"] == [byte_level().eos_token_id]


def test_the_card_names_the_run_that_was_asked_for(made: tuple[RunConfig, Path]) -> None:
    cfg, out = made  # the base has no 4 bits, but the run is called by its configuration
    text = (out / "README.md").read_text()
    assert f"ftpipe verify {pipeline.run_folder(cfg).name}\n" in text


def test_data_that_nothing_was_trained_on_is_not_named(made: tuple[RunConfig, Path]) -> None:
    text = (made[1] / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert not {"datasets", "base_model_relation"} & front.keys()
    assert front["license"] == "mit" and front["tags"] == ["ftpipe"]
    assert "rows" not in (made[1] / "LICENSE-NOTES.md").read_text()
