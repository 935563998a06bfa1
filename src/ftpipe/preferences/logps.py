"""Log-probabilities of replies, under the policy and under the reference it must stay close to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftpipe.policy import POLICY, REFERENCE

if TYPE_CHECKING:
    from peft import PeftModel

# What gives the reference's log-probs of a batch of replies, nats (N,).
Reference = Callable[[Mapping[str, Tensor]], Tensor]


def reply_logps(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return log p(reply | prompt) of each row in nats, summed over the reply's tokens: logps_N.

    The model has TRL's fused head, which never builds all logits of a row.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (N, L); a label is a token of the reply,
            or -100.
    """
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
        fused_lm_head=True,
    )
    logps_N: Tensor = output.log_probs.sum(1)
    return logps_N


@contextmanager
def as_reference(policy: PeftModel) -> Iterator[None]:
    """Let a policy act as its reference: its frozen second adapter, or no adapter if it has none.

    No gradient is taken inside. PEFT's ``set_adapter`` makes the adapter that it activates trainable
    unless told otherwise: the reference would follow the policy from then on.
    """
    if REFERENCE not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    policy.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        policy.set_adapter(POLICY)


def adapter_reference(
    policy: PeftModel, autocast: Callable[[], AbstractContextManager[Any]]
) -> Reference:
    """Return what computes the reference's log-probs on the policy's own base."""

    def logps(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), as_reference(policy), autocast():
            return reply_logps(policy, batch)

    return logps


def model_reference(
    frozen: torch.nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
) -> Reference:
    """Return what computes the reference's log-probs with a frozen copy of the policy."""

    def logps(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), autocast():
            return reply_logps(frozen, batch)

    return logps
