"""Small models of two architectures, and MMLU in hendrycks' layout, for the tests of the benchmarks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ftpipe.tokenizer import byte_level

# subject -> split -> rows of question, four options, the right letter
TABLES: dict[str, dict[str, list[list[str]]]] = {
    "anatomy": {
        "dev": [
            ["Which bone is in the arm?", "Femur", "Ulna", "Tibia", "Skull", "B"],
            ["Which organ pumps blood?", "Heart", "Lung", "Liver", "Skin", "A"],
        ],
        "test": [
            ["Which bone is\nthe longest?", "Femur", "Tibia", "Rib, any", "Skull", "A"],
            ["How many ribs has a man?", "4", "12", "24", "48", "C"],
            ["Where is the cornea?", "Ear", "Hand", "Foot", "Eye", "D"],
        ],
    },
    "us_foreign_policy": {
        "dev": [
            ["Who signs a treaty?", "A", "The president", "Nobody", "All", "B"],
            ['What was the "Long Telegram"?', "A cable", "A song", "A ship", "A law", "A"],
        ],
        "test": [
            ["Which doctrine is of 1823?", "Truman's", "Monroe's", "Nixon's", "None", "B"],
            ["Who was Kennan?", "A diplomat", "A king", "A pope", "A poet", "A"],
        ],
    },
}


def write_tables(folder: Path, tables: dict[str, dict[str, list[list[str]]]] = TABLES) -> Path:
    for subject, splits in tables.items():
        for split, rows in splits.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


def tiny(kind: str, length: int = 512, tied: bool = False) -> Any:
    """Return a random model of bytes; with the usual small weights its answers hardly differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": length,
            "tie_word_embeddings": tied,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": length},
    }
    tokenizer = byte_level()
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        initializer_range=0.6,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **sizes[kind],
    )
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model: Any) -> Any:
    """Return the model with a LoRA adapter whose update is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()


def plain_logp(model: Any, prompt: list[int], continuation: list[int]) -> float:
    """Return log p of a continuation, a token at a time, each from a row of its own: no padding."""
    import torch

    total = 0.0
    for at, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation[:at]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[token])
    return total
