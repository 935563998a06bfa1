"""A policy in memory, ready to answer: its base, its adapter on it, its tokenizer, its template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from ftpipe import modeling, policy
from ftpipe.choices import Attention, Device, Dtype, Method, Precision, TemplateName
from ftpipe.config import AdapterConfig, ModelConfig, RunConfig
from ftpipe.data.prompt import Template
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.policy import Incoming
from ftpipe.serving.engine import Engine
from ftpipe.serving.source import POLICY, Source
from ftpipe.tokenizer import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRECISIONS = {torch.bfloat16: Precision.bf16, torch.float16: Precision.fp16}


@dataclass(frozen=True)
class Voice:
    """A policy that answers, and how its prompts are written."""

    source: Source
    template: Template
    engine: Engine


def voice(source: Source, device: Device) -> Voice:
    """Load a policy and start the thread that answers.

    Raises:
        UserError: if it cannot be loaded, or nothing says how its turns are written.
    """
    where = _device(device)
    start = policy.found(source.folder)
    remote = source.cfg is not None and source.cfg.model.trust_remote_code
    tokenizer = _tokenizer(source.folder, remote)
    template = _template(source, tokenizer)  # before the weights: they take minutes
    model = _model(as_trained(_held(source, start), where), start, tokenizer, where)
    known = modeling.positions(model.config.get_text_config())
    return Voice(source, template, Engine(model, tokenizer, known))


def _held(source: Source, start: Incoming) -> RunConfig:
    """Return how a policy's base is held; what is no policy is loaded as it is stored."""
    if source.cfg is None:
        return _unrecorded(start)
    cfg = policy.as_held(source.cfg, start)
    if source.kind == POLICY:
        return cfg
    stated = modeling.text_config(start.weights, start.revision, cfg.model.trust_remote_code).dtype
    return _stored(cfg, stated)


def as_trained(cfg: RunConfig, device: torch.device) -> RunConfig:
    """Return a configuration that loads the base as training had it, as far as this machine can.

    Frozen weights are in the run's precision, in 4 bits where they were. Weights that were all trained
    were float32 with arithmetic in that precision; they answer in it. A CPU has no float16 to speak of.
    """
    if cfg.adapter.method is Method.full:
        cfg = replace(cfg, adapter=AdapterConfig(method=Method.lora))
    if device.type == "cpu":
        if cfg.launch.precision is Precision.fp16:
            cfg = replace(cfg, launch=replace(cfg.launch, precision=Precision.fp32))
        if cfg.model.attention is Attention.flash_attention_2:
            cfg = replace(cfg, model=replace(cfg.model, attention=Attention.sdpa))
    return cfg


def _unrecorded(start: Incoming) -> RunConfig:
    """Return how a folder without a record is loaded: in the number format that it states."""
    config = modeling.text_config(start.weights, start.revision)
    model = ModelConfig(path=start.weights, attention=modeling.kernel(config))
    return _stored(RunConfig(model=model, adapter=AdapterConfig(method=Method.lora)), config.dtype)


def _stored(cfg: RunConfig, stated: torch.dtype | None) -> RunConfig:
    """Return a configuration that loads whole weights in the number format that they state."""
    precision = Precision.fp32 if stated is None else PRECISIONS.get(stated, Precision.fp32)
    model = replace(cfg.model, dtype=Dtype.auto)
    return replace(cfg, model=model, launch=replace(cfg.launch, precision=precision))


def _model(
    cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """Return the whole model, with its adapter's layers in it where it has one."""
    model, _ = policy.load(cfg, start, tokenizer)
    if start.adapter is not None:
        policy.adapted(model, start.adapter, trainable=False)  # its layers stay in the model
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    model.config.use_cache = True
    return model


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises bare Exceptions of a damaged file
        raise ModelError(f"the tokenizer of {folder} cannot be loaded: {first_line(error)}.") from None
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {folder} has no tokenizer.json, which prompts need.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(source: Source, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return how turns are written.

    Raises:
        ConfigError: if the tokenizer has no chat template where that was trained with, or the like.
    """
    if source.template is TemplateName.tokenizer and not tokenizer.chat_template:
        raise ConfigError(
            f"{source.folder} has no chat template, so nothing says how its turns are written; name the "
            "one that it was trained with, such as --template chatml."
        )
    try:
        return Template(source.template, tokenizer)
    except DataError as error:
        raise ConfigError(f"the {source.template} template cannot write a question: {error}.") from None


def _device(device: Device) -> torch.device:
    """Return where the model is to be.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if device is Device.cuda and not has_gpu:
        raise ConfigError("--device=cuda needs a GPU, and this machine shows none.")
    return torch.device("cuda" if has_gpu and device is not Device.cpu else "cpu")
