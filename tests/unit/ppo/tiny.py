"""Tiny models of real architectures, and answers to try them on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from ftpipe.ppo.layout import Answer
from ftpipe.ppo.roles import Role, Roles

WORDS = 13
PAD = STOP = 3  # one token for both, as most tokenizers have it
# rotary positions, rotary ones of another layout, learned absolute ones, none that forward takes
KINDS = ("llama", "gpt_neox", "gpt2", "bloom")


def model(kind: str = "llama", seed: int = 0, words: int = WORDS) -> PreTrainedModel:
    torch.manual_seed(seed)
    made: PreTrainedModel
    if kind == "gpt_neox":
        made = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=words,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                initializer_range=0.2,
            )
        )
    elif kind == "gpt2":
        # no end of its own: ids of the default lie outside the vocabulary
        made = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=words,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    elif kind == "bloom":
        made = BloomForCausalLM(
            BloomConfig(vocab_size=words, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
        )
    else:
        made = LlamaForCausalLM(llama_config(words))
    made.train(False)
    return made


def llama_config(words: int = WORDS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


def roles(seed: int = 0) -> Roles:
    """Return three models of their own, as where all weights are trained, and no reward model."""
    policy, reference = model(seed=seed), model(seed=seed + 1).requires_grad_(False)
    torch.manual_seed(seed + 2)
    config = llama_config()
    config.pad_token_id = PAD
    value = LlamaForSequenceClassification(config).eval()
    del value.score
    head = torch.nn.Linear(32, 1)
    return Roles(None, {Role.policy: policy, Role.reference: reference, Role.value: value}, head, None)


def answers(seed: int, *sizes: tuple[int, int]) -> list[Answer]:
    """Return answers of so many tokens of prompt and answer each; every other one has its end.

    The token that also pads stands in prompts too.
    """
    generator = np.random.default_rng(seed)
    made = []
    for number, (before, after) in enumerate(sizes):
        prompt = [*generator.integers(WORDS, size=before - 1).tolist(), PAD]
        tokens = generator.integers(PAD + 1, WORDS, size=after).tolist()
        if ended := number % 2 == 0:
            tokens[-1] = STOP
        made.append(Answer(tuple(prompt[::-1]), tuple(tokens), ended))
    return made


def plain_logits(model: torch.nn.Module, answer: Answer) -> Tensor:
    """Return what an answer's tokens are drawn from: one row, no padding, no mask: logits_TV."""
    ids_1L = torch.tensor([[*answer.prompt, *answer.tokens]])
    logits_LV: Tensor = model(input_ids=ids_1L).logits[0]
    return logits_LV[len(answer.prompt) - 1 : -1]


def plain_values(body: torch.nn.Module, head: torch.nn.Linear, answer: Answer) -> Tensor:
    """Return the value before each token of an answer, in the same way: values_T."""
    ids_1L = torch.tensor([[*answer.prompt, *answer.tokens]])
    hidden_LH = body(input_ids=ids_1L).last_hidden_state[0]
    at = range(len(answer.prompt) - 1, ids_1L.shape[1] - 1)
    return torch.stack([hidden_LH[t] @ head.weight[0] + head.bias[0] for t in at])
