"""A policy becomes a folder that others load: merged, compared with what was trained, described."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ftpipe import determinism, modeling, policy
from ftpipe import tokenizer as tokenizers
from ftpipe.artifacts import PARTIAL, Artifact
from ftpipe.choices import Dtype, Gguf, Precision
from ftpipe.config import RunConfig
from ftpipe.errors import ModelError
from ftpipe.export import card, chat, gguf_file, merging, ollama, parity, quantized, vocabulary
from ftpipe.export.parity import Parity, Row
from ftpipe.export_config import shard_bytes
from ftpipe.logs import say
from ftpipe.policy import Incoming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARITY, MODELFILE = "parity.json", "Modelfile"


@dataclass(frozen=True)
class Comparison:
    """The rows that policy and folder are compared on, and where they are from."""

    rows: Sequence[Row]
    on: str
    scratch: Path


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Write the policy to ``out`` as a model folder; return how far it is from what was trained.

    Returns:
        ``kl_mean``, ``kl_p99``, ``kl_max`` (nats per token), ``agreement`` and, where rows with learned
        tokens are held out, ``loss_delta``; for each GGUF file ``TYPE_kl_mean`` and ``TYPE_agreement``,
        and the same for each folder in 4 bits.

    Raises:
        ModelError: if the policy cannot be merged or written, or what came out is not the policy.
    """
    determinism.begin(cfg)
    start, tokenizer = _start(cfg, inputs)
    held = policy.as_held(cfg, start)  # cfg stays what the run is called by
    whole = modeling.whole_config(start.weights, start.revision, cfg.model.trust_remote_code)
    if cfg.export.gguf and cfg.export.converter is None:
        gguf_file.check(whole)  # before anything long
        vocabulary.of(tokenizer, whole.get_text_config().vocab_size)
    dataset = inputs["dataset"].path if "dataset" in inputs else None
    matrices = quantized.check(cfg, whole, dataset) if cfg.export.quantize else 0
    ends = chat.ends(cfg.data.template, tokenizer)
    tokenizer.chat_template = chat.jinja(cfg.data.template, tokenizer)
    _write_model(held, start, tokenizer, ends, out)

    on, rows = parity.held_out(dataset, cfg.export.rows, len(tokenizer))
    shown = Comparison(rows, on, out)
    parity.remember(_as_trained(held, start, tokenizer), rows, out, _autocast(cfg))
    found = _compare(cfg, shown)
    say(f"KL from the policy {found.kl_mean:.1e} nats per token, same likeliest {found.agreement:.2%}")
    refused = parity.refusal(found, cfg.export.max_kl, cfg.export.min_agreement, "what was exported")
    if refused is not None:
        raise ModelError(refused)

    files = {kind: _write_gguf(cfg, out, kind, tokenizer, ends, shown) for kind in cfg.export.gguf}
    folders = {
        kind: _compare_packed(cfg, quantized.write(cfg, out, dataset, kind, matrices), shown)
        for kind in cfg.export.quantize
    }
    parity.forget(out)
    measured = {str(kind): one for kind, (_, one) in files.items()}
    measured |= {str(kind): one for kind, one in folders.items()}
    metrics = _metrics(found, measured)
    facts = {"folder": found.facts()} | {
        kind: one.facts() if one else None for kind, one in measured.items()
    }
    _text(out / PARITY, json.dumps(facts, indent=1) + "\n")
    if files:
        finest = min(files, key=list(Gguf).index)
        generation = json.loads((out / GENERATION_CONFIG_NAME).read_text(encoding="utf-8"))
        words = ollama.modelfile(files[finest][0], cfg.data.template, tokenizer, generation)
        _text(out / MODELFILE, words)
    bundle = out.name.removesuffix(PARTIAL)
    _text(out / card.CARD, card.card(card.Told(cfg, inputs, bundle, found, files, folders)))
    _text(out / card.NOTES, card.notes(cfg))
    return metrics


def _start(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> tuple[Incoming, PreTrainedTokenizerBase]:
    """Return the policy, or the base model, and its tokenizer."""
    if "policy" in inputs:
        start = policy.incoming(cfg, inputs)
        return start, AutoTokenizer.from_pretrained(str(inputs["policy"].path))
    base = inputs.get("base_model")
    return policy.base(cfg, inputs), tokenizers.load(cfg.model, base.path if base else None)


def _write_model(
    cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase, ends: list[int], out: Path
) -> None:
    """Write weights, configuration, tokenizer with its chat template, and how to generate."""
    dtype = (
        modeling.stored_dtype(cfg, start.weights, start.revision)
        if cfg.export.dtype is Dtype.auto
        else modeling.TORCH[cfg.export.dtype]
    )
    tokens = max(tokenizer.get_vocab().values()) + 1
    made = merging.merged(cfg, start, dtype, tokens)
    size = shard_bytes(cfg.export.max_shard_size)
    assert size is not None
    files = made.write(out, size)
    say(f"{len(made.names()):,} tensors in {str(dtype).removeprefix('torch.')}, {len(files)} files")
    made.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    made.config.use_cache = True
    made.config.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    generation = _generation(start, made.config)
    generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    generation.eos_token_id = ends
    # as they have it: save_pretrained refuses some of what is published, such as Llama 2's
    generation.to_json_file(out / GENERATION_CONFIG_NAME)


def _generation(start: Incoming, config: Any) -> GenerationConfig:
    """Return how the base model generates, as its authors have it."""
    try:
        return GenerationConfig.from_pretrained(start.weights, revision=start.revision or "main")
    except OSError:  # it says nothing of it
        return GenerationConfig.from_model_config(config)


def _as_trained(cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the policy as it was trained: its adapter on its base, in the precision of training."""
    model, _ = policy.load(cfg, start, tokenizer)
    if start.adapter is not None:
        model = policy.adapted(model, start.adapter, trainable=False)  # type: ignore[assignment]
    return _placed(cfg, model)


def _autocast(cfg: RunConfig) -> torch.dtype | None:
    return None if cfg.launch.precision is Precision.fp32 else modeling.TORCH[cfg.launch.precision]


def _placed(cfg: RunConfig, model: PreTrainedModel) -> PreTrainedModel:
    """Return a model ready to be asked, where ``launch.device`` says."""
    model.eval().requires_grad_(False)
    return model.to(modeling.device(cfg))  # type: ignore[arg-type, no-any-return]


def _compare(cfg: RunConfig, held: Comparison, gguf: str | None = None, folder: str = "") -> Parity:
    """Return how far what plain transformers loads from the folder is from what was remembered.

    Args:
        gguf: a GGUF file in the folder, in place of its safetensors.
        folder: a folder in it, in place of it.

    Raises:
        ModelError: if it cannot be loaded.
    """
    options: dict[str, Any] = (
        {"use_safetensors": True} if gguf is None else {"gguf_file": gguf, "dtype": torch.float32}
    )
    code = {"trust_remote_code": cfg.model.trust_remote_code}
    what = gguf or held.scratch / folder
    if folder:
        options["output_loading_info"] = True
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(held.scratch / folder), **code, **options)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(f"{what} cannot be loaded again: {tokenizers.first_line(error)}.") from None
    model, told = loaded if folder else (loaded, {"missing_keys": (), "unexpected_keys": ()})
    astray = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    if astray:
        raise ModelError(f"{what} cannot be loaded again: {astray[0]} is not where transformers has it.")
    return parity.compare(_placed(cfg, model), held.rows, held.scratch, held.on)


def _write_gguf(
    cfg: RunConfig,
    out: Path,
    kind: Gguf,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    held: Comparison,
) -> tuple[str, Parity | None]:
    """Write one GGUF file; return its name and how far it is from the policy, where that can be told.

    Raises:
        ModelError: if it cannot be written, or is fine enough to be the policy and is not.
    """
    file = f"{cfg.name}-{kind}.gguf"
    if cfg.export.converter is not None:
        gguf_file.convert(Path(cfg.export.converter), out, out / file, kind)
    else:
        gguf_file.write(out, out / file, kind, tokenizer, ends, cfg.name)
    if not gguf_file.readable(modeling.whole_config(str(out), None, cfg.model.trust_remote_code)):
        say(f"{file} was not compared: transformers loads no GGUF files of this model")
        return file, None
    found = _compare(cfg, held, file)
    say(f"{file}: KL {found.kl_mean:.1e} nats per token, same likeliest {found.agreement:.2%}")
    if kind in gguf_file.EXACT:
        refused = parity.refusal(found, cfg.export.max_kl, cfg.export.min_agreement, file)
        if refused is not None:
            raise ModelError(refused)
    return file, found


def _compare_packed(cfg: RunConfig, folder: str, held: Comparison) -> Parity:
    """Return how far the folder in 4 bits is from the policy, which is told and not judged."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bars of progress
        found = _compare(cfg, held, folder=folder)
    say(f"{folder}/: KL {found.kl_mean:.1e} nats per token, same likeliest {found.agreement:.2%}")
    return found


def _metrics(found: Parity, others: Mapping[str, Parity | None]) -> dict[str, float]:
    metrics = {name: getattr(found, name) for name in ("kl_mean", "kl_p99", "kl_max", "agreement")}
    if found.loss_delta is not None:
        metrics["loss_delta"] = found.loss_delta
    for kind, one in others.items():
        if one is not None:
            metrics |= {f"{kind}_kl_mean": one.kl_mean, f"{kind}_agreement": one.agreement}
    return metrics


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
