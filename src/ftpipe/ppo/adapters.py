"""Adapters side by side on one base: added from their folders, told apart, frozen or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ftpipe import policy
from ftpipe.errors import ModelError
from ftpipe.modeling import SCORE_HEADS
from ftpipe.policy import ADAPTER_WEIGHTS, POLICY, Incoming
from ftpipe.reward import model as reward_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ftpipe.config import RunConfig

# A reward adapter's head, under PEFT's names: `base_model.model.score.weight`.
HEADS = tuple(f"base_model.model.{name}." for name in SCORE_HEADS)


@dataclass(frozen=True)
class Member:
    """A reward model that is an adapter: where it lies, its head, and what normalises its scores."""

    folder: Path
    head: torch.nn.Linear
    normalization: reward_model.Normalization


def reward_members(
    cfg: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, start: Incoming
) -> list[Member]:
    """Return the members of a reward model that fit on the policy's base, or none if they do not.

    They fit if they are adapters on the same weights, held as this run holds them.

    Raises:
        ModelError: if the reward model cannot be read, or has another vocabulary.
    """
    stated, held = reward_model.stated(folder, tokenizer)
    if held != reward_model.Held.by(cfg):
        return []
    found = []
    for name, normalization in stated.items():
        came = policy.found(folder / name)
        same = _place(came.weights) == _place(start.weights) and came.revision == start.revision
        if came.adapter is None or not same:
            return []
        found.append(Member(came.adapter, _head(came.adapter), normalization))
    return found


def _place(weights: str) -> str:
    return str(Path(weights).resolve()) if Path(weights).exists() else weights


def _head(folder: Path) -> torch.nn.Linear:
    state = {
        name.rsplit(".", 1)[1]: weight
        for name, weight in load_file(folder / ADAPTER_WEIGHTS).items()
        if name.startswith(HEADS)
    }
    if "weight" not in state:
        raise ModelError(f"{folder} has no score; delete the folder to build it again.")
    head = torch.nn.Linear(state["weight"].shape[1], 1, bias="bias" in state)
    head.load_state_dict({name: weight.float() for name, weight in state.items()})
    return head.requires_grad_(False)


class SharedBase:
    """A base with adapters, one of which computes at a time, and those that are trained.

    Args:
        model: with the policy's adapter, and the reference's if it is one.
        trained: names of the adapters that have gradients.
    """

    def __init__(self, model: PeftModel, trained: tuple[str, ...]) -> None:
        self.model = model
        self._trained = trained

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Compute with one adapter, or with none if there is none of that name; then the policy's again.

        What is trained keeps its gradient flags, whatever is active.
        """
        if name not in self.model.peft_config:
            try:
                with self.model.disable_adapter():
                    yield
            finally:
                self.flag()
            return
        self.model.set_adapter(name)
        self.flag()
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)
            self.flag()

    def flag(self) -> None:
        """Let what is trained have gradients, and nothing else: PEFT's switches change that."""
        for weight, trained in self._flags:
            weight.requires_grad_(trained)

    @cached_property
    def _flags(self) -> list[tuple[torch.nn.Parameter, bool]]:
        wanted = {id(weight) for name in self._trained for weight in self.weights(name).values()}
        weights = self.model.parameters()
        return [(weight, id(weight) in wanted) for weight in weights if weight.is_floating_point()]

    def weights(self, name: str) -> dict[str, torch.nn.Parameter]:
        """Return the weights of one adapter, by their names in the model."""
        return {
            full: weight
            for full, weight in self.model.named_parameters()
            if f".{name}." in f"{full}." and ("lora_" in full or "token_adapter" in full)
        }

    def add(self, folder: Path, name: str) -> None:
        """Put an adapter from its folder beside the others; a score in it is left out.

        Raises:
            ModelError: if a weight of it finds no place, or one is missing.
        """
        config = LoraConfig.from_pretrained(str(folder))
        assert isinstance(config, LoraConfig)
        config.task_type, config.modules_to_save, config.lora_dropout = "CAUSAL_LM", None, 0.0
        config.inference_mode = False
        known = {module for module, _ in self.model.get_base_model().named_modules()}
        rows: Any = config.trainable_token_indices or {}
        for module in rows:
            if module not in known:
                raise ModelError(f"the adapter {folder} has rows of {module}, which this base lacks.")
        # where one adapter has rows PEFT asks all for theirs; under a score the output head has none
        came: Any = self.model.peft_config[POLICY]
        others: dict[str, list[int]] = came.trainable_token_indices or {}
        config.trainable_token_indices = {**others, **rows} or None
        self.model.add_adapter(name, config)
        state = {
            key: weight
            for key, weight in load_file(folder / ADAPTER_WEIGHTS).items()
            if not key.startswith(HEADS)
        }
        untrained = tuple(f"base_model.model.{module}." for module in others if module not in rows)
        state |= {key: weight for key, weight in self._state(name).items() if key.startswith(untrained)}
        told: Any = set_peft_model_state_dict(self.model, state, adapter_name=name)
        if wrong := sorted({*told.unexpected_keys, *(set(self._state(name)) ^ set(state))}):
            raise ModelError(
                f"the adapter {folder} does not fit {type(self.model.get_base_model()).__name__}: "
                f"{wrong[0]}; delete the folder to build it again."
            )

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        return found
