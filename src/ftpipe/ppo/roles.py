"""The four roles of PPO: policy, reference, value function and reward model.

With an adapter they share one base, in 4 or 16 bits, and each is an adapter on it: the policy's is
trained; the reference is the policy's as it came in, frozen, or the base without any; the value function
is an adapter with a head, trained; the reward model is its own adapter with its normalised head, frozen.
Where all weights are trained, and for a reward model of another base, there are separate models.

Two traps of PEFT are dealt with here. ``set_adapter`` makes the adapter that it activates trainable, the
frozen ones too, so gradients are switched by role alone. With gradient checkpointing the backward pass
computes again under whatever adapter is active then, so it must run inside ``acting``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from ftpipe import modeling, policy, sharding
from ftpipe.choices import Algorithm, Method, Precision, RewardKind, Strategy, ValueStart
from ftpipe.errors import ConfigError
from ftpipe.launch_settings import in_force
from ftpipe.logs import say
from ftpipe.policy import POLICY, REFERENCE, Incoming
from ftpipe.ppo.adapters import Member, SharedBase, reward_members
from ftpipe.reward import head as score_head
from ftpipe.reward import model as reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftpipe.artifacts import Artifact
    from ftpipe.config import RunConfig

VALUE = "value_function"  # names of adapters beside policy and reference
REWARD = "reward_model"


class Role(StrEnum):
    """Whose words or values a model speaks."""

    policy = "policy"
    reference = "reference"
    value = "value"


class Rewards(Protocol):
    """A learned reward: normalised scores of prompts with answers."""

    def members(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return rewards_MN, of each member of an ensemble."""
        ...


@dataclass
class Roles:
    """Models in their roles.

    Attributes:
        shared: the base with all adapters; None where the roles are models of their own.
        models: of each role; with a shared base they are all that base.
        head: from hidden states of the value function to a value, float32; None where the
            algorithm has no value function.
        rewards: None where the reward is a function.
    """

    shared: SharedBase | None
    models: Mapping[Role, PreTrainedModel]
    head: torch.nn.Linear | None
    rewards: Rewards | None

    @contextmanager
    def acting(self, role: Role) -> Iterator[PreTrainedModel]:
        """Let a model act in a role; backward passes of what it computes belong inside."""
        if self.shared is None:
            yield self.models[role]
            return
        with self.shared.on(ADAPTERS[role]):
            yield self.models[role]

    def trained(self, role: Role) -> dict[str, torch.nn.Parameter]:
        """Return what is trained in a role, by name; the two roles have nothing in common."""
        head = self.head
        if role is Role.reference or (role is Role.value and head is None):
            return {}
        if self.shared is not None:
            found = self.shared.weights(ADAPTERS[role])
        else:
            found = dict(self.models[role].named_parameters())
        if role is Role.value and head is not None:
            # the output head's rows of new tokens say nothing of a value
            seen = {id(weight) for weight in body_of(self.models[role]).parameters()}
            found = {name: weight for name, weight in found.items() if id(weight) in seen}
            found |= {f"head.{name}": weight for name, weight in head.named_parameters()}
        return found

    @property
    def value_head(self) -> torch.nn.Linear:
        """The head of the value function, where there is one."""
        assert self.head is not None
        return self.head

    @property
    def device(self) -> torch.device:
        return self.models[Role.policy].device

    def train(self, mode: bool) -> None:
        """Turn gradient checkpointing on or off; there is no dropout that training would turn on."""
        for model in self.models.values():
            model.train(mode)

    def save(self, out: Path, first: bool) -> None:
        """Write the policy as it can be loaded by itself. Call on all ranks.

        Args:
            first: this is the rank that writes.
        """
        model = self.models[Role.policy]
        state = sharding.whole(model) if sharding.found(model) is not None else None
        if not first:
            return
        if self.shared is None:
            model.save_pretrained(str(out), state_dict=state)
            return
        # PEFT would save the embeddings whole where they have grown; the adapter holds every new row
        options: dict[str, Any] = {"selected_adapters": [POLICY], "save_embedding_layers": False}
        self.shared.model.save_pretrained(str(out), **options)


ADAPTERS = {Role.policy: POLICY, Role.reference: REFERENCE, Role.value: VALUE}


@dataclass(frozen=True)
class SharedRewards:
    """A reward model whose members are adapters on the base that the roles share."""

    base: SharedBase
    names: tuple[str, ...]
    heads: tuple[torch.nn.Linear, ...]
    normalizations: tuple[reward_model.Normalization, ...]

    def members(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return rewards_MN: each member's own, normalised on its own, as ``RewardModel`` does."""
        found = []
        body = body_of(self.base.model.get_base_model())
        for name, head, normalization in zip(self.names, self.heads, self.normalizations, strict=True):
            with torch.no_grad(), self.base.on(name):
                raw_N = score_head.pooled(body, head, ids_NL, mask_NL)[:, 0]
            found.append(normalization.apply(raw_N))
        return torch.stack(found)


def body_of(model: Any) -> torch.nn.Module:
    """Return a model without its output head: what gives hidden states."""
    body: torch.nn.Module = model.base_model
    return body


def load(cfg: RunConfig, inputs: Mapping[str, Artifact], tokenizer: PreTrainedTokenizerBase) -> Roles:
    """Return the roles of a run, dropout off, ready on the run's device.

    Raises:
        ModelError: if weights cannot be loaded, or the reward model has another vocabulary.
        ConfigError: if the policy that comes in is an adapter and all weights are to be trained, or
            the value function cannot start from the reward model.
    """
    start = policy.incoming(cfg, inputs)
    policy.check_method(cfg, start)
    device = modeling.device(cfg)
    rewarded = inputs["reward_model"].path if cfg.ppo.reward is RewardKind.model else None
    if cfg.adapter.method is Method.full:
        return _separate(cfg, start, tokenizer, rewarded, device)
    return _shared(cfg, start, tokenizer, rewarded, device)


def _shared(
    cfg: RunConfig,
    start: Incoming,
    tokenizer: PreTrainedTokenizerBase,
    rewarded: Path | None,
    device: torch.device,
) -> Roles:
    base, fresh = policy.load(cfg, start, tokenizer)
    modeling.no_dropout(base)
    if start.adapter is not None:
        model = policy.continued(base, start.adapter)
    else:
        model = policy.with_fresh_adapter(base, cfg.adapter, start, fresh)
    valued = cfg.ppo.algorithm is Algorithm.ppo
    shared = SharedBase(model, (POLICY, VALUE) if valued else (POLICY,))
    members = [] if rewarded is None else reward_members(cfg, rewarded, tokenizer, start)
    names = tuple(f"{REWARD}_{number}" for number in range(len(members)))
    for name, member in zip(names, members, strict=True):
        shared.add(member.folder, name)
    hidden = modeling.weight_of(base.get_output_embeddings()).shape[1]
    head = _value_adapter(cfg, shared, start, members, hidden).to(device) if valued else None
    for name in (POLICY, VALUE, REFERENCE, *names):
        for weight in shared.weights(name).values():
            weight.data = weight.data.to(modeling.TORCH[cfg.adapter.dtype])
    modeling.no_dropout(model)
    if cfg.ppo.gradient_checkpointing:
        model.enable_input_require_grads()
        _checkpoint(cfg, base)
    model.set_adapter(POLICY)
    shared.flag()
    if cfg.adapter.method is not Method.qlora:  # 4 bits lie where they were loaded
        model.to(device)
    model.eval()
    modeling.cast_once(model, device.type)
    rewards: Rewards | None = None
    if members:
        heads = tuple(member.head.to(device) for member in members)
        rewards = SharedRewards(shared, names, heads, tuple(one.normalization for one in members))
    elif rewarded is not None:
        rewards = _own_reward(cfg, rewarded, tokenizer, device)
    whole = cast("PreTrainedModel", model.get_base_model())
    return Roles(shared, dict.fromkeys(Role, whole), head, rewards)


def shared_out(cfg: RunConfig) -> bool:
    """Say whether ranks share out the weights of the roles."""
    return in_force(cfg.launch)[0] is Strategy.fsdp


def _shard(cfg: RunConfig, model: torch.nn.Module) -> None:
    precision = cfg.launch.precision
    compute = None if precision is Precision.fp32 else modeling.TORCH[precision]
    sharding.fully_shard(model, cfg.launch.sharding, compute, hold=False, summed=True)


def _checkpoint(cfg: RunConfig, model: PreTrainedModel) -> None:
    kept = cfg.launch.offload_activations
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=kept)


def _value_adapter(
    cfg: RunConfig, shared: SharedBase, start: Incoming, members: Sequence[Member], hidden: int
) -> torch.nn.Linear:
    """Give the value function its adapter, and return its head.

    Args:
        hidden: size of what the head takes.
    """
    if _value_from_reward(cfg, bool(members)):
        shared.add(members[0].folder, VALUE)
        return _normalised_head(members[0].head, members[0].normalization)
    if start.adapter is not None:
        shared.add(start.adapter, VALUE)
    else:
        shared.model.add_adapter(VALUE, shared.model.peft_config[POLICY])
    return _zero(torch.nn.Linear(hidden, 1))


def _separate(
    cfg: RunConfig,
    start: Incoming,
    tokenizer: PreTrainedTokenizerBase,
    rewarded: Path | None,
    device: torch.device,
) -> Roles:
    trained = policy.load(cfg, start, tokenizer)[0]
    reference = policy.load(cfg, start, tokenizer)[0].requires_grad_(False)
    stated = reward_model.stated(rewarded, tokenizer)[0] if rewarded is not None else {}
    first = rewarded / next(iter(stated)) if rewarded is not None else None
    whole = first is not None and policy.found(first).adapter is None
    models = {Role.policy: trained, Role.reference: reference}
    head = None
    if cfg.ppo.algorithm is Algorithm.ppo:
        models[Role.value], head = _value_model(cfg, start, tokenizer, first if whole else None, stated)
    for role, model in models.items():
        modeling.no_dropout(model)
        model.eval()
        if shared_out(cfg):  # the value function's head is asked for by itself
            _shard(cfg, body_of(model) if role is Role.value else model)
        else:
            model.to(device)  # type: ignore[arg-type]
        if cfg.ppo.gradient_checkpointing and role is not Role.reference:
            _checkpoint(cfg, model)
    rewards = _own_reward(cfg, rewarded, tokenizer, device) if rewarded is not None else None
    if rewards is not None and shared_out(cfg):
        for scorer in rewards.models:
            _shard(cfg, scorer)
    return Roles(None, models, None if head is None else head.to(device), rewards)


def _value_model(
    cfg: RunConfig,
    start: Incoming,
    tokenizer: PreTrainedTokenizerBase,
    rewarded: Path | None,
    stated: Mapping[str, reward_model.Normalization],
) -> tuple[PreTrainedModel, torch.nn.Linear]:
    """Return the value function as a model of its own, and its head.

    Args:
        rewarded: a whole reward model that it may start from.
    """
    if _value_from_reward(cfg, rewarded is not None) and rewarded is not None:
        value = policy.load(cfg, policy.found(rewarded), tokenizer, scored=True)[0]
        name = score_head.name_of(value)
        getattr(value, name).float()
        reward_model.copy_head(rewarded, name, value)
        head = _normalised_head(getattr(value, name), next(iter(stated.values())))
    else:
        value = policy.load(cfg, start, tokenizer, scored=True)[0]
        name = score_head.name_of(value)
        head = _zero(torch.nn.Linear(getattr(value, name).in_features, 1))
    delattr(value, name)  # the head is by itself
    return value, head


def _own_reward(
    cfg: RunConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> reward_model.RewardModel:
    """Return the reward model as one of its own, held as when it was normalised."""
    say("the reward model has a base of its own in memory")
    return reward_model.load(
        folder,
        tokenizer,
        attention=str(cfg.model.attention),
        trust_remote_code=cfg.model.trust_remote_code,
        device=device,
    )


def _value_from_reward(cfg: RunConfig, possible: bool) -> bool:
    """Say whether the value function starts as the reward model, as InstructGPT's does (appendix C.4).

    Raises:
        ConfigError: if it is to and cannot.
    """
    asked = cfg.ppo.value_start
    if asked is ValueStart.reward and not possible:
        raise ConfigError(
            "ppo.value_start=reward needs a reward model on the base that is trained here, in the same "
            "form (an adapter of the same quantisation, or a whole model); set it to auto or policy."
        )
    return possible and asked is not ValueStart.policy


def _zero(head: torch.nn.Linear) -> torch.nn.Linear:
    """Start at V = 0, the mean of normalised scores (lm-human-preferences, policy.py: scale 0)."""
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
    return head


def _normalised_head(
    scored: torch.nn.Linear, normalization: reward_model.Normalization
) -> torch.nn.Linear:
    """Return a head that gives the normalised score: (w h + b - mean) / deviation."""
    head = _zero(torch.nn.Linear(scored.in_features, 1))
    with torch.no_grad():
        head.weight.copy_(scored.weight / normalization.deviation)
        bias = torch.zeros(1) if scored.bias is None else scored.bias
        head.bias.copy_((bias - normalization.mean) / normalization.deviation)
    return head
