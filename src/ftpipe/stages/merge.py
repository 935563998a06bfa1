"""Writes a policy's adapter into the weights of its base: an ordinary model folder.

The sum W + (alpha / r) B A is taken in float32 and rounded once, to the format that the base is stored
in. Of QLoRA's base, W is what its 4 bits stand for, since the adapter was trained on that; merged into
the weights before quantisation it would not be the policy that was trained. A stage that goes on from
the sum by QLoRA rounds it to 4 bits once more, and starts from that: how far away that is gets measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer

from ftpipe import modeling, policy
from ftpipe.artifacts import Artifact
from ftpipe.choices import Dtype, Method
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.logs import say
from ftpipe.policy import Incoming

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBES, PROBE_TOKENS = 4, 32  # sequences on which the policy is compared before and after


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read the adapter ``inputs["policy"]``, write the merged policy and its tokenizer to ``out``.

    Returns:
        how far merging moved the log-probs of single tokens, in nats: ``apart_mean``, ``apart_max``;
        under QLoRA also ``apart_in_four_bits``, the mean once the sum is rounded to 4 bits again.

    Raises:
        ConfigError: if the policy is a whole model already.
        ModelError: if its base cannot be loaded.
    """
    start = policy.incoming(cfg, inputs)
    if start.adapter is None:
        raise ConfigError(
            "stages: the policy before 'merge' is a whole model already; leave 'merge' out."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(start.adapter))
    adapted = _adapted(cfg, start, tokenizer)
    probe = torch.randint(
        len(tokenizer), (PROBES, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    before = _logps(cast("PreTrainedModel", adapted), probe)
    merged: PreTrainedModel = adapted.merge_and_unload()
    dtype = modeling.stored_dtype(cfg, start.weights, start.revision)
    torch.nn.Module.to(merged, dtype)
    apart = (_logps(merged, probe) - before).abs()
    merged.config.use_cache = True
    merged.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    say(f"merged in {str(dtype).removeprefix('torch.')}; log-probs moved by {apart.mean():.1e} nats")
    moved = {"apart_mean": float(apart.mean()), "apart_max": float(apart.max())}
    if cfg.adapter.method is Method.qlora:
        again = (_in_four_bits(cfg, out, probe) - before).abs().mean()
        say(f"rounded to 4 bits again, as QLoRA goes on from it, they move by {again:.1e} nats")
        moved["apart_in_four_bits"] = float(again)
    return moved


def _adapted(cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Return the policy with its base in float32, on the processor."""
    from peft import PeftModel

    if cfg.adapter.method is Method.qlora:  # quantised from what training quantised, and no finer
        base = policy.load(cfg, start, tokenizer)[0].dequantize(dtype=torch.float32)
        torch.nn.Module.to(base, torch.float32)  # what was never in 4 bits
    else:
        exact = replace(cfg, model=replace(cfg.model, dtype=Dtype.float32))
        base, _ = policy.load(exact, start, tokenizer)
    adapted: PeftModel = PeftModel.from_pretrained(base, str(start.adapter)).eval().to("cpu")
    return adapted


def _in_four_bits(cfg: RunConfig, folder: Path, probe: Tensor) -> Tensor:
    """Return the log-probs of the merged policy as whoever trains it by QLoRA loads it."""
    model = modeling.load(cfg, str(folder))
    return _logps(model.eval(), probe.to(model.device)).cpu()


def _logps(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_BL).logits.float()
    return logits.log_softmax(-1)
