"""An artifact back to its data and base model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ftpipe import cli
from ftpipe.config import ModelConfig, RunConfig
from ftpipe.errors import UserError
from ftpipe.runs import find, lineage
from tests.unit.runs import made

OUTPUT = Path("outputs")


def test_the_tree_of_a_run(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg)
    names = made.names(folder)
    digest = hashlib.sha256(Path("rows.json").read_bytes()).hexdigest()
    assert cli.main(["runs", "lineage", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # by hand, from the table of stages: sft takes the dataset and the base, prepare the base's tokenizer
    assert lines[0] == f"{names['sft']}  policy  loss_last 1.25"
    assert lines[1] == f"├── {names['model']}  base_model  parameters 1,234"
    assert (
        lines[2].startswith("│   ├── model (random): ") and lines[3] == "│   └── model.tokenizer: bytes"
    )
    assert lines[4:] == [
        f"└── {names['prepare']}  dataset  train_rows 2",
        f"    ├── {names['model']}  (above)",
        f"    └── data.sources.mine: rows.json, sha256 {digest[:16]}…",
    ]


def test_the_tree_of_an_artifact_begins_there(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    place = made.place(folder, "prepare")
    (root,) = lineage.trees(find.anything(place.name, OUTPUT))
    assert lineage.lines([root])[0].startswith(place.name)
    assert [below.piece.stage for below in root.inputs] == ["model"]


def test_json_has_whole_pins(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    made.run(cfg)
    assert cli.main(["runs", "lineage", "prepare", "--json"]) == 0
    (tree,) = json.loads(capsys.readouterr().out)["trees"]
    digest = hashlib.sha256(Path("rows.json").read_bytes()).hexdigest()
    assert tree["pins"] == {"data/0/mine": digest}
    assert tree["inputs"][0]["pins"]["tokenizer/tokenizer"] == "bytes"
    assert (tree["stage"], tree["kind"], tree["state"]) == ("prepare", "dataset", "made")


def test_a_hub_model_is_told_by_its_commit(cfg: RunConfig) -> None:
    cfg.model = ModelConfig(path="hub/model", revision=made.COMMIT)
    folder = made.run(cfg)
    lines = lineage.lines(lineage.trees(find.run(folder.name, OUTPUT)))
    assert f"└── model: hub/model@{made.COMMIT}" in lines
    assert any(line.endswith(f"model.tokenizer: hub:hub/model@{made.COMMIT}") for line in lines)


def test_what_is_gone_or_damaged_is_told_in_its_place(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    names = made.names(folder)
    (made.place(folder, "model") / "manifest.json").write_text("{", encoding="utf-8")
    made.place(folder, "prepare").rename("away")
    lines = lineage.lines(lineage.trees(find.anything(names["sft"], OUTPUT)))
    assert lines[1].startswith(f"├── {names['model']}  damaged: ")
    assert lines[2] == f"└── {names['prepare']}  missing"


def test_a_manifest_that_names_itself_ends(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    place = made.place(folder, "model")
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    (place / "manifest.json").write_text(json.dumps(manifest | {"inputs": {"x": place.name}}))
    lines = lineage.lines(lineage.trees(find.anything(place.name, OUTPUT)))
    assert f"├── {place.name}  (above)" in lines


def test_nothing_made_has_no_lineage(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    made.place(folder, "model").rename("away")
    with pytest.raises(UserError) as refused:
        lineage.trees(find.run("mine", OUTPUT))
    assert str(refused.value) == (f"nothing of the run {folder.name} is made, so nothing has a lineage.")


@pytest.mark.parametrize(
    ("pin", "key"),
    [
        ("data/0/alpaca", "data.sources.alpaca"),
        ("data/12/a/b", "data.sources.a/b"),
        ("data/decontaminate/1/mmlu", "data.decontaminate.mmlu"),
        ("data/0/decontaminate", "data.sources.decontaminate"),
        ("seeds/rows", "evolve.seeds"),
        ("model/config.json", "model"),
        ("tokenizer/tokenizer/tokenizer.json", "model.tokenizer"),
    ],
)
def test_the_key_behind_a_pin(pin: str, key: str) -> None:
    assert lineage.key_of(pin) == key
