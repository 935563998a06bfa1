"""The hub gets what was exported only on request, and what nobody asked to show stays private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from ftpipe import cli
from ftpipe.artifacts import Artifact
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError
from ftpipe.export import push

SECRET = "hf_PLANTEDplanted0123456789"


class Api:
    """Stands in for the hub's client; remembers what it was asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012  emptied by the fixture
    private = True
    fails: Exception | None = None

    def __init__(self, token: str) -> None:
        assert token == SECRET

    def create_repo(self, name: str, **words: Any) -> str:
        if self.fails:
            raise self.fails
        self.asked.append(("create", {"name": name, **words}))
        return f"https://hub/{name}"

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": self.private})

    def upload_folder(self, **words: Any) -> None:
        self.asked.append(("upload", words))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(Api, "asked", [])
    return Api


@pytest.fixture
def bundle(tmp_path: Path) -> Artifact:
    (tmp_path / "model.safetensors").write_bytes(bytes(2_500_000))
    manifest = {"files": {"model.safetensors": "0"}}
    return Artifact("bundle", "export", "0" * 16, tmp_path, manifest)


def wanted(public: bool = False) -> RunConfig:
    cfg = RunConfig(stages=["prepare", "sft", "export"])
    cfg.export.push, cfg.export.public = "me/mine", public
    return cfg


@pytest.mark.parametrize("public", [False, True])
def test_it_says_what_it_pushes_and_how_it_is_seen(
    public: bool, hub: type[Api], bundle: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hub, "private", not public)
    assert push.push(wanted(public), bundle) == "https://hub/me/mine"
    (create, made), (upload, sent) = hub.asked
    assert (create, upload) == ("create", "upload")
    assert made == {"name": "me/mine", "private": not public, "exist_ok": True}
    assert sent["repo_id"] == "me/mine" and sent["folder_path"] == str(bundle.path)
    assert "uncommitted.diff" in sent["ignore_patterns"]
    left = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    left += ["old-f16.gguf", "Modelfile", "pictures/loss.png"]  # by an earlier push, and by hand
    deleted = set(filter_repo_objects(left, allow_patterns=sent["delete_patterns"]))
    assert deleted == set(left) - {"pictures/loss.png"}
    said = capsys.readouterr().out
    seen = "for everybody to see" if public else "private"
    assert said == f"export: pushes 1 files (2.5 MB) of {bundle.path} to me/mine, {seen}\n"
    assert SECRET not in said


def test_a_repository_that_everybody_sees_gets_nothing_unasked(
    hub: type[Api], bundle: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "private", False)
    with pytest.raises(UserError, match=r"is there already and everybody can see it; set export.public"):
        push.push(wanted(), bundle)
    assert [what for what, _ in hub.asked] == ["create"]


def test_a_hub_that_fails_costs_nothing(
    hub: type[Api], bundle: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fails", OSError("403 Forbidden.\nlong page"))
    with pytest.raises(UserError, match=r"me/mine failed \(403 Forbidden\); what was exported is in "):
        push.push(wanted(), bundle)


def test_what_cannot_work_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"needs the environment variable HF_TOKEN"):
        push.check(wanted())
    monkeypatch.setenv("HF_TOKEN", SECRET)
    push.check(wanted())
    cfg = wanted()
    cfg.stages = ["prepare", "sft"]
    with pytest.raises(ConfigError, match=r"'export' is not among the stages"):
        push.check(cfg)
    cfg.export.push = None
    push.check(cfg)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.push=mine"], "export.push=mine is no repository of the hub; write user/name."),
        (["export.push='../x/y'"], "is no repository of the hub"),
        (
            ["export.public=true"],
            "export.public=True is out of range; allowed: false without export.push",
        ),
        (["export.max_shard_size=5"], "export.max_shard_size=5 is out of range; allowed: a number with"),
        (["export.max_shard_size=0GB"], "export.max_shard_size=0GB is out of range"),
        (["export.gguf=[q8]"], "export.gguf[0]=q8 is not one of"),
        (["export.gguf=[f16,f16]"], "allowed: each type once"),
        (["export.max_kl=0"], "export.max_kl=0.0 is out of range; allowed: above 0"),
        (["export.min_agreement=2"], "export.min_agreement=2.0 is out of range; allowed: in [0, 1]"),
        (["export.rows=0"], "export.rows=0 is out of range"),
        (["export.converter=x.py"], "allowed: null without export.gguf"),
        (["export.converter=x.py", "export.gguf=[q4_0]"], "f32, f16, bf16, q8_0 with export.converter"),
        (["export.converter=x.py", "export.gguf=[f16]"], "export.converter=x.py is no file; give llama"),
        (["export.quantize=[int4]"], "export.quantize[0]=int4 is not one of"),
        (["export.quantize=[gptq,gptq]"], "allowed: each method once"),
        (
            ["export.quantizer=x"],
            "export.quantizer=x is out of range; allowed: null without",
        ),
        (["export.group_size=16"], "export.group_size=16 is out of range; allowed: 32, 64, 128"),
        (["export.calibration_rows=0"], "export.calibration_rows=0 is out of range"),
        (
            ["export.quantize=[awq]", "export.quantizer=/no/python"],
            "export.quantizer=/no/python is no",
        ),
        (
            ["export.quantize=[awq]", "export.quantizer=/bin/false"],
            "llmcompressor, which /bin/false",
        ),
        (
            ["adapter=full", "adapter.dora=true"],
            "adapter.dora=True is out of range; allowed: false with",
        ),
        (["export.push=me/mine"], "needs the environment variable HF_TOKEN"),
        (["stages=[prepare,export]"], "'export' needs a policy, but nothing before it makes one."),
    ],
)
def test_bad_input_gets_one_sentence(
    words: list[str],
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert cli.main(["run", "recipe=tiny-export", *words]) == 2
    told = capfd.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not Path("outputs").exists()
