"""Base models and adapters: load, quantise, attach, save. The seed is set before any random weight."""

from __future__ import annotations

import inspect
import logging
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ftpipe import home
from ftpipe.architectures import refuse_foreign, refuse_unknown, without_class
from ftpipe.choices import Attention, Device, Dtype, Method, Precision
from ftpipe.config import AdapterConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError, ModelError, nearest
from ftpipe.pins import local_model
from ftpipe.tokenizer import first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

TORCH = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
}

# What transformers calls the head that gives a score, and PEFT trains and saves whole.
SCORE_HEADS = ("score", "classifier")


def random_model(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return a model of the given architecture with random float32 weights.

    Raises:
        ModelError: if transformers does not know the architecture or a value does not fit it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    architecture = {str(key): value for key, value in model.architecture.items()}
    kind = architecture.pop("model_type")
    refuse_unknown(kind, f"model.architecture.model_type={kind}")
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if architecture.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise ModelError(
            f"model.architecture.vocab_size={architecture['vocab_size']} is less than the tokenizer's "
            f"{len(tokenizer)} tokens."
        )
    set_seed(seed)
    try:
        config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **architecture, **special})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-any-return]
    except Exception as error:  # each architecture complains in its own way of values that do not fit
        reason = first_line(error.__cause__ or error)
        raise ModelError(f"model.architecture does not fit {kind}: {reason}.") from None


def from_gguf(model: ModelConfig) -> PreTrainedModel:
    """Return the model of a GGUF file as ordinary float32 weights, which lose nothing.

    transformers marks a model loaded from GGUF as quantised, so that no Trainer takes it and it
    cannot be saved; its weights are whole, and a fresh model of the same class takes them over.

    Raises:
        ModelError: if the file cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = local_model(model)
    assert file is not None
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(str(file.parent), **where)
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
    except ImportError:
        raise ModelError(f"{file} needs the gguf package: pip install 'ftpipe[gguf]'.") from None
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}.") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain  # type: ignore[no-any-return]


def whole_config(where: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return a model's configuration, without its weights.

    Args:
        where: a folder, or a hub id.

    Raises:
        ModelError: if it cannot be read.
    """
    from transformers import AutoConfig

    given = {"trust_remote_code": trust_remote_code}
    if not trust_remote_code:
        refuse_foreign(where, revision)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, **given)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model {where} cannot be read: {first_line(error)}.") from None
    return config


def text_config(where: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model's text part, as ``whole_config`` reads it."""
    return whole_config(where, revision, trust_remote_code).get_text_config()


def stored_dtype(cfg: RunConfig, where: str, revision: str | None) -> torch.dtype:
    """Return the number format of merged weights: what ``model.dtype`` asks for, else the base's."""
    if cfg.model.dtype is not Dtype.auto:
        return TORCH[cfg.model.dtype]
    stated = whole_config(where, revision, cfg.model.trust_remote_code).dtype
    return stated if isinstance(stated, torch.dtype) else torch.float32


def positions(config: Any) -> int | None:
    """Return how many tokens a model knows positions of, as its text part's configuration says."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):  # the last of MPT
        known = getattr(config, name, None)
        if isinstance(known, int):
            return known
    return None


def kernel(config: Any) -> Attention:
    """Return the attention kernel that transformers takes by itself: sdpa, where the model has it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return Attention.sdpa if getattr(known, "_supports_sdpa", True) else Attention.eager


def base_path(model: ModelConfig, base: Path | None) -> str:
    """Return where plain transformers finds the base model: a folder, or a hub id.

    An adapter's configuration repeats it, so it names no home where it need not.
    """
    assert base is not None or model.path is not None
    return home.from_here(str(base) if base is not None else str(model.path))


def load_base(cfg: RunConfig, base: Path | None) -> PreTrainedModel:
    """Return the base model in the dtype and quantisation that the run trains it in.

    Args:
        base: its folder, where an earlier stage made one; else ``cfg.model.path``.

    Raises:
        ModelError: if it cannot be loaded.
    """
    revision = cfg.model.revision if base is None else None
    return load(cfg, base_path(cfg.model, base), revision)


def load(
    cfg: RunConfig, where: str, revision: str | None = None, scored: bool = False
) -> PreTrainedModel:
    """Return whole weights in the dtype and quantisation that the run trains them in.

    Args:
        where: a folder, or a hub id.
        scored: with one score for each position in place of the output head; where the weights have
            no such head, it is drawn from the seed.

    Raises:
        ModelError: if they cannot be loaded.
    """
    options: dict[str, Any] = {
        "dtype": base_dtype(cfg),
        "attn_implementation": str(cfg.model.attention),
        "trust_remote_code": cfg.model.trust_remote_code,
    }
    if revision is not None:
        options["revision"] = revision
    if cfg.adapter.method is Method.qlora:
        options["quantization_config"] = quantization(cfg)
    model = open_weights(where, options, scored)
    model.config.use_cache = False  # a cache is for generation; it is turned on there
    _let_padding_learn(model)
    return model


def open_weights(where: str, options: dict[str, Any], scored: bool) -> PreTrainedModel:
    """Return whole weights, opened by transformers with ``options``.

    Raises:
        ModelError: if they cannot be loaded, or some but the score's are missing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if not options.get("trust_remote_code"):
        refuse_foreign(where, options.get("revision"))
    unset_hf_deepspeed_config()  # of a model before: this one is loaded whole, and shared out later
    options = {**options, "use_safetensors": True}
    missing: Collection[str] = ()
    try:
        if scored:
            if "quantization_config" in options:  # the head is trained, so it stays whole
                options["quantization_config"].llm_int8_skip_modules = list(SCORE_HEADS)
            # a table of the keys in which a policy and a score differ; the ones that matter are below
            logging.getLogger("transformers.modeling_utils").addFilter(_no_key_table)
            model, told = AutoModelForSequenceClassification.from_pretrained(
                where, num_labels=1, output_loading_info=True, **options
            )
            missing = [key for key in told["missing_keys"] if key.split(".")[0] not in SCORE_HEADS]
        else:
            model = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        why = without_class(error, where, scored)
        raise ModelError(why or f"the model {where} cannot be loaded: {first_line(error)}.") from None
    finally:
        logging.getLogger("transformers.modeling_utils").removeFilter(_no_key_table)
    if missing:
        raise ModelError(f"the model {where} lacks weights: {sorted(missing)[0]}.")
    _keep_trainable_layout(model)
    return model  # type: ignore[no-any-return]


def _no_key_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def _let_padding_learn(model: PreTrainedModel) -> None:
    """Give the embedding of the padding token its gradient: where eos pads, it is a learned token.

    Padding itself gets none: no label and no attention reaches it.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        embedding.padding_idx = None


def add_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: Collection[int]
) -> list[int]:
    """Give new tokens their rows in the embeddings and the output head; return their ids, sorted.

    Each is the mean of the rows of the tokens known before, so that it starts neither likely nor odd
    (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Nothing is drawn. A matrix
    that has the rows already, as padded vocabularies do, keeps its size.
    """
    if not new:
        return []
    ids = tokenizer.get_vocab().values()
    before = len(weight_of(model.get_input_embeddings()))
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        _let_padding_learn(model)
    after = len(weight_of(model.get_input_embeddings()))
    fresh = sorted({*new, *range(before, after)})
    known = torch.tensor(sorted(set(ids) - set(fresh)))
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in (getattr(part, "weight", None), getattr(part, "bias", None)):
                if rows is not None:  # tied ones are written twice, with the same values
                    mean = rows[known.to(rows.device)].mean(0, dtype=torch.float32)
                    rows[fresh] = mean.to(rows.dtype)
    return fresh


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight


def _keep_trainable_layout(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the layout that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer for inference at its first forward in
    eval mode, for good; training then goes on through an operator without a gradient, and every
    layer below stops learning with no more than a warning (nn/modules.py, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def device(cfg: RunConfig) -> torch.device:
    """Return where a run computes, once ``launch.resolve_device`` has said so."""
    return torch.device("cuda" if cfg.launch.device is Device.cuda else "cpu")


def base_dtype(cfg: RunConfig) -> torch.dtype:
    """Return the dtype of the base weights.

    Weights that are trained are float32 (autocast computes in the precision); frozen ones are stored
    in the precision itself.
    """
    if cfg.model.dtype is not Dtype.auto:
        return TORCH[cfg.model.dtype]
    return torch.float32 if cfg.adapter.method is Method.full else TORCH[cfg.launch.precision]


def quantization(cfg: RunConfig) -> BitsAndBytesConfig:
    """Return the run's 4-bit settings."""
    adapter = cfg.adapter
    return four_bits(adapter.quantization, adapter.double_quantization, TORCH[cfg.launch.precision])


def four_bits(code: str, double: bool, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit settings (arXiv:2305.14314, section 3).

    Args:
        code: name of the 4-bit code.
        double: quantises the scales too.
        compute: dtype of the products.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=code,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def adapter_config(
    adapter: AdapterConfig,
    model: PreTrainedModel,
    revision: str | None = None,
    fresh: Sequence[int] = (),
    score: str = "",
) -> PeftConfig | None:
    """Return PEFT's settings of the adapter, or None where all weights are trained.

    Args:
        revision: the hub commit of the base, recorded so that whoever loads the adapter gets it.
        fresh: tokens whose rows of the embeddings and the head are trained and saved with it.
        score: the head that gives the score, where the model has one: it is trained and saved whole.

    Raises:
        ConfigError: if a target names no module of the model, or the new tokens cannot be trained.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if adapter.method is Method.full:
        return None
    everything = adapter.targets == ["all-linear"]
    if not everything:
        outputs = model.get_output_embeddings()
        head = score or next((n for n, m in model.named_modules() if m is outputs), "")
        if any(head == target or head.endswith(f".{target}") for target in adapter.targets):
            reason = (
                "the score, which is trained whole"
                if score
                else "the output head, whose loss is computed from its weight directly, so an adapter "
                "on it would never be trained"
            )
            raise ConfigError(f"adapter.targets: {head} is {reason}; leave it out.")
        leaves = sorted({name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)} - {head})
        for target in adapter.targets:
            if not any(
                name == target or name.endswith(f".{target}") for name, _ in linear_modules(model)
            ):
                raise ConfigError(
                    f"adapter.targets: {type(model).__name__} has no module '{target}'."
                    f"{nearest(target, leaves)} It has {', '.join(leaves)}."
                )
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules="all-linear" if everything else list(adapter.targets),
        bias="none",
        # GPT-2's layers keep their weights the other way round
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        revision=revision,
        trainable_token_indices=_token_rows(adapter, model, fresh) if fresh else None,
        task_type="SEQ_CLS" if score else "CAUSAL_LM",  # the former trains and saves the score
    )


def _token_rows(
    adapter: AdapterConfig, model: PreTrainedModel, fresh: Sequence[int]
) -> dict[str, list[int]]:
    """Return which rows of which modules are trained; PEFT keeps those of a tied head tied."""
    names = {id(module): name for name, module in model.named_modules()}
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:  # PEFT 0.21 leaves it out (trainable_tokens/layer.py)
        raise ConfigError(
            f"model.new_tokens: the output head of {type(model).__name__} has a bias, and PEFT trains "
            "tokens only of a head without one; set adapter.method=full."
        )
    name = names[id(inputs)]
    if any(name == target or name.endswith(f".{target}") for target in adapter.targets):
        raise ConfigError(
            f"adapter.targets: {name} has trained rows for model.new_tokens, so it can have no adapter "
            "as well; leave it out."
        )
    return {names[id(part)]: list(fresh) for part in (inputs, head) if part is not None}


def keep_to_rows(policy: PreTrainedModel) -> None:
    """Make an adapter with trained rows fit TRL, and save those rows rather than two matrices.

    PEFT 0.21 adds the embeddings and the head whole where they have grown, though the adapter holds
    every new row (utils/save_and_load.py).
    """
    head = policy.get_output_embeddings()
    if head is not None and not hasattr(
        head, "bias"
    ):  # TRL's head asks for it; PEFT's wrapper does not pass it on
        head.register_parameter("bias", None)
    keep = partial(policy.save_pretrained, save_embedding_layers=False)
    policy.save_pretrained = keep  # type: ignore[method-assign]


def no_dropout(model: torch.nn.Module) -> None:
    """Turn every dropout off, also those that a model applies by a number rather than a module.

    Preferences are learned from differences of log-probabilities, in which dropout is noise; the DPO
    paper's code and TRL turn it off too.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                setattr(module, name, 0.0)


def attended(model: torch.nn.Module, ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> dict[str, Any]:
    """Return what a model's forward takes of rows padded on either side, without a cache.

    Positions count what is no padding; some models take none.

    Args:
        mask_NL: 1 on what is no padding.
    """
    given: dict[str, Any] = {"input_ids": ids_NL, "attention_mask": mask_NL, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask_NL.cumsum(1) - 1).clamp(min=0)
    return given


def logits_at(
    model: torch.nn.Module, ids_NL: torch.Tensor, mask_NL: torch.Tensor, first: int, until: int
) -> torch.Tensor:
    """Return a causal model's logits at the places ``first`` to before ``until``, in float32: (N, K, V).

    Args:
        mask_NL: 1 on what is no padding, on either side.
    """
    given = attended(model, ids_NL, mask_NL)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        every_NLV: torch.Tensor = model(**given).logits
        return every_NLV[:, first:until].float()
    # places, not a number: a slice of the hidden states would not be contiguous, and torch would copy
    # the output head's weights for each row
    given["logits_to_keep"] = torch.arange(first, until, device=ids_NL.device)
    logits_NKV: torch.Tensor = model(**given).logits
    return logits_NKV.float()


class _UnlessAutocast:
    """False where autocast chooses dtypes; also when a layer is computed again in a backward pass."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self._device)


def cast_once(model: torch.nn.Module, device: str) -> None:
    """Let autocast alone choose the dtype that adapters compute in.

    PEFT casts an adapter's input to the dtype of its weights, and autocast casts it back: the same
    numbers, for two passes over each input.

    Args:
        device: the type of the one it computes on.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = _UnlessAutocast(device)  # type: ignore[assignment]


def linear_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Return the modules LoRA can attach to, by dotted name."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def trainable(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many weights are trained, and how many there are (4-bit ones counted whole)."""
    trained = whole = 0
    for weight in model.parameters():
        # bitsandbytes packs two 4-bit weights into a byte
        count = weight.numel() * (2 if type(weight).__name__ == "Params4bit" else 1)
        whole += count
        trained += count if weight.requires_grad else 0
    return trained, whole
