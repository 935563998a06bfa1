"""The policies that are measured: the base, and what each stage before made of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from ftpipe import modeling, policy
from ftpipe import tokenizer as tokenizers
from ftpipe.artifacts import Artifact
from ftpipe.choices import Precision
from ftpipe.config import RunConfig
from ftpipe.evaluate_config import BASE
from ftpipe.policy import Incoming
from ftpipe.preferences.policy import as_it_came

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLACE = "policy/"  # of a stage's input: policy/sft


@dataclass(frozen=True)
class Policy:
    """A policy to be measured.

    Attributes:
        name: the stage that made it, or ``base``.
        before: the name of the one that it came from, of those that are measured; None: there is none.
        positions: that it knows; None: as many as one likes.
    """

    name: str
    start: Incoming
    before: str | None
    positions: int | None


def found(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> list[Policy]:
    """Return the base and the policies among a stage's inputs, in the order of the run's stages.

    Raises:
        ModelError: if the base's configuration cannot be read.
    """
    made = {name: inputs[PLACE + name] for name in cfg.stages if PLACE + name in inputs}
    wanted = cfg.evaluate.policies
    starts = {BASE: _base(cfg, inputs)} if not wanted or BASE in wanted else {}
    starts |= {name: policy.found(artifact.path) for name, artifact in made.items()}
    return [
        Policy(name, start, _before(name, made, starts), _positions(cfg, start))
        for name, start in starts.items()
    ]


def _base(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> Incoming:
    """Return the base as a training starts from it, with rows for the new tokens of its data."""
    if "dataset" in inputs:
        return policy.incoming(cfg, {kind: one for kind, one in inputs.items() if kind != "policy"})
    return policy.base(cfg, inputs)


def _before(name: str, made: Mapping[str, Artifact], starts: Mapping[str, Incoming]) -> str | None:
    """Return the nearest measured policy that one came from.

    One that is not measured is none of the stage's inputs, so what lies behind it is not known here;
    then it is the one measured before.
    """
    if name == BASE:
        return None
    came = made[name].manifest["inputs"].get("policy")
    by_folder = {artifact.path.name: other for other, artifact in made.items()}
    if came in by_folder:
        return by_folder[came]
    if came is None:
        return BASE if BASE in starts else None
    names = list(starts)
    return names[names.index(name) - 1] if names.index(name) else None


def _positions(cfg: RunConfig, start: Incoming) -> int | None:
    config = modeling.text_config(start.weights, start.revision, cfg.model.trust_remote_code)
    return modeling.positions(config)


def tokenizer(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the run's data, or of its model where it prepared none."""
    if "dataset" in inputs:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(inputs["dataset"].path / "tokenizer")
        )
        return loaded
    base = inputs.get("base_model")
    return tokenizers.load(cfg.model, base.path if base else None)


class Loaded:
    """A policy's model, loaded when it is first asked for, frozen, on the run's device.

    It is held as the run trains it: its dtype, and 4 bits where ``adapter.method=qlora``. Penalties and
    bans that its ``generation_config`` may ask for are left out: what is measured is the policy alone.
    """

    def __init__(self, cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase) -> None:
        self._cfg = cfg
        self._start = start
        self._tokenizer = tokenizer
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Return the model.

        Raises:
            ModelError: if it cannot be loaded.
        """
        if self._model is None:
            model = as_it_came(self._cfg, self._start, self._tokenizer)
            model = model.to(modeling.device(self._cfg)).eval()  # type: ignore[arg-type]
            ends = model.generation_config.eos_token_id
            model.generation_config = GenerationConfig(eos_token_id=ends)
            self._model = model
        return self._model

    def release(self) -> None:
        """Let go of the memory."""
        self._model = None
        gc.collect()  # the patched forward refers to its own model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def autocast(cfg: RunConfig) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the precision that the run trains in."""
    precision, kind = cfg.launch.precision, modeling.device(cfg).type
    whole = precision is Precision.fp32
    return lambda: torch.autocast(kind, modeling.TORCH[precision], enabled=not whole)
