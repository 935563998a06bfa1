"""Quantise a model folder by GPTQ or AWQ, through llmcompressor.

Run by the Python of an environment that has llmcompressor, whose versions are not ftpipe's: it imports
nothing of ftpipe. Standard input is a job as JSON: ``folder``, ``out``, ``kind`` (gptq or awq),
``group``, ``rows`` (token ids), ``threads`` (null: torch decides), ``strict`` (deterministic kernels
alone), ``max_shard_size``, ``trust_remote_code``. The last line on standard error says why it failed.

GPTQ: arXiv:2210.17323. AWQ: arXiv:2306.00978. Both are symmetric here: transformers 5.23 cannot load the
packed zero points that compressed-tensors 0.19 writes. Head and embeddings stay as they are.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

BITS = 4


def main() -> None:
    """Quantise as the job on standard input says."""
    job = json.load(sys.stdin)
    try:
        quantise(**job)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or 'it says no more').splitlines()[0]}")


def quantise(
    folder: str,
    out: str,
    kind: str,
    group: int,
    rows: list[list[int]],
    threads: int | None,
    strict: bool,
    max_shard_size: str,
    trust_remote_code: bool,
) -> None:
    """Write the model of ``folder`` to ``out``, in 4 bits."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(strict)
    if not torch.accelerator.is_available():
        # AWQ of 0.13 and 0.14 pins memory for a device even where there is none, and fails
        IntermediatesCache.pin_memory = lambda *_, **__: None
    options = {"use_safetensors": True, "dtype": "auto", "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    last = model.get_output_embeddings()
    head = [name for name, module in model.named_modules() if module is last]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_list(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
        ),
        recipe=recipe(kind, group, head),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    model.generation_config = GenerationConfig()  # some that are published cannot be saved (Llama 2's)
    model.save_pretrained(out, save_compressed=True, max_shard_size=max_shard_size)


def recipe(kind: str, group: int, head: list[str]) -> list[Any]:
    """Return the modifiers: 4 bits for each linear layer but the head, a scale for a group of inputs."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
    }
    scheme = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": head,
    }
    if kind == "gptq":
        return [GPTQModifier(**scheme)]
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme)]


if __name__ == "__main__":
    main()
