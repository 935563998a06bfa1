"""Files of weights written tensor by tensor, read by the libraries that everybody reads them with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ftpipe.export import shards

WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([1.5, -2.5]),
    "c.weight": torch.linspace(-1, 1, 30).reshape(2, 3, 5),
    "scalar": torch.tensor(7.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_safetensors_reads_back_what_was_written(dtype: torch.dtype, most: int, tmp_path: Path) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}
    files = shards.write(tmp_path, shapes, lambda name: WEIGHTS[name].to(dtype), dtype, most)
    read: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(tmp_path / file)
        header = int.from_bytes((tmp_path / file).read_bytes()[:8], "little")
        assert header % 8 == 0  # so tensors lie where any number may
        size = sum(weight.nbytes for weight in part.values())
        assert size <= most or len(part) == 1
        assert not read.keys() & part.keys()
        read |= part
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert read.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert torch.equal(read[name], weight.to(dtype))
    index = tmp_path / "model.safetensors.index.json"
    if most == 10**6:
        assert files == ["model.safetensors"] and not index.exists()
        return
    told = json.loads(index.read_text())
    assert told["metadata"]["total_size"] == sum(weight.nbytes for weight in read.values())
    for name, file in told["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"


# A Llama of 220 MB in float32, its adapter of all linear layers, and how much memory merging it took.
MEASURED = """
import resource, sys, torch
from pathlib import Path
from ftpipe.choices import Device, Precision
from ftpipe.config import LaunchConfig, RunConfig
from ftpipe.export import merging
from ftpipe.policy import Incoming

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

base, adapter, small, out = map(Path, sys.argv[1:])
cfg = RunConfig(launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32))
merging.merged(cfg, Incoming(str(small)), torch.float32, 64).write(out, 10**9)  # all imports
before = peak()
made = merging.merged(cfg, Incoming(str(base), None, adapter), torch.bfloat16, 64)
made.write(out, 10**9)
print(peak() - before)
"""


@pytest.mark.slow
def test_merging_holds_little_more_than_one_tensor(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(width: int, layers: int) -> LlamaForCausalLM:
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))

    model(16, 1).save_pretrained(str(tmp_path / "small"))
    large = model(768, 9)
    large.save_pretrained(str(tmp_path / "base"))
    policy = get_peft_model(large, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    policy.save_pretrained(str(tmp_path / "adapter"))
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    (tmp_path / "out").mkdir()
    words = [str(tmp_path / name) for name in ("base", "adapter", "small", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    taken = int(done.stdout.split()[-1])
    assert size > 200e6
    assert taken < 0.35 * size, f"{taken / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
