"""The exported folder in 4 bits by GPTQ or AWQ, in the format of compressed-tensors.

llmcompressor pins other versions of transformers than ftpipe's, so it has an environment of its own:
``export.quantizer`` is that environment's Python, which runs ``compress.py``.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftpipe.choices import Determinism, Device, Part, Quantized
from ftpipe.config import RunConfig
from ftpipe.errors import ModelError
from ftpipe.export import parity, program, source
from ftpipe.export_config import GROUPS
from ftpipe.pins import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCRIPT = Path(__file__).parent / "compress.py"
ISOLATED = "-I"  # neither PYTHONPATH nor the modules beside the script are that environment's
BESIDE = (*TOKENIZER_FILES, "generation_config.json")  # the same in the bundle and in 4 bits
# Types whose layers llmcompressor 0.14 knows to scale by their activations; others stop it half-way.
SCALED = ("gemma2", "llama", "mistral", "phi3", "qwen2", "stablelm")
CLOSED = ("gpt_bigcode",)  # transformers 5.23 cannot open them again


def check(cfg: RunConfig, config: PreTrainedConfig, dataset: Path | None) -> int:
    """Refuse what cannot be quantised, or not be loaded again, before anything long.

    Returns:
        How many matrices there are to quantise.

    Raises:
        ModelError: saying what is in the way.
    """
    if not _calibration(dataset, cfg.export.calibration_rows):
        raise ModelError("export.quantize has no training rows to calibrate on; add the stage prepare.")
    kind = config.get_text_config().model_type
    inputs = _inputs(config, cfg.model.trust_remote_code)
    if not inputs or kind in CLOSED:
        raise ModelError(f"export.quantize cannot have a model of type {kind}; leave it out.")
    if Quantized.awq in cfg.export.quantize and kind not in SCALED:
        raise ModelError(
            f"export.quantize=awq cannot have a model of type {kind}; it can have {', '.join(SCALED)}, "
            "and gptq can have this one."
        )
    group = cfg.export.group_size
    for name, width in inputs.items():
        if width % group:
            able = [str(size) for size in GROUPS if not any(wide % size for wide in inputs.values())]
            raise ModelError(
                f"export.group_size={group} does not divide the {width:,} inputs of {name}; "
                f"allowed here: {', '.join(able) or 'none'}."
            )
    return len(inputs)


def _inputs(config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, int]:
    """Return how many inputs each matrix has that is quantised: those of linear layers but the head.

    Empty where some are of a class of their own, as Falcon's: llmcompressor would leave them whole.
    """
    model = source.skeleton(config, trust_remote_code)
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if any(type(layer) is not nn.Linear for layer in layers.values()):
        return {}
    return {name: layer.in_features for name, layer in layers.items()}


def _calibration(dataset: Path | None, most: int) -> list[list[int]]:
    """Return token ids of rows that are trained on, evenly from first to last: sources lie in turn."""
    if dataset is None:
        return []
    _, rows = parity.some_rows(dataset, Part.train, most, spread=True)
    return [list(row.ids) for row in rows]


def write(cfg: RunConfig, folder: Path, dataset: Path | None, kind: Quantized, matrices: int) -> str:
    """Quantise the model in ``folder`` into a folder in it, named after the method; return its name.

    Args:
        matrices: as many as ``check`` found.

    Raises:
        ModelError: with llmcompressor's last words, if it fails, or if it left a matrix whole.
        NoRoom: if the disk is full.
    """
    out = folder / kind
    job = {
        "folder": str(folder),
        "out": str(out),
        "kind": kind,
        "group": cfg.export.group_size,
        "rows": _calibration(dataset, cfg.export.calibration_rows),
        "threads": cfg.launch.threads,
        "strict": cfg.determinism is Determinism.strict,
        "max_shard_size": cfg.export.max_shard_size,
        "trust_remote_code": cfg.model.trust_remote_code,
    }
    why = _failure(cfg, job, folder)
    files = source.listed([str(file) for file in out.glob("*.safetensors")]).files
    packed = sum(name.endswith(".weight_packed") for name in files)
    if why is None and packed != matrices:
        why = f"it packed {packed:,} of {matrices:,} matrices"
    if why is not None:
        raise ModelError(f"export.quantize={kind}: llmcompressor failed: {why.rstrip('.')}.")
    (out / "recipe.yaml").unlink(missing_ok=True)  # Python's own objects, which safe loaders refuse
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    mode = (folder / "config.json").stat().st_mode
    for file in out.iterdir():
        file.chmod(mode)  # safetensors' are the owner's alone
    return str(kind)


def _failure(cfg: RunConfig, job: dict[str, Any], folder: Path) -> str | None:
    """Have the job done; return why it failed, or None.

    Raises:
        NoRoom: if the disk is full.
    """
    if torch.cuda.is_available():  # what the comparison before has let go of
        gc.collect()
        torch.cuda.empty_cache()
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cfg.launch.device is Device.cpu else {}
    command = [cfg.export.quantizer or sys.executable, ISOLATED, str(SCRIPT)]
    return program.failure(command, folder, json.dumps(job), hidden)
