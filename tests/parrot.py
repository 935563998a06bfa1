"""A real model that says what a test wants: each token follows from the one before it alone.

It is a Llama whose layers add nothing: a token's embedding is a unit vector of its own, and the output
head points from each to the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ftpipe.tokenizer import byte_level

WIDTH = 264  # of a unit vector for each of the 258 tokens, and of four heads
CONFIDENCE = 8.0  # logit of the token that follows; that of the others is 0
ANSWER = "Blué, k!"  # no byte twice, and one character of two bytes
CHATTER = {"\n": ANSWER}  # a prompt of its chat template ends with a newline


def model(answers: Mapping[str, str] = CHATTER, positions: int = 4096) -> LlamaForCausalLM:
    """Return a model that says ``answers[last]`` and eos after a prompt that ends with ``last``.

    After any other character it says the same one on and on.
    """
    tokenizer = byte_level()
    assert tokenizer.eos_token_id is not None
    follows = {at: at for at in range(len(tokenizer))}
    for last, answer in answers.items():
        chain = [*ids(tokenizer, last + answer), int(tokenizer.eos_token_id)]
        assert len(set(chain)) == len(chain), "a byte comes twice"
        follows.update(itertools.pairwise(chain))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made = LlamaForCausalLM(config)
    made.eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), WIDTH))
        made.lm_head.weight.zero_()
        for token, after in follows.items():
            # the last norm makes a unit vector one of mean square 1
            made.lm_head.weight[after, token] = CONFIDENCE / math.sqrt(WIDTH)
    return made


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def write(folder: Path, positions: int = 4096) -> Path:
    """Write the model and its tokenizer as a plain folder."""
    model(positions=positions).save_pretrained(str(folder))
    byte_level().save_pretrained(str(folder))
    return folder
