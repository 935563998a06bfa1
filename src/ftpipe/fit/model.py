"""Which model a run starts from, by what is known of it before it is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftpipe.choices import Init
from ftpipe.config import ModelConfig
from ftpipe.errors import ConfigError
from ftpipe.fit.shapes import Shape, shape_of
from ftpipe.pins import BYTES, local_model

BYTE_TOKENS = 258  # of the tokenizer that is made by code: bytes, padding and the end


@dataclass(frozen=True)
class Model:
    """A model's shape, and where it is stated.

    Attributes:
        new: tokens that the run adds to it, at most.
    """

    shape: Shape
    stated: str
    new: int = 0


def model_of(model: ModelConfig) -> Model:
    """Return the model of a run: by its folder, by what the hub left on this machine, or as stated.

    Raises:
        ConfigError: if nothing says how large it is, or its architecture is not in the table.
    """
    config, stated = _config(model)
    if config is None:
        raise ConfigError(
            f"nothing here says how large {model.path} is; state model.architecture, as conf/model does."
        )
    keys = dict(config.get("text_config") or config)
    if model.init is Init.random and "vocab_size" not in keys and model.tokenizer == BYTES:
        keys["vocab_size"] = BYTE_TOKENS
    shape = shape_of(keys)
    new = len(model.new_tokens)
    return Model(replace(shape, vocabulary=shape.vocabulary + new), stated, new)


def _config(model: ModelConfig) -> tuple[dict[str, Any] | None, str]:
    if model.init is Init.random:
        return model.architecture, "model.architecture"
    folder = local_model(model)
    if folder is not None and (folder / "config.json").is_file():
        return _read(folder / "config.json"), str(folder / "config.json")
    if folder is None and (cached := _cached(model)) is not None:
        return _read(cached), "config.json of the hub's copy here"
    if "model_type" in model.architecture:
        return model.architecture, "model.architecture"
    return None, ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    return found


def _cached(model: ModelConfig) -> Path | None:
    """Return the hub's copy of a model's configuration, where an earlier run left it."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    name = f"models--{str(model.path).replace('/', '--')}"
    file = hub / name / "snapshots" / str(model.revision) / "config.json"
    return file if file.is_file() else None
