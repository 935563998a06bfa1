"""4 bits by llmcompressor: what is refused before anything long, and what decides the fingerprint."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from ftpipe import pins, pipeline
from ftpipe.choices import Init, Part, Quantized, Use
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.export import compress, parity, quantized
from ftpipe.room import NoRoom
from tests.unit.evaluation import tiny

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
}
NEOX = GPTNeoXConfig(
    num_hidden_layers=1, num_attention_heads=2, hidden_size=64, intermediate_size=96, vocab_size=50
)
VERSIONS = {"llmcompressor": "0.14", "compressed-tensors": "0.19", "transformers": "5", "torch": "2"}


@pytest.fixture
def cfg() -> RunConfig:
    found = tiny.config()
    found.export.quantize, found.export.group_size = [Quantized.gptq], 32
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset whose training rows are three tokens each; nothing else is there."""

    def some(dataset: Path, part: Part, most: int, spread: bool) -> tuple[Use, list[parity.Row]]:
        assert part is Part.train and spread  # what is compared later is held out
        return Use.demonstrations, [parity.Row([1, 2, n], [-100] * 3) for n in range(min(most, 5))]

    monkeypatch.setattr(parity, "some_rows", some)
    return Path("dataset")


def stand_in(folder: Path, *lines: str, versions: dict[str, str] = VERSIONS) -> str:
    """Write what takes the place of the environment's Python: it tells versions, or runs ``lines``."""
    path = folder / "python"
    told = f"if [ \"$2\" = -c ]; then echo '{json.dumps(versions)}'; exit; fi"
    path.write_text("\n".join(["#!/bin/sh", told, *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_a_group_has_to_divide_the_inputs(cfg: RunConfig, rows: Path) -> None:
    assert quantized.check(cfg, LlamaConfig(**LLAMA), rows) == 7
    cfg.export.group_size = 64
    with pytest.raises(ModelError) as caught:
        quantized.check(cfg, LlamaConfig(**LLAMA), rows)
    assert str(caught.value) == (
        "export.group_size=64 does not divide the 96 inputs of model.layers.0.mlp.down_proj; "
        "allowed here: 32."
    )
    with pytest.raises(ModelError, match=r"the 90 inputs of .*; allowed here: none\.$"):
        quantized.check(cfg, LlamaConfig(**LLAMA | {"intermediate_size": 90}), rows)


@pytest.mark.parametrize(
    ("config", "kinds", "said"),
    [
        # its layers are Conv1D
        (
            GPT2Config(n_layer=1, n_head=2, n_embd=30, vocab_size=50),
            "gptq",
            "type gpt2; leave it out",
        ),
        # its layers are of a class of their own, which llmcompressor leaves whole without a word
        (
            FalconConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=64),
            "gptq",
            "type falcon",
        ),
        (GPTBigCodeConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=50), "gptq", "type gpt_bigcode"),
        (NEOX, "gptq,awq", "awq cannot have a model of type gpt_neox; it can have gemma2, llama, "),
        (NEOX, "gptq", None),
    ],
    ids=str,
)
def test_a_model_that_would_stay_whole_or_stop_it_is_refused(
    cfg: RunConfig, rows: Path, config: PreTrainedConfig, kinds: str, said: str | None
) -> None:
    cfg.export.quantize = [Quantized(kind) for kind in kinds.split(",")]
    if said is None:
        assert quantized.check(cfg, config, rows) == 4
        return
    with pytest.raises(ModelError, match=said):
        quantized.check(cfg, config, rows)


def test_rows_to_calibrate_on_are_needed(cfg: RunConfig) -> None:
    with pytest.raises(ModelError, match="no training rows to calibrate on; add the stage prepare"):
        quantized.check(cfg, LlamaConfig(**LLAMA), None)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo words"], "is no Python; give that of an environment"),
        (["echo '[1]'"], "needs llmcompressor, which"),
        (["exit 0"], "needs llmcompressor, which"),
        (["exit 1"], "needs llmcompressor, which"),
        ([r"printf '\377' >&2; exit 1"], "needs llmcompressor, which"),
    ],
)
def test_a_python_that_does_not_answer_is_refused_in_one_sentence(
    cfg: RunConfig, lines: list[str], said: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    python.chmod(0o755)
    cfg.export.quantizer = str(python)
    with pytest.raises(ConfigError, match=said):
        pins.quantizer_pins(cfg, pins.Digests(tmp_path))


def test_what_loads_the_files_again_is_needed(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'ftpipe\\[quantize\\]'"):
        pins.quantizer_pins(cfg, pins.Digests(tmp_path))


def test_versions_decide_and_the_place_does_not(cfg: RunConfig, tmp_path: Path) -> None:
    def facts(**versions: str) -> dict[str, Any]:
        cfg.export.quantizer = stand_in(tmp_path, versions=VERSIONS | versions)
        return pipeline._facts(cfg, pipeline.STAGES["export"], {}, pins.Digests(tmp_path))

    cfg.model.init, cfg.model.tokenizer = Init.random, "bytes"
    first = facts()
    assert facts() == first
    assert facts(torch="3")["pins"] == first["pins"] | {"quantizer/torch": "3"}
    (tmp_path / "elsewhere").mkdir()
    cfg.export.quantizer = stand_in(tmp_path / "elsewhere")
    moved = pipeline._facts(cfg, pipeline.STAGES["export"], {}, pins.Digests(tmp_path))
    assert moved == first
    cfg.export.quantizer = str(tmp_path)
    with pytest.raises(ConfigError, match="is no Python"):
        pins.quantizer_pins(cfg, pins.Digests(tmp_path))


def test_without_four_bits_their_keys_decide_nothing(cfg: RunConfig, tmp_path: Path) -> None:
    cfg.model.init, cfg.model.tokenizer, cfg.export.quantize = Init.random, "bytes", []
    stage, digests = pipeline.STAGES["export"], pins.Digests(tmp_path)
    cfg.export.group_size, cfg.export.calibration_rows = 128, 128
    first = pipeline._facts(cfg, stage, {}, digests)
    cfg.export.group_size, cfg.export.calibration_rows = 64, 7
    assert pipeline._facts(cfg, stage, {}, digests) == first
    assert "export.rows" in first["config"]


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
        quantized.write(cfg, tmp_path, rows, Quantized.awq, 7)
    assert str(caught.value) == "export.quantize=awq: llmcompressor failed: no such layers."
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["rows"] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    assert (job["kind"], job["group"], job["out"]) == ("awq", 32, str(tmp_path / "awq"))
    assert set(job) == set(inspect.signature(compress.quantise).parameters)
    assert (tmp_path / "seen").read_text() == f"|-I {quantized.SCRIPT}\n"  # no GPU is shown on a CPU


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("cat > /dev/null", "it packed 0 of 7 matrices"),
        ("cat > /dev/null; exit 1", "it says no more"),
        ("echo 'Calibrating: 50%' >&2; kill -9 $$", "it was ended by SIGKILL; the system does so where"),
        (r"printf 'bad \377 byte\n' >&2; exit 1", "bad � byte"),
    ],
)
def test_it_is_said_how_it_ended(
    cfg: RunConfig, rows: Path, lines: str, said: str, tmp_path: Path
) -> None:
    cfg.export.quantizer = stand_in(tmp_path, lines)
    with pytest.raises(ModelError, match=said):
        quantized.write(cfg, tmp_path, rows, Quantized.awq, 7)


def test_a_full_disk_is_said_to_be_one(cfg: RunConfig, rows: Path, tmp_path: Path) -> None:
    cfg.export.quantizer = stand_in(tmp_path, "echo 'I/O: No space left on device' >&2; exit 1")
    with pytest.raises(NoRoom):
        quantized.write(cfg, tmp_path, rows, Quantized.awq, 7)


def test_the_script_says_in_its_last_line_why_it_failed(tmp_path: Path) -> None:
    job = dict.fromkeys(inspect.signature(compress.quantise).parameters)
    done = subprocess.run(
        [sys.executable, str(quantized.SCRIPT)],
        input=json.dumps({**job, "one too many": 1}),
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last == "TypeError: quantise() got an unexpected keyword argument 'one too many'"
