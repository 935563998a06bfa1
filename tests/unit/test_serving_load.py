"""A policy is loaded as training had it, as far as the machine can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from ftpipe.choices import Attention, Device, Method, Precision, TemplateName
from ftpipe.config import AdapterConfig, LaunchConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError
from ftpipe.modeling import base_dtype
from ftpipe.serving.load import as_trained, voice
from ftpipe.serving.source import Source
from ftpipe.tokenizer import byte_level
from tests import parrot

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trained(method: Method, precision: Precision) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="x", attention=Attention.flash_attention_2),
        adapter=AdapterConfig(method=method),
        launch=LaunchConfig(precision=precision),
    )


@pytest.mark.parametrize(
    ("method", "precision", "where", "as_method", "dtype", "attention"),
    [
        (Method.qlora, Precision.bf16, GPU, Method.qlora, torch.bfloat16, "flash_attention_2"),
        (Method.qlora, Precision.bf16, CPU, Method.qlora, torch.bfloat16, "sdpa"),
        (Method.lora, Precision.fp16, GPU, Method.lora, torch.float16, "flash_attention_2"),
        (Method.lora, Precision.fp16, CPU, Method.lora, torch.float32, "sdpa"),
        # weights that were trained whole were float32, with arithmetic in bfloat16
        (Method.full, Precision.bf16, GPU, Method.lora, torch.bfloat16, "flash_attention_2"),
        (Method.full, Precision.fp32, CPU, Method.lora, torch.float32, "sdpa"),
    ],
)
def test_the_base_is_loaded_as_it_was_trained(
    method: Method,
    precision: Precision,
    where: torch.device,
    as_method: Method,
    dtype: torch.dtype,
    attention: str,
) -> None:
    before = trained(method, precision)
    cfg = as_trained(before, where)
    assert cfg.adapter.method is as_method and base_dtype(cfg) is dtype
    assert str(cfg.model.attention) == attention
    assert before == trained(method, precision)


def test_a_folder_without_a_record_keeps_its_number_format(tmp_path: Path) -> None:
    parrot.write(tmp_path)
    source = Source("x", tmp_path, None, TemplateName.tokenizer)
    for dtype in (torch.float32, torch.bfloat16):
        parrot.model(positions=77).to(dtype).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
        one = voice(source, Device.cpu)
        assert one.engine._model.dtype is dtype and one.engine.context == 77
        one.engine.close()


@pytest.mark.parametrize(
    ("kind", "precision", "dtype"),
    [
        ("bundle", Precision.bf16, torch.float32),  # as it was exported
        ("base_model", Precision.bf16, torch.float32),
        ("policy", Precision.bf16, torch.bfloat16),  # merged: as training computed
    ],
)
def test_whole_weights_are_not_quantised_again(
    kind: str, precision: Precision, dtype: torch.dtype, tmp_path: Path
) -> None:
    parrot.write(tmp_path)  # in float32
    cfg = trained(Method.qlora, precision)
    one = voice(Source("x", tmp_path, cfg, TemplateName.tokenizer, kind), Device.cpu)
    kinds = {type(weight).__name__ for weight in one.engine._model.parameters()}
    assert kinds == {"Parameter"} and one.engine._model.dtype is dtype
    one.engine.close()


def test_a_model_without_sdpa_answers_within_its_context(tmp_path: Path) -> None:
    tokenizer = byte_level()
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=len(tokenizer))
    MptForCausalLM(config).save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    one = voice(Source("x", tmp_path, None, TemplateName.tokenizer), Device.cpu)
    assert one.engine.context == 64
    assert one.engine._model.config._attn_implementation == "eager"
    one.engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = Source("x", tmp_path, None, TemplateName.tokenizer)
    with pytest.raises(ConfigError, match="--device=cuda needs a GPU"):
        voice(source, Device.cuda)
