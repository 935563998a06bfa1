"""The model that comes in: an earlier stage's policy, whole or an adapter, or the base model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe import modeling
from ftpipe.artifacts import Artifact
from ftpipe.choices import Method
from ftpipe.config import AdapterConfig, RunConfig
from ftpipe.errors import ConfigError, ModelError
from ftpipe.tokenizer import NEW_TOKENS, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY = "default"  # PEFT's name of an adapter that is given none
REFERENCE = "reference"  # the name of the frozen adapter beside the one that is trained
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Incoming:
    """What a stage starts from.

    Attributes:
        weights: a folder, or a hub id, of whole weights: those of the policy, or of its base.
        revision: the hub commit of the weights, where they are on a hub.
        adapter: the folder of the policy's adapter, where it is one.
        new_tokens: ids of tokens whose rows the weights may lack; the adapter holds them, if there is
            one.
    """

    weights: str
    revision: str | None = None
    adapter: Path | None = None
    new_tokens: tuple[int, ...] = ()


def incoming(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> Incoming:
    """Return what a stage starts from: ``inputs["policy"]`` where it has one, else the base model."""
    if "policy" in inputs:
        return found(inputs["policy"].path)
    new: dict[str, int] = json.loads((inputs["dataset"].path / NEW_TOKENS).read_text(encoding="utf-8"))
    return replace(base(cfg, inputs), new_tokens=tuple(new.values()))


def base(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> Incoming:
    """Return the base model as it is: ``inputs["base_model"]``, or the one that ``model.path`` names."""
    made = inputs.get("base_model")
    where = modeling.base_path(cfg.model, made.path if made else None)
    return Incoming(where, None if made else cfg.model.revision)


def found(folder: Path) -> Incoming:
    """Return what lies in a folder: whole weights, or an adapter and where its base is.

    Raises:
        ModelError: if the adapter's weights are missing.
    """
    if not (folder / ADAPTER).is_file():
        return Incoming(str(folder))  # whole: the new rows are in it
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {ADAPTER_WEIGHTS}; delete the folder to build it again.")
    stated = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    where = str(stated["base_model_name_or_path"])
    for around in (folder.parent, folder.parent.parent):  # the latter for a part of an artifact
        beside = around / Path(where).name  # an artifact's base is one too; folders may be moved
        if beside.is_dir():
            where = str(beside)
            break
    rows: dict[str, list[int]] = stated.get("trainable_token_indices") or {}
    new = sorted({token for ids in rows.values() for token in ids})
    return Incoming(where, stated.get("revision"), folder, tuple(new))


def load(
    cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase, scored: bool = False
) -> tuple[PreTrainedModel, Sequence[int]]:
    """Return the whole weights, ready for an adapter, and the rows of tokens new to them.

    Args:
        scored: with a score in place of the output head (see ``modeling.load``).

    Raises:
        ModelError: if they cannot be loaded.
    """
    model = modeling.load(cfg, start.weights, start.revision, scored)
    fresh = modeling.add_rows(model, tokenizer, start.new_tokens)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, fresh


def as_held(cfg: RunConfig, start: Incoming) -> RunConfig:
    """Return the configuration with a base held as the policy's was: in 4 bits only under an adapter.

    Whole weights that QLoRA was merged into are no base of it: their 4 bits are behind them.
    """
    if start.adapter is not None or cfg.adapter.method is not Method.qlora:
        return cfg
    return replace(cfg, adapter=replace(cfg.adapter, method=Method.lora))


def check_method(cfg: RunConfig, start: Incoming) -> None:
    """Refuse an adapter where all weights are to be trained.

    Raises:
        ConfigError: saying what to do instead.
    """
    if cfg.adapter.method is Method.full and start.adapter is not None:
        raise ConfigError(
            "adapter.method=full trains all weights, but the policy that comes in is an adapter; "
            "put 'merge' before this stage, or set adapter.method to lora or qlora."
        )


def adapted(base: PreTrainedModel, adapter: Path, trainable: bool) -> PeftModel:
    """Return the base with the policy's adapter on it.

    Raises:
        ModelError: if it cannot be loaded.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter), adapter_name=POLICY, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {adapter} cannot be loaded: {first_line(error)}.") from None


def continued(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """Return the base with the incoming adapter twice: one is trained, one stays as it came in.

    Raises:
        ModelError: if it cannot be loaded.
    """
    model = adapted(base, adapter, trainable=True)
    model.load_adapter(str(adapter), adapter_name=REFERENCE, is_trainable=False)
    model.set_adapter(POLICY)
    return model


def with_fresh_adapter(
    base: PreTrainedModel, adapter: AdapterConfig, start: Incoming, fresh: Sequence[int]
) -> PeftModel:
    """Return the base with a new adapter, whose update is zero; one factor of it is drawn.

    Args:
        fresh: the rows of tokens new to the base.
    """
    from peft import PeftModel, get_peft_model

    config = modeling.adapter_config(adapter, base, start.revision, fresh)
    assert config is not None
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model
