"""Configurations to reckon with: a LLaMA-7B by its published keys, and small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftpipe.choices import Device, Format, Method, Precision
from ftpipe.config import (
    AdapterConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
)

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def run(method: Method = Method.full, file: Path | str = "rows.jsonl", **changed: Any) -> RunConfig:
    """Return a run of LLaMA-7B on a GPU; ``changed`` names keys with two underscores for a dot."""
    cfg = RunConfig(
        model=ModelConfig(path="someone/llama", revision="0" * 40, architecture=dict(LLAMA_7B)),
        adapter=AdapterConfig(method=method),
        data=DataConfig(sources={"rows": SourceConfig(format=Format.alpaca, path=str(file))}),
        launch=LaunchConfig(device=Device.cuda, precision=Precision.bf16),
    )
    for key, value in changed.items():
        *path, name = key.split("__")
        at: Any = cfg
        for part in path:
            at = getattr(at, part)
        assert hasattr(at, name)
        setattr(at, name, value)
    return cfg
