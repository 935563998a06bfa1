"""Answers drawn from a policy, each by random numbers of its own.

A token is where a uniform number falls in the cumulative distribution. The numbers of an answer depend
on the seed, the rollout and the answer's place in it, and on nothing else: not on the answers beside it,
the number of ranks, or how often a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ftpipe.ppo.layout import Answer
from ftpipe.sequences import dealt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftpipe.ppo_config import PpoConfig

# What random numbers are for: the last part of their key, so that no two streams are one. It is not 0,
# which numpy takes for no part at all.
ANSWERS, SHUFFLED, HELD_OUT = 1, 2, 3
GRAIN = 2.0**-40  # numbers are multiples of it: times a sum of probabilities they stay below the sum


def uniforms(key: Sequence[int], count: int) -> Tensor:
    """Return numbers in [0, 1), float64, that the key alone decides.

    Args:
        key: the seed, two numbers, and what they are for.
    """
    drawn = np.random.default_rng(list(key)).random(count)
    return torch.from_numpy(np.floor(drawn / GRAIN) * GRAIN)


class Draw(LogitsProcessor):
    """Leaves one token of each row: the one that the row's next number falls on.

    Args:
        uniforms_BT: a number for each token that may be drawn.
        start: tokens before the first one drawn.
    """

    def __init__(self, uniforms_BT: Tensor, start: int) -> None:
        self._uniforms_BT = uniforms_BT
        self._start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        u_B1 = self._uniforms_BT[:, input_ids.shape[1] - self._start, None]
        cumulated_BV = scores.double().softmax(-1).cumsum(-1)
        # the first token beyond the number: one of probability 0 is never that
        drawn_B1 = torch.searchsorted(cumulated_BV, u_B1 * cumulated_BV[:, -1:], right=True)
        # where scores are not finite there is none; any one will do, and the rollout shows why
        drawn_B1 = drawn_B1.clamp(max=scores.shape[1] - 1)
        only_BV = torch.full_like(scores, -torch.inf)
        return cast("torch.FloatTensor", only_BV.scatter_(1, drawn_B1, 0.0))


def answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    ppo: PpoConfig,
    stops: Collection[int],
    pad: int,
    passes: int = 0,
) -> list[Answer]:
    """Return an answer to each prompt, in their order.

    Prompts of similar length are answered together; a batch ends when all of its answers have.

    Args:
        keys: of the random numbers of each answer, see ``uniforms``.
        stops: ids of tokens that end an answer.
        passes: how many batches the busiest rank has, where all are to make as many.
    """
    size = ppo.generation_batch_size or max(len(prompts), 1)
    for _ in range(passes - rounds(len(prompts), ppo)):
        _generate(model, [[pad]], torch.zeros((1, ppo.max_new_tokens)), ppo, stops, pad)
    found: dict[int, Answer] = {}
    for chosen in dealt([len(prompt) for prompt in prompts], 0, 1, size):
        numbers_BT = torch.stack([uniforms(keys[at], ppo.max_new_tokens) for at in chosen])
        drawn = _generate(model, [prompts[at] for at in chosen], numbers_BT, ppo, stops, pad)
        for at, tokens in zip(chosen, drawn, strict=True):
            cut = until_stop(tokens, stops)
            found[at] = Answer(tuple(prompts[at]), tuple(cut), cut[-1] in stops)
    return [found[at] for at in range(len(prompts))]


def rounds(count: int, ppo: PpoConfig) -> int:
    """Return in how many batches so many prompts are answered."""
    return math.ceil(count / (ppo.generation_batch_size or max(count, 1)))


def until_stop(tokens: Sequence[int], stops: Collection[int]) -> Sequence[int]:
    """Return tokens up to the first stop token, with it."""
    ends = (at for at, token in enumerate(tokens, start=1) if token in stops)
    return tokens[: next(ends, len(tokens))]


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    numbers_BT: Tensor,
    ppo: PpoConfig,
    stops: Collection[int],
    pad: int,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids_BP = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts])
    attended_BP = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    processors: list[LogitsProcessor] = [Draw(numbers_BT.to(model.device), longest)]
    if ppo.top_p < 1:
        processors.insert(0, TopPLogitsWarper(ppo.top_p))
    if ppo.temperature != 1:
        processors.insert(0, TemperatureLogitsWarper(ppo.temperature))
    settings = GenerationConfig(
        max_new_tokens=ppo.max_new_tokens,
        do_sample=False,  # Draw leaves one token to take
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stops),
    )
    own = model.generation_config  # penalties and bans in it would draw from another policy
    model.generation_config = GenerationConfig()
    try:
        output_BL = model.generate(  # type: ignore[operator]
            input_ids=ids_BP.to(model.device),
            attention_mask=attended_BP.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        model.generation_config = own
    answers_BT: list[list[int]] = output_BL[:, longest:].tolist()
    return answers_BT
