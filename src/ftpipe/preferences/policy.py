"""The policy that is trained on preferences, and what stays of it as it came in: the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from ftpipe import modeling, policy
from ftpipe.choices import Method
from ftpipe.errors import ConfigError
from ftpipe.policy import POLICY, REFERENCE, Incoming

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftpipe.config import RunConfig


@dataclass(frozen=True)
class Trained:
    """A policy to be trained, with what is kept frozen beside it.

    Attributes:
        model: a whole model, or one with an adapter ``default``, which is trained. Where the policy came
            in as an adapter there is a frozen second one, ``reference``, with the same weights; else the
            reference is the model without its adapter.
        frozen: a copy of the policy as it came in, where all its weights are trained.
    """

    model: PreTrainedModel
    frozen: PreTrainedModel | None = None


def load(cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase, copy: bool) -> Trained:
    """Return the policy that comes in, ready to be trained against itself.

    Nothing is drawn but one factor of a fresh adapter, which changes nothing until the other moves.
    Dropout is off, so that the policy is its reference at the first step.

    Args:
        copy: whether a frozen copy is kept where all weights are trained.

    Raises:
        ModelError: if the weights cannot be loaded.
        ConfigError: if the policy is an adapter and all weights are to be trained, or ``dpo.r`` or
            ``dpo.alpha`` is set for an adapter that is there already.
    """
    fresh_adapter = start.adapter is None and cfg.adapter.method is not Method.full
    for key in ("r", "alpha"):
        if getattr(cfg.dpo, key) is not None and not fresh_adapter:
            what = "no adapter" if cfg.adapter.method is Method.full else "the adapter that comes in"
            raise ConfigError(
                f"dpo.{key} is of a fresh adapter, but {what} is trained here; leave it null, or put "
                "'merge' before 'dpo'."
            )
    base, fresh = _headed(cfg, start, tokenizer)
    policy.check_method(cfg, start)
    if cfg.adapter.method is Method.full:
        frozen = _headed(cfg, start, tokenizer)[0].requires_grad_(False).eval() if copy else None
        return Trained(base, frozen)
    if start.adapter is not None:
        model = policy.continued(base, start.adapter)
    else:
        adapter = replace(
            cfg.adapter, r=cfg.dpo.r or cfg.adapter.r, alpha=cfg.dpo.alpha or cfg.adapter.alpha
        )
        model = policy.with_fresh_adapter(base, adapter, start, fresh)
    for name, weight in model.named_parameters():
        if weight.requires_grad or f".{REFERENCE}" in name:
            weight.data = weight.data.to(modeling.TORCH[cfg.adapter.dtype])
    modeling.no_dropout(model)
    if cfg.dpo.gradient_checkpointing:
        model.enable_input_require_grads()
    whole = cast("PreTrainedModel", model)
    if fresh:
        modeling.keep_to_rows(whole)
    # the reference is an artifact already; saved beside the policy it would be loaded with it
    whole.save_pretrained = partial(whole.save_pretrained, selected_adapters=[POLICY])  # type: ignore[method-assign]
    return Trained(whole)


def as_it_came(cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the policy that comes in, frozen: the reference by itself.

    Raises:
        ModelError: if the weights cannot be loaded.
    """
    model, fresh = _headed(cfg, start, tokenizer)
    if start.adapter is not None:
        model = cast("PreTrainedModel", policy.adapted(model, start.adapter, trainable=False))
        for name, weight in model.named_parameters():
            if f".{POLICY}" in name:
                weight.data = weight.data.to(modeling.TORCH[cfg.adapter.dtype])
    modeling.no_dropout(model)
    if fresh and start.adapter is not None:
        modeling.keep_to_rows(model)
    return model.requires_grad_(False)


def _headed(
    cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Sequence[int]]:
    """Return the whole weights with TRL's fused head, which never builds all logits of a row."""
    from trl.trainer.utils import add_fused_lm_head

    model, fresh = policy.load(cfg, start, tokenizer)
    modeling.no_dropout(model)
    add_fused_lm_head(model)
    return model, fresh
