"""Prompts and answers as tensors, and what a model says of the answers' tokens.

Shapes: B answers, P tokens of the longest prompt, T of the longest answer, L = P + T, V words of the
vocabulary. Prompts are padded on the left and answers on the right, so that all answers begin in one
column; positions count what is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftpipe.modeling import attended, logits_at
from ftpipe.ppo.losses import entropies


@dataclass(frozen=True)
class Answer:
    """A prompt and what the policy drew for it, as token ids.

    Attributes:
        tokens: the answer, its stop token included where it has one.
        ended: whether it ends in a stop token; else it was cut at the greatest length.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Batch:
    """Answers laid out for a forward pass."""

    ids_BL: Tensor
    attended_BL: Tensor  # 1 on what is no padding
    mask_BT: Tensor  # True on the tokens of the answers
    longest: int  # T

    @property
    def answers_BT(self) -> Tensor:
        return self.ids_BL[:, -self.longest :]


def lay(answers: Sequence[Answer], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Return answers as tensors; ``pad`` may be a learned token: masks tell padding apart."""
    before = max(len(one.prompt) for one in answers)
    after = max(len(one.tokens) for one in answers)
    ids_BL = torch.full((len(answers), before + after), pad)
    attended_BL = torch.zeros_like(ids_BL)
    for b, one in enumerate(answers):
        here = slice(before - len(one.prompt), before + len(one.tokens))
        ids_BL[b, here] = torch.tensor([*one.prompt, *one.tokens])
        attended_BL[b, here] = 1
    mask_BT = attended_BL[:, before:].bool()
    return Batch(ids_BL.to(device), attended_BL.to(device), mask_BT.to(device), after)


def answer_logits(model: torch.nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Return the logits that the answers' tokens were drawn from, over the temperature: logits_BTV.

    Log-probs are those of the temperature of sampling, else the ratio of PPO's first minibatch would not
    be that of the policy that sampled (Huang et al., "The N Implementation Details of RLHF with PPO").
    What top-p leaves out is left in, as in the code they describe.

    Args:
        model: a causal language model.
    """
    last = batch.ids_BL.shape[1] - 1
    logits_BTV = logits_at(model, batch.ids_BL, batch.attended_BL, last - batch.longest, last)
    return logits_BTV if temperature == 1 else logits_BTV / temperature


def chosen_logps(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Return the log-prob of each token of the answers in nats: logps_BT, 0 outside the mask."""
    picked_BT = logits_BTV.gather(-1, batch.answers_BT[..., None])[..., 0]
    return torch.where(batch.mask_BT, picked_BT - logits_BTV.logsumexp(-1), 0.0)


def measured_entropies(logits_BTV: Tensor) -> Tensor:
    """Return the entropy of each token's distribution in nats, without gradient: entropies_BT.

    Row by row: of all rows at once the vocabulary would be copied several times.
    """
    with torch.no_grad():
        return torch.stack([entropies(logits_TV) for logits_TV in logits_BTV])


def state_values(body: torch.nn.Module, head: torch.nn.Module, batch: Batch) -> Tensor:
    """Return V before each token of the answers, values_BT in units of the score, 0 outside the mask.

    Args:
        body: the model without its output head.
        head: from hidden states to one number, in float32.
    """
    hidden_BLH = body(**attended(body, batch.ids_BL, batch.attended_BL)).last_hidden_state
    hidden_BTH = hidden_BLH[:, -batch.longest - 1 : -1]
    with torch.autocast(hidden_BTH.device.type, enabled=False):
        values_BT = head(hidden_BTH.float())[..., 0]
    return torch.where(batch.mask_BT, values_BT, 0.0)


def padded(rows: Sequence[Tensor], longest: int) -> Tensor:
    """Return rows of several lengths as one tensor (B, longest), zero behind their ends."""
    whole = torch.zeros((len(rows), longest), dtype=rows[0].dtype)
    for b, row in enumerate(rows):
        whole[b, : len(row)] = row
    return whole
