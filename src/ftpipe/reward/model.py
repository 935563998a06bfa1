"""The reward model: made for training from a policy or a base model, and loaded for use.

Shapes: N replies, L tokens of the longest, M members of an ensemble.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ftpipe import determinism, modeling, policy
from ftpipe.artifacts import write_atomic
from ftpipe.choices import Dtype, Method, Precision
from ftpipe.errors import ModelError
from ftpipe.reward import head
from ftpipe.reward.head import POOLING

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ftpipe.config import RunConfig
    from ftpipe.policy import Incoming

STATED = "reward.json"
WEIGHTS = "adapter_model.safetensors"


def make(
    cfg: RunConfig, start: Incoming, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Return a model to train: the weights that come in, a head drawn from the seed, an adapter.

    The adapter of a policy goes on as the reward's own. Dropout is off but for the adapter's: a reward
    that changes with each draw hides how two replies differ (as TRL's disable_dropout).

    Raises:
        ModelError: if the weights cannot be loaded, or have no place for a score.
    """
    determinism.begin(cfg, seed)
    model, fresh = policy.load(cfg, start, tokenizer, scored=True)
    head.initialise(model, seed)
    head.pool_by_mask(model)
    modeling.no_dropout(model)
    score = head.name_of(model)
    if start.adapter is not None:
        made = _go_on(model, start.adapter, cfg.adapter.dropout)
    else:
        adapter = modeling.adapter_config(cfg.adapter, model, start.revision, fresh, score)
        if adapter is None:
            return model
        made = get_peft_model(model, adapter)
    for name, weight in made.named_parameters():
        if weight.requires_grad:
            of_head = f".{score}." in name
            weight.data = weight.data.to(torch.float32 if of_head else modeling.TORCH[cfg.adapter.dtype])
    # PEFT would save the embeddings whole where they have grown; the adapter holds every new row
    save = partial(made.save_pretrained, save_embedding_layers=False)
    made.save_pretrained = save  # type: ignore[method-assign]
    if cfg.reward.gradient_checkpointing:  # a frozen embedding's output would have no gradient
        made.enable_input_require_grads()
    return made  # type: ignore[return-value]


def _go_on(model: PreTrainedModel, folder: Path, dropout: float) -> PeftModel:
    """Attach a policy's adapter to a scored model, to be trained on; the output head's part is gone.

    Raises:
        ModelError: if a weight of it finds no place, or one is missing.
    """
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.lora_dropout = dropout
    rows: Mapping[str, list[int]] = config.trainable_token_indices or {}  # type: ignore[assignment]
    known = {name for name, _ in model.named_modules()}
    gone = [name for name in rows if name not in known]
    config.trainable_token_indices = {
        name: list(ids) for name, ids in rows.items() if name not in gone
    } or None
    state = {
        name: weight
        for name, weight in load_file(folder / WEIGHTS).items()
        if not any(f".{module}." in name for module in gone)
    }
    score = head.name_of(model)
    state |= {  # PEFT asks for all that such an adapter holds
        f"base_model.model.{score}.{name}": weight
        for name, weight in getattr(model, score).state_dict().items()
    }
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    told: Any = set_peft_model_state_dict(made, state)
    if told.unexpected_keys:
        raise ModelError(
            f"the adapter {folder} does not fit {type(model).__name__}: it has no place for "
            f"{sorted(told.unexpected_keys)[0]}; merge it into its base first (stage merge)."
        )
    whole = get_peft_model_state_dict(made, save_embedding_layers=False)
    if missing := sorted(set(whole) - set(state)):
        raise ModelError(
            f"the adapter {folder} lacks weights: {missing[0]}; delete the folder to build it again."
        )
    return made


@dataclass(frozen=True)
class Normalization:
    """What raw rewards are shifted and scaled by: (raw - mean) / deviation.

    Attributes:
        mean, deviation: of the raw rewards of the replies it was measured on; the deviation is that of
            these replies themselves (divided by their number).
        rows: how many replies they were.
        of: which ones, such as ``chosen, validation``.
    """

    mean: float
    deviation: float
    rows: int
    of: str

    @staticmethod
    def measured(raw: Sequence[float], of: str) -> Normalization:
        """Return the one that gives rewards mean 0 and deviation 1.

        Raises:
            ModelError: if all rewards are equal.
        """
        raw_N = torch.tensor(raw, dtype=torch.float64)
        mean, deviation = raw_N.mean().item(), raw_N.std(correction=0).item()
        if not deviation > 1e-12 * max(1.0, abs(mean)):  # also where it is not a number
            raise ModelError(
                f"the reward of all {len(raw)} replies ({of}) is {mean:.6g}: a constant cannot be "
                "normalised and teaches PPO nothing; look at the loss, or train on more pairs."
            )
        return Normalization(mean, deviation, len(raw), of)

    def apply(self, raw_N: Tensor) -> Tensor:
        return (raw_N - self.mean) / self.deviation


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of which token has which id."""
    listed = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(listed.encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """How the weights were held when the rewards were measured; held otherwise, they give others.

    Attributes:
        method: of training; ``qlora``: the base was in 4 bits.
        dtype: of the weights or, under an adapter, of the base; the head is float32 in any case.
        precision: that products were computed in.
        quantization, double_quantization: the 4-bit code, and whether its scales were quantised too;
            nothing reads them where the method is another.
    """

    method: Method
    dtype: Dtype
    precision: Precision
    quantization: str
    double_quantization: bool

    @staticmethod
    def by(cfg: RunConfig) -> Held:
        """Return how a run holds them."""
        adapter = cfg.adapter
        dtype = Dtype(str(modeling.base_dtype(cfg)).removeprefix("torch."))
        return Held(
            adapter.method,
            dtype,
            cfg.launch.precision,
            adapter.quantization,
            adapter.double_quantization,
        )

    @staticmethod
    def read(stated: Mapping[str, Any]) -> Held:
        """Return what ``reward.json`` says.

        Raises:
            KeyError: if a value is missing.
            ValueError: if one is none of those allowed.
        """
        return Held(
            Method(stated["method"]),
            Dtype(stated["dtype"]),
            Precision(stated["precision"]),
            str(stated["quantization"]),
            bool(stated["double_quantization"]),
        )

    def four_bits(self) -> BitsAndBytesConfig | None:
        """Return the 4-bit settings, if there were any."""
        if self.method is not Method.qlora:
            return None
        compute = modeling.TORCH[self.precision]
        return modeling.four_bits(self.quantization, self.double_quantization, compute)


def state(
    folder: Path,
    members: Mapping[str, Normalization],
    tokenizer: PreTrainedTokenizerBase,
    held: Held,
) -> None:
    """Write what the weights alone do not say, for ``load``: ``reward.json``.

    Args:
        members: by their folder within ``folder``; ``.`` is the folder itself.
    """
    stated = {
        "pooling": POOLING,
        "members": {name: asdict(one) for name, one in members.items()},
        "held": asdict(held),
        "vocabulary": vocabulary(tokenizer),
    }
    write_atomic(folder / STATED, json.dumps(stated, indent=1) + "\n")


@dataclass(frozen=True)
class RewardModel:
    """One or several models that score replies, normalised."""

    models: tuple[torch.nn.Module, ...]
    normalizations: tuple[Normalization, ...]

    def members(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return rewards_MN: each member's own, normalised on its own.

        Args:
            ids_NL: prompt and reply, padded on either side by any token.
            mask_NL: 1 on what is no padding.
        """
        with torch.no_grad():
            raw_MN = [
                model(input_ids=ids_NL, attention_mask=mask_NL).logits[:, 0] for model in self.models
            ]
        normalised = zip(self.normalizations, raw_MN, strict=True)
        return torch.stack([normalization.apply(raw_N) for normalization, raw_N in normalised])

    def score(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return rewards_N: the mean over members. One member: mean 0 and deviation 1 on its replies."""
        return self.members(ids_NL, mask_NL).mean(0)

    def disagreement(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return the standard deviation of the members' rewards, of each of N replies."""
        return self.members(ids_NL, mask_NL).std(0, correction=0)


def stated(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Mapping[str, Normalization], Held]:
    """Return what ``reward.json`` says: the members by their folder, and how the weights were held.

    Raises:
        ModelError: if it cannot be read, or the model was trained with another vocabulary.
    """
    try:
        found: dict[str, Any] = json.loads((folder / STATED).read_text(encoding="utf-8"))
        members = {name: Normalization(**one) for name, one in found["members"].items()}
        held = Held.read(found["held"])
        known = found["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / STATED} cannot be read: {type(error).__name__} {error}.") from None
    if known != vocabulary(tokenizer):
        raise ModelError(
            f"the reward model {folder} was trained with another vocabulary than the tokenizer at hand; "
            "train both from one dataset."
        )
    return members, held


def load(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
    quantization: BitsAndBytesConfig | Literal[False] | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """Return the frozen reward model of an artifact, whole or an adapter, ready to score.

    Unless told otherwise the weights are held as when the rewards were normalised (``reward.json``).

    Args:
        tokenizer: the one whose ids will be scored.
        dtype: of the weights; the head is float32 in any case. None: as it was.
        quantization: 4-bit settings of the base; None: as it was; False: none, whatever it was.

    Raises:
        ModelError: if it cannot be loaded, or was trained with another vocabulary.
    """
    members, held = stated(folder, tokenizer)
    options: dict[str, Any] = {
        "dtype": modeling.TORCH[held.dtype] if dtype is None else dtype,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
    }
    four_bits = held.four_bits() if quantization is None else quantization
    if four_bits:
        options |= {"quantization_config": four_bits, "device_map": {"": torch.device(device)}}
    models = tuple(_open(folder / name, tokenizer, options, device) for name in members)
    return RewardModel(models, tuple(members.values()))


def _open(
    folder: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], device: Any
) -> torch.nn.Module:
    start = policy.found(folder)
    if start.revision is not None:
        options = options | {"revision": start.revision}
    model = modeling.open_weights(start.weights, options, scored=True)
    name = head.name_of(model)
    getattr(model, name).float()
    if start.adapter is not None:
        rows = LoraConfig.from_pretrained(str(folder)).trainable_token_indices or {}
        modeling.add_rows(model, tokenizer, {token for ids in rows.values() for token in ids})
    else:
        copy_head(folder, name, model)
    head.pool_by_mask(model)
    opened: torch.nn.Module = model
    if start.adapter is not None:
        opened = PeftModel.from_pretrained(model, str(folder))
    if "quantization_config" not in options:
        opened.to(device)
    return opened.eval().requires_grad_(False)


def copy_head(folder: Path, name: str, model: PreTrainedModel) -> None:
    """Read the head as it was stored: opened with the rest it was rounded to their dtype."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  (it is no mapping)
                if key.startswith(f"{name}."):
                    part = getattr(getattr(model, name), key.split(".", 1)[1])
                    part.data.copy_(weights.get_tensor(key))
