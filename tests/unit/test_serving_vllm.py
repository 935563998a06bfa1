"""What vLLM is told, and what it is not asked to do. It is not run: no test machine has it."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftpipe import cli
from ftpipe.choices import Method, Precision, TemplateName
from ftpipe.config import AdapterConfig, LaunchConfig, RunConfig
from ftpipe.errors import ConfigError
from ftpipe.serving.options import ServeOptions, Wanted
from ftpipe.serving.source import Source
from ftpipe.serving.vllm import command

KEY = "planted-key-0123456789"


def source(folder: Path, method: Method = Method.lora, **adapter: Any) -> Source:
    if adapter:
        stated = {"base_model_name_or_path": "org/base", "revision": "a" * 40, **adapter}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        (folder / "adapter_model.safetensors").touch()
    cfg = RunConfig(adapter=AdapterConfig(method=method), launch=LaunchConfig(precision=Precision.bf16))
    return Source("mine", folder, cfg, TemplateName.tokenizer, "policy")


CHOSEN = ServeOptions(Wanted("mine"), key=KEY)


def test_whole_weights_are_served_under_their_name(tmp_path: Path) -> None:
    words = command(source(tmp_path, Method.full), CHOSEN, "mine")
    assert words == [
        *("vllm", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", "8000"),
        *("--served-model-name", "mine", "--dtype", "bfloat16", "--generation-config", "vllm"),
    ]


@pytest.mark.parametrize("method", list(Method))
def test_a_bundle_is_served_as_it_is_stored(method: Method, tmp_path: Path) -> None:
    bundle = replace(source(tmp_path, method), kind="bundle")
    assert command(bundle, CHOSEN, "mine") == [
        *("vllm", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", "8000"),
        *("--served-model-name", "mine", "--generation-config", "vllm"),
    ]


def test_a_merged_policy_has_no_four_bits(tmp_path: Path) -> None:
    told = dict(itertools.pairwise(command(source(tmp_path, Method.qlora), CHOSEN, "mine")))
    assert told["serve"] == str(tmp_path) and told["--dtype"] == "bfloat16"


def test_an_adapter_is_served_on_its_base(tmp_path: Path) -> None:
    words = command(source(tmp_path, r=17), CHOSEN, "mine")
    assert words[:3] == ["vllm", "serve", "org/base"]
    told = dict(itertools.pairwise(words))
    assert told["--lora-modules"] == f"mine={tmp_path}" and "--enable-lora" in words
    assert told["--max-lora-rank"] == "32"  # the next that vLLM takes
    assert told["--revision"] == "a" * 40 and told["--tokenizer"] == str(tmp_path)
    assert told["--served-model-name"] == "mine-base"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"method": Method.qlora, "r": 8}, "trained on a 4-bit base; export the policy"),
        ({"r": 8, "trainable_token_indices": {"embed_tokens": [5]}}, "reads no trained tokens"),
        ({"r": 8, "use_dora": True}, "reads no DoRA; export the policy"),
        ({"r": 512}, "takes adapters up to rank 256"),
    ],
)
def test_what_vllm_would_serve_otherwise_is_refused(
    found: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        command(source(tmp_path, **found), CHOSEN, "mine")


def test_another_template_and_no_port_are_refused(tmp_path: Path) -> None:
    other = Source("mine", tmp_path, None, TemplateName.alpaca)
    with pytest.raises(ConfigError, match="trained with 'alpaca'; export the policy"):
        command(other, CHOSEN, "mine")
    with pytest.raises(ConfigError, match="needs a port by number"):
        command(source(tmp_path), ServeOptions(Wanted("mine"), port=0), "mine")


@pytest.fixture
def plain(empty_folder: Path) -> Path:
    (empty_folder / "plain").mkdir()
    (empty_folder / "plain/config.json").write_text("{}")
    return empty_folder


def test_its_absence_is_one_sentence(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(plain))
    assert cli.main(["serve", "plain", "--engine=vllm"]) == 2
    assert "--engine=vllm: vLLM is not installed; pip install vllm" in capsys.readouterr().err


def test_the_program_takes_over_and_the_key_is_not_among_its_words(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = plain / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(plain))
    monkeypatch.setenv("MINE", KEY)
    became: list[tuple[str, list[str], dict[str, str]]] = []

    class Became(Exception):
        pass

    def execve(path: str, words: list[str], env: dict[str, str]) -> None:
        became.append((path, words, env))
        raise Became

    monkeypatch.setattr(os, "execve", execve)
    (plain / "plain").rename(plain / "my folder")
    words = ["serve", "my folder", "--engine=vllm", "--api-key-env=MINE", "--port=18123", "--name=x"]
    with pytest.raises(Became):
        cli.main(words)
    ((path, told, env),) = became
    assert path == str(program) and told[:3] == ["vllm", "serve", "my folder"]
    assert told[3:9] == ["--host", "127.0.0.1", "--port", "18123", "--served-model-name", "x"]
    assert env["VLLM_API_KEY"] == KEY and env["PATH"] == str(plain)
    shown = "".join(capsys.readouterr())
    assert KEY not in " ".join(told) + shown
    assert "'my folder'" in shown  # as a shell would take it
