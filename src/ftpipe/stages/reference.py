"""The reference's log-probabilities of every reply, computed once and reused by whatever trains on them.

The reference is the policy that comes in. A sweep over beta, or over losses, computes it once; and the
training that reads it holds no second model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer
from transformers.utils.import_utils import enable_tf32

from ftpipe import determinism, policy, training
from ftpipe.artifacts import Artifact
from ftpipe.choices import Device, Part, Use
from ftpipe.config import RunConfig
from ftpipe.data import table
from ftpipe.logs import say
from ftpipe.preferences import policy as preference_policy
from ftpipe.preferences import reference
from ftpipe.preferences.batches import one_prompt
from ftpipe.preferences.logps import reply_logps

if TYPE_CHECKING:
    from torch import Tensor

USES = (Use.preferences, Use.unpaired)


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read ``inputs["dataset"]`` and the policy that comes in, write its log-probs to ``out``.

    Raises:
        ModelError: if the policy cannot be loaded.
        ConfigError: if a row is longer than the model's positions.
    """
    determinism.begin(cfg)
    if cfg.launch.device is Device.cuda:
        enable_tf32(cfg.launch.tf32)  # as a Trainer does
    dataset = inputs["dataset"].path
    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    accelerator = Accelerator(cpu=cfg.launch.device is Device.cpu)
    start = policy.incoming(cfg, inputs)
    model = preference_policy.as_it_came(cfg, start, tokenizer).to(accelerator.device).eval()
    metrics: dict[str, float] = {}
    for use in USES:
        for part in (Part.train, Part.validation):
            if not table.place(dataset, use, part).is_file():
                continue
            rows = table.read(dataset, use, part)
            if use is Use.unpaired and one_prompt(rows):
                continue  # kto refuses them; another loss does not read them
            training.check_positions(model, max(rows["length"][:], default=0))

            def logps(batch: Mapping[str, Tensor]) -> Tensor:
                with torch.no_grad(), accelerator.autocast():
                    return reply_logps(model, batch)

            at_once = 2 * cfg.launch.micro_batch_size  # as many replies as a training step of pairs has
            columns = reference.compute(
                rows, use, cfg.seed, tokenizer.pad_token_id, at_once, logps, accelerator
            )
            if accelerator.is_main_process:
                reference.write(out, use, part, columns)
            replies = sum(map(len, columns["logps"]))
            say(f"{use}, {part}: {replies:,} replies of {len(rows):,} rows")
            metrics[f"{use}_{part}_replies"] = float(replies)
    accelerator.wait_for_everyone()
    return metrics | training.peak_gpu_memory()
