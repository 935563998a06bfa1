"""The keys of the stage ppo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ftpipe.choices import Algorithm, RewardKind, Scheduler, Start, ValueStart, Weighting
from ftpipe.errors import ConfigError, require
from ftpipe.training_config import TrainingConfig


@dataclass
class FunctionConfig:
    """A function that scores answers, by its name in ``ppo/functions.py``."""

    name: str | None = None  # length, words, presence, regex or exact_answer; null: none
    parameters: dict[str, Any] = field(default_factory=dict)  # what it takes, such as {target: 20}


@dataclass
class HealthConfig:
    """When a run is ended, its state saved, rather than trained on to nothing. NaN always ends it."""

    max_kl: float | None = 100.0  # nats of a whole answer from the reference; null: any
    min_entropy: float | None = 0.05  # of a token, as a share of the first rollout's; null: any
    min_eos_rate: float | None = 0.2  # of answers that end, as a share of the first's; null: any
    patience: int = 3  # rollouts in a row that must show it

    def check(self) -> None:
        kl = self.max_kl
        require(kl is None or kl > 0, "ppo.health.max_kl", kl, "above 0, or null")
        for key in ("min_entropy", "min_eos_rate"):
            value = getattr(self, key)
            require(value is None or 0 < value < 1, f"ppo.health.{key}", value, "in (0, 1), or null")
        require(self.patience >= 1, "ppo.health.patience", self.patience, "at least 1")


@dataclass
class PpoConfig(TrainingConfig):
    """Proximal policy optimisation (arXiv:1707.06347) of a language model.

    A step is one rollout and the updates on it: ``max_steps``, ``epochs`` (over the prompts) and the
    schedule of the learning rate count rollouts, ``batch_size`` counts answers.
    """

    group: ClassVar[str] = "ppo"

    learning_rate: float = 1e-5
    value_learning_rate: float | None = None  # of the value function; null: learning_rate
    epochs: float = 1.0
    batch_size: int = 64
    adam_epsilon: float = 1e-5  # Huang et al., "The N Implementation Details of RLHF with PPO"
    scheduler: Scheduler = Scheduler.linear
    log_every: int = 1
    start: Start = Start.policy  # policy: the stage before makes it; model: the run's base model
    # ppo: advantages by a value function; without one: rloo (arXiv:2402.14740), against the other
    # answers to the prompt; grpo (arXiv:2402.03300), by their mean and deviation, the KL in the loss.
    # gamma, lam and what concerns values are PPO's alone
    algorithm: Algorithm = Algorithm.ppo
    answers_per_prompt: int = 1  # of a rollout; rloo and grpo compare them, so they need 2 or more

    # what is rewarded
    reward: RewardKind = RewardKind.model  # model: of the stage reward; function: ppo.function
    function: FunctionConfig = field(default_factory=FunctionConfig)  # the reward, where it is one
    watch: FunctionConfig = field(default_factory=FunctionConfig)  # measured beside it, never rewarded
    ignore_gate: bool = False  # use a reward model that fails reward.gate
    score_clip: float | None = None  # scores are held within +- this; null: never
    missing_eos_penalty: float = 1.0  # off the score of an answer cut at max_new_tokens
    mask_truncated: bool = False  # nothing is learned from such answers
    whiten_rewards: bool = False  # rewards of tokens get variance 1 and keep their mean

    # rollout
    max_new_tokens: int = 128  # of an answer
    temperature: float = 1.0  # of sampling, and of every log-prob
    top_p: float = 1.0  # of the likeliest tokens, those that make up this share
    stop: list[str] = field(default_factory=list)  # tokens that end an answer besides eos
    generation_batch_size: int | None = None  # answers written at once by a rank; null: all of its share

    # the tie to the reference
    beta: float = 0.05  # weight of the KL penalty; where kl_target is set: the first one
    kl_target: float | None = None  # nats of a whole answer to steer to (arXiv:1909.08593); null: fixed
    kl_horizon: int = 10000  # answers over which an error of 1 would double beta

    # update
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # decay of the advantage's trace per token
    ppo_epochs: int = 4  # passes over a rollout
    minibatches: int = 1  # updates in each of them
    clip: float = 0.2  # of the ratio, around 1
    value_clip: float | None = 0.2  # of the value, around the rollout's; null: never
    value_weight: float = 0.1  # of the value loss
    entropy_weight: float = 0.0  # of the entropy bonus
    ptx_weight: float = 0.0  # of the loss on demonstrations, PPO-ptx (arXiv:2203.02155)
    target_kl: float | None = None  # nats per token from the rollout that end its updates; null: never
    weighting: Weighting = Weighting.tokens  # what weighs the same: tokens, or answers (GRPO's own)
    value_start: ValueStart = ValueStart.auto  # auto: the reward model where one is learned

    health: HealthConfig = field(default_factory=HealthConfig)
    samples: int = 3  # held-out prompts whose answers are written out over time

    def check(self) -> None:
        super().check()
        self.health.check()
        self._check_rewards()
        for key in ("max_new_tokens", "ppo_epochs", "minibatches", "kl_horizon"):
            self._require(key, getattr(self, key) >= 1, "at least 1")
        for key in ("beta", "value_weight", "entropy_weight", "ptx_weight", "samples"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        for key in ("value_learning_rate", "value_clip", "kl_target", "target_kl"):
            value = getattr(self, key)
            self._require(key, value is None or value > 0, "above 0, or null")
        at_once = self.generation_batch_size
        self._require("generation_batch_size", at_once is None or at_once >= 1, "at least 1, or null")
        self._require("temperature", self.temperature > 0, "above 0: an answer is a draw")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        for key in ("gamma", "lam"):
            self._require(key, 0 <= getattr(self, key) <= 1, "in [0, 1]")
        self._require("clip", 0 < self.clip < 1, "in (0, 1)")
        self._require("group_by_length", not self.group_by_length, "false: a rollout has any lengths")
        self._check_groups()
        steers = self.kl_target is not None
        self._require("beta", not steers or self.beta > 0, "above 0 where kl_target steers it")
        # Ziegler's controller moves by 0.2 of this at most: it must not reach 0
        moves = not steers or 0.2 * self.batch_size < self.kl_horizon
        self._require("kl_horizon", moves, f"above {0.2 * self.batch_size:g}, a fifth of ppo.batch_size")
        self._require(
            "minibatches", self.batch_size % self.minibatches == 0, "a divisor of ppo.batch_size"
        )

    def _check_groups(self) -> None:
        many, grouped = self.answers_per_prompt, self.algorithm is not Algorithm.ppo
        least = 2 if grouped else 1
        self._require("answers_per_prompt", many >= least, f"at least {least} for {self.algorithm}")
        self._require("answers_per_prompt", self.batch_size % many == 0, "a divisor of ppo.batch_size")
        self._require(
            "whiten_rewards", not (grouped and self.whiten_rewards), f"false for {self.algorithm}"
        )
        self._require(
            "value_start",
            not grouped or self.value_start is ValueStart.auto,
            f"auto for {self.algorithm}, which has no value function",
        )

    def _check_rewards(self) -> None:
        self._require("missing_eos_penalty", self.missing_eos_penalty >= 0, "0 or more")
        clip = self.score_clip
        self._require("score_clip", clip is None or clip > 0, "above 0, or null")
        by_function = self.reward is RewardKind.function
        if by_function and self.function.name is None:
            raise ConfigError("ppo.function.name is not set; ppo.reward=function needs one.")
        if not by_function and self.function.name is not None:
            raise ConfigError(
                f"ppo.function.name={self.function.name} would be read by nothing; set "
                "ppo.reward=function, or ppo.watch.name to measure it beside the reward model."
            )
        self._require(
            "value_start",
            not (by_function and self.value_start is ValueStart.reward),
            "auto or policy with ppo.reward=function",
        )

    def check_batch(self, micro_batch_size: int, processes: int, nodes: int = 1) -> None:
        """Refuse a rollout that leaves a rank without an answer; any other division is as good."""
        least = nodes * processes * self.minibatches
        self._require("batch_size", self.batch_size >= least, f"at least {least}, one for each rank")
