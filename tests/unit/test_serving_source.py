"""Which policy a word stands for, from what lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftpipe.choices import TemplateName
from ftpipe.errors import UserError
from ftpipe.serving.options import Wanted
from ftpipe.serving.source import find_source

PRINTS = {"model": "aa" * 8, "prepare": "bb" * 8, "sft": "cc" * 8, "dpo": "dd" * 8, "export": "ee" * 8}
KINDS = {
    **{"model": "base_model", "prepare": "dataset", "sft": "policy", "dpo": "policy"},
    "export": "bundle",
}
CONFIG = {"name": "mine", "data": {"template": "vicuna"}, "launch": {"precision": "bf16"}}


def artifact(stage: str, config: dict[str, Any] = CONFIG) -> Path:
    folder = Path("outputs/artifacts") / f"{stage}-{PRINTS[stage]}"
    folder.mkdir(parents=True)
    manifest = {
        **{"kind": KINDS[stage], "stage": stage, "fingerprint": PRINTS[stage], "config": config},
        **{"inputs": {}, "metrics": {}, "decided_by": {}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(empty_folder: Path) -> Path:
    """A run whose sft is made and whose dpo is not."""
    folder = Path("outputs/runs/mine-12345678")
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("name: mine\nstages: [prepare, sft, dpo]\n")
    listed = {stage: f"{stage}-{PRINTS[stage]}" for stage in ("model", "prepare", "sft", "dpo")}
    (folder / "artifacts.json").write_text(json.dumps(listed))
    for stage in ("model", "prepare", "sft"):
        artifact(stage)
    return folder


@pytest.mark.parametrize("word", ["mine", "mine-12345678", "outputs/runs/mine-12345678"])
def test_a_run_answers_with_its_latest_policy(run: Path, word: str) -> None:
    dpo = artifact("dpo", CONFIG | {"data": {"template": "zephyr"}})
    found = find_source(Wanted(word))
    assert (found.name, found.folder.resolve()) == ("mine-12345678", dpo.resolve())
    assert found.template is TemplateName.zephyr
    assert found.cfg is not None and str(found.cfg.launch.precision) == "bf16"


def test_an_earlier_stage_can_be_asked_for(run: Path) -> None:
    found = find_source(Wanted("mine", stage="sft"))
    assert (found.name, found.folder.name) == ("mine-12345678-sft", f"sft-{PRINTS['sft']}")
    assert found.template is TemplateName.vicuna
    base = find_source(Wanted("mine", stage="model"))  # what it was before it was trained
    assert base.folder.name.startswith("model-") and base.template is TemplateName.tokenizer
    chosen = find_source(Wanted("mine", stage="model", template=TemplateName.chatml))
    assert chosen.template is TemplateName.chatml


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted("mine"), "'dpo' is not made.*it is missing.*--stage sft takes the policy before it"),
        (Wanted("mine", stage="dpo"), "'dpo' is not made"),
        (Wanted("mine", stage="prepare"), "is a dataset, which cannot answer"),
        (Wanted("mine", stage="sff"), "no stage of mine-12345678 'sff'. Did you mean 'sft'"),
        (Wanted(f"prepare-{PRINTS['prepare']}"), "is a dataset, which cannot answer"),
        (Wanted("sft-cc", stage="dpo"), "is an artifact of stage 'sft'"),
        (Wanted("mine-1234X"), "there is no run mine-1234X in outputs. Did you mean 'mine-12345678'"),
        (Wanted("plain", stage="sft"), "plain is no run and has no stages"),
        (Wanted("empty"), "empty is the folder of no run .* and of no artifact"),
    ],
)
def test_what_cannot_answer_is_refused(run: Path, wanted: Wanted, said: str) -> None:
    Path("plain").mkdir()
    Path("empty").mkdir()
    Path("plain/config.json").write_text("{}")
    with pytest.raises(UserError, match=said):
        find_source(wanted)


def test_a_run_without_a_policy_says_so(run: Path) -> None:
    (run / "run.yaml").write_text("name: mine\nstages: [prepare]\n")
    (run / "artifacts.json").write_text(json.dumps({"prepare": f"prepare-{PRINTS['prepare']}"}))
    with pytest.raises(UserError, match="none of its stages makes a policy: prepare"):
        find_source(Wanted("mine"))


def test_a_damaged_record_says_so(run: Path) -> None:
    damaged = artifact("dpo")
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        find_source(Wanted("mine"))
    (damaged / "manifest.json").unlink()
    damaged.rmdir()
    artifact("dpo", {"dataa": {}})
    with pytest.raises(UserError, match=r"manifest.json: unknown key 'dataa'. Did you mean 'data'"):
        find_source(Wanted("mine"))


def test_an_artifact_and_a_folder_answer_too(run: Path) -> None:
    found = find_source(Wanted("sft-cc"))
    assert (found.name, found.template) == (f"sft-{PRINTS['sft']}", TemplateName.vicuna)
    bundle = artifact("export")  # its tokenizer says how its turns are written
    assert find_source(Wanted(str(bundle))).template is TemplateName.tokenizer
    Path("plain").mkdir()
    Path("plain/adapter_config.json").write_text("{}")
    plain = find_source(Wanted("plain/"))
    assert (plain.name, plain.cfg, plain.template) == ("plain", None, TemplateName.tokenizer)
    assert find_source(Wanted("plain", template=TemplateName.hh)).template is TemplateName.hh
