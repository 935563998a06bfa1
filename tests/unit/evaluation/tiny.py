"""A tiny Llama of bytes, in a folder, and the questions that tests ask it."""

from __future__ import annotations

from pathlib import Path

from ftpipe.choices import Device, Init, Precision, TemplateName
from ftpipe.config import DataConfig, LaunchConfig, ModelConfig, RunConfig
from ftpipe.evaluate_config import EvaluateConfig
from ftpipe.evaluation.questions import Question
from ftpipe.modeling import random_model
from ftpipe.tokenizer import byte_level

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
ASKED = [
    Question("mine", "1", "all", ("Name a colour.", "And another?")),
    Question("mine", "2", "all", ("Why?",)),
    Question("mine", "3", "all", ("Which number comes after seven, and which before it?", "Why?")),
    Question("mine", "4", "all", ("Say hello.", "Say goodbye.")),
]


def config(**evaluate: object) -> RunConfig:
    """Return a run of a tiny Llama on the CPU."""
    return RunConfig(
        model=ModelConfig(path="base", init=Init.pretrained, architecture=dict(ARCHITECTURE)),
        data=DataConfig(template=TemplateName.tokenizer),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32, micro_batch_size=3),
        evaluate=EvaluateConfig(**evaluate),  # type: ignore[arg-type]
    )


def save(folder: Path, seed: int = 0) -> Path:
    """Write a tiny model with its tokenizer, and return the folder."""
    cfg = config()
    random_model(cfg.model, byte_level(), seed).save_pretrained(str(folder))
    byte_level().save_pretrained(str(folder))
    return folder
