"""The exported folder in 4 bits by GPTQ or AWQ, in the format of compressed-tensors.

llmcompressor pins other versions of transformers than ftpipe's, so it has an environment of its own:
``export.quantizer`` is that environment's Python, which runs ``compress.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ftpipe.choices import Device, Part, Quantized
from ftpipe.config import RunConfig
from ftpipe.errors import ModelError
from ftpipe.export import parity, source
from ftpipe.export_config import GROUPS
from ftpipe.orphans import end_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ISOLATED = "-I"  # neither PYTHONPATH nor the modules beside the script are that environment's
SCRIPT = Path(__file__).parent / "compress.py"


def check(cfg: RunConfig, config: PreTrainedConfig, dataset: Path | None) -> None:
    """Refuse what cannot be quantised, or not be loaded again, before anything long.

    Raises:
        ModelError: saying what is in the way.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ModelError(
            "export.quantize needs compressed-tensors, which loads the files again: "
            "pip install 'ftpipe[quantize]'."
        )
    if not _calibration(dataset, 1):
        raise ModelError("export.quantize has no training rows to calibrate on; add the stage prepare.")
    inputs = _inputs(config, cfg.model.trust_remote_code)
    if not inputs:
        kind = config.get_text_config().model_type
        raise ModelError(
            f"export.quantize: llmcompressor quantises no matrix of a model of type {kind}."
        )
    group = cfg.export.group_size
    for name, width in inputs.items():
        if width % group:
            able = [str(size) for size in GROUPS if not any(wide % size for wide in inputs.values())]
            raise ModelError(
                f"export.group_size={group} does not divide the {width:,} inputs of {name}; "
                f"allowed here: {', '.join(able) or 'none'}."
            )


def _inputs(config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, int]:
    """Return how many inputs each matrix has that is quantised: those of linear layers but the head."""
    model = source.skeleton(config, trust_remote_code)
    head = model.get_output_embeddings()
    return {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _calibration(dataset: Path | None, most: int) -> list[list[int]]:
    """Return token ids of the first rows that are trained on."""
    if dataset is None:
        return []
    _, rows = parity.first_rows(dataset, Part.train, most)
    return [list(row.ids) for row in rows]


def write(cfg: RunConfig, folder: Path, dataset: Path | None, kind: Quantized) -> str:
    """Quantise the model in ``folder`` into a folder in it, named after the method; return its name.

    Raises:
        ModelError: with llmcompressor's last words, if it fails.
    """
    rows = _calibration(dataset, cfg.export.calibration_rows)
    job = {
        "folder": str(folder),
        "out": str(folder / kind),
        "kind": kind,
        "group": cfg.export.group_size,
        "rows": rows,
        "threads": cfg.launch.threads,
        "trust_remote_code": cfg.model.trust_remote_code,
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cfg.launch.device is Device.cpu else {}
    done = subprocess.run(
        [cfg.export.quantizer or sys.executable, ISOLATED, str(SCRIPT)],
        input=json.dumps(job),
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=end_with_parent,
    )
    if done.returncode or not (folder / kind / "config.json").is_file():
        words = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ModelError(f"export.quantize={kind}: llmcompressor failed: {words.rstrip('.')}.")
    return str(kind)
