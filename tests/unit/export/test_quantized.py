"""4 bits by llmcompressor: what is refused before anything long, and what decides the fingerprint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from ftpipe import pins, pipeline
from ftpipe.choices import Part, Quantized, Use
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.export import parity, quantized
from tests.unit.evaluation import tiny

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
}
VERSIONS = {"llmcompressor": "0.14", "compressed-tensors": "0.19", "transformers": "5", "torch": "2"}


@pytest.fixture
def cfg() -> RunConfig:
    found = tiny.config()
    found.export.quantize, found.export.group_size = [Quantized.gptq], 32
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset whose training rows are three tokens each; nothing else is there."""

    def first(dataset: Path, part: Part, most: int) -> tuple[Use, list[parity.Row]]:
        assert part is Part.train  # what is compared later is held out
        return Use.demonstrations, [parity.Row([1, 2, n], [-100] * 3) for n in range(min(most, 5))]

    monkeypatch.setattr(parity, "first_rows", first)
    return Path("dataset")


def stand_in(folder: Path, *lines: str) -> str:
    """Write what takes the place of the environment's Python: it tells versions, or runs ``lines``."""
    path = folder / "python"
    told = f"if [ \"$2\" = -c ]; then echo '{json.dumps(VERSIONS)}'; exit; fi"
    path.write_text("\n".join(["#!/bin/sh", told, *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_a_group_has_to_divide_the_inputs(cfg: RunConfig, rows: Path) -> None:
    quantized.check(cfg, LlamaConfig(**LLAMA), rows)
    cfg.export.group_size = 64
    with pytest.raises(ModelError) as caught:
        quantized.check(cfg, LlamaConfig(**LLAMA), rows)
    assert str(caught.value) == (
        "export.group_size=64 does not divide the 96 inputs of model.layers.0.mlp.down_proj; "
        "allowed here: 32."
    )
    with pytest.raises(ModelError, match=r"the 90 inputs of .*; allowed here: none\.$"):
        quantized.check(cfg, LlamaConfig(**LLAMA | {"intermediate_size": 90}), rows)


def test_a_head_is_not_counted_and_a_model_without_linear_layers_is_refused(
    cfg: RunConfig, rows: Path
) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=30, vocab_size=50)  # its layers are Conv1D
    with pytest.raises(ModelError, match="quantises no matrix of a model of type gpt2"):
        quantized.check(cfg, config, rows)


def test_rows_to_calibrate_on_are_needed(cfg: RunConfig) -> None:
    with pytest.raises(ModelError, match="no training rows to calibrate on; add the stage prepare"):
        quantized.check(cfg, LlamaConfig(**LLAMA), None)


def test_what_loads_the_files_again_is_needed(
    cfg: RunConfig, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install 'ftpipe\\[quantize\\]'"):
        quantized.check(cfg, LlamaConfig(**LLAMA), rows)


def test_versions_decide_and_the_place_does_not(cfg: RunConfig, tmp_path: Path) -> None:
    digests = pins.Digests(tmp_path)
    assert pins.quantizer_pins(tiny.config(), digests) == {}
    cfg.export.quantizer = stand_in(tmp_path)
    assert pins.quantizer_pins(cfg, digests) == VERSIONS
    assert "export.quantizer" in pipeline.UNREAD_KEYS
    cfg.export.quantizer = str(tmp_path)
    with pytest.raises(ConfigError, match="is no Python"):
        pins.quantizer_pins(cfg, digests)


def test_it_is_given_the_rows_and_what_it_failed_by_is_said(
    cfg: RunConfig, rows: Path, tmp_path: Path
) -> None:
    cfg.export.calibration_rows = 3
    cfg.export.quantizer = stand_in(
        tmp_path,
        f"cat > {tmp_path}/job.json",
        f'echo "$CUDA_VISIBLE_DEVICES|$1 $2" > {tmp_path}/seen',
        "echo first >&2; echo 'no such layers.' >&2; exit 3",
    )
    with pytest.raises(ModelError) as caught:
        quantized.write(cfg, tmp_path, rows, Quantized.awq)
    assert str(caught.value) == "export.quantize=awq: llmcompressor failed: no such layers."
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["rows"] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    assert (job["kind"], job["group"], job["out"]) == ("awq", 32, str(tmp_path / "awq"))
    assert (tmp_path / "seen").read_text() == f"|-I {quantized.SCRIPT}\n"  # no GPU is shown on a CPU
    cfg.export.quantizer = stand_in(tmp_path, "cat > /dev/null")
    with pytest.raises(ModelError, match="failed: it wrote nothing"):
        quantized.write(cfg, tmp_path, rows, Quantized.awq)
