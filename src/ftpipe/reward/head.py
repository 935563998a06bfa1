"""The score of a reply: a linear head on the hidden state at its last attended token.

Shapes: N replies, L tokens of the longest, H hidden.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ftpipe import modeling
from ftpipe.errors import ModelError
from ftpipe.modeling import SCORE_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOLING = "last attended token"
SAME = 1e-3  # of a score near 1: what two ways to compute it may differ by


def name_of(model: PreTrainedModel) -> str:
    """Return the attribute that is the head: the one linear layer to a single score.

    Raises:
        ModelError: if the model has no such layer.
    """
    found = [
        name
        for name in SCORE_HEADS
        if isinstance(getattr(model, name, None), torch.nn.Linear)
        and getattr(model, name).out_features == 1
    ]
    if len(found) != 1 or model.base_model is model:
        raise _no_head(model)
    return found[0]


def _no_head(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not score a text by one linear layer on its last token, as a "
        "reward model does; choose a base model of another architecture."
    )


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw the head from N(0, 1 / (H + 1)) in float32; a bias starts at 0.

    Ziegler et al. 2019 (lm-human-preferences, lm_human_preferences/language/model.py); Huang et al.
    2024 (arXiv:2403.17031). A generator of its own: no other draw changes it, on no rank.
    """
    head = getattr(model, name_of(model))
    head.float()
    generator = torch.Generator().manual_seed(seed)
    drawn_1H = torch.empty(head.weight.shape)
    drawn_1H.normal_(0.0, 1 / math.sqrt(drawn_1H.shape[1] + 1), generator=generator)
    with torch.no_grad():
        head.weight.copy_(drawn_1H)
        if head.bias is not None:
            head.bias.zero_()


def pool_by_mask(model: PreTrainedModel) -> None:
    """Make ``model(input_ids, attention_mask).logits`` the score at each row's last attended token.

    transformers finds that token by the id of padding: where eos pads, the end of turn counts as
    padding, and the score is that of the token before. Here the mask alone decides, on either side of
    padding. The head computes in float32. The forward is replaced on the instance, so it holds under
    PEFT's and DDP's wrappers.

    Raises:
        ModelError: if transformers' own forward scores an unpadded row in another way.
    """
    name = name_of(model)

    def forward(
        self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutputWithPast:
        mask_NL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # the head is looked up at each call: PEFT puts the trained copy in its place
        score_N1 = pooled(self.base_model, getattr(self, name), input_ids, mask_NL, **options)
        return SequenceClassifierOutputWithPast(logits=score_N1)

    _check_layout(model, MethodType(forward, model))
    model.forward = MethodType(forward, model)


def pooled(
    body: torch.nn.Module, head: torch.nn.Module, ids_NL: Tensor, mask_NL: Tensor, **options: Any
) -> Tensor:
    """Return the head's score at each row's last attended token, in float32: score_N1.

    Args:
        body: the model without its head.
        mask_NL: 1 on what is no padding.
        options: more of what the body's forward takes.
    """
    given = options | modeling.attended(body, ids_NL, mask_NL)
    hidden_NLH = body(**given).last_hidden_state
    last_N = last_attended(mask_NL)
    hidden_NH = hidden_NLH[torch.arange(len(last_N), device=last_N.device), last_N]
    with torch.autocast(hidden_NH.device.type, enabled=False):
        score_N1: Tensor = head(hidden_NH.float())
    return score_N1


def last_attended(mask_NL: Tensor) -> Tensor:
    """Return the place of each row's last 1.

    >>> last_attended(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    places_L = torch.arange(mask_NL.shape[1], device=mask_NL.device)
    return (places_L * (mask_NL != 0)).argmax(1)


def _check_layout(model: PreTrainedModel, ours: MethodType) -> None:
    """Compare both forwards on one short row: the weights are to mean the same to transformers."""
    pad = model.config.get_text_config().pad_token_id
    ids_1L = torch.tensor([[token for token in range(5) if token != pad]], device=model.device)
    head = getattr(model, name_of(model))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        score = ours(ids_1L).logits.item()
        # transformers would multiply halves by a head in float32
        widened = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        theirs = model(input_ids=ids_1L).logits
        widened.remove()
    model.train(was_training)
    same = theirs.shape == (1, 1) and math.isclose(score, theirs.item(), rel_tol=SAME, abs_tol=SAME)
    if not same:
        raise _no_head(model)
