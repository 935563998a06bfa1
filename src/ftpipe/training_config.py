"""The stages that train: what they share (optimiser, schedule, batches), and what each adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ftpipe.choices import Normalize, Optimizer, PreferenceLoss, Scheduler, Start
from ftpipe.errors import ConfigError, require


@dataclass
class TrainingConfig:
    """How weights are trained, whatever the loss."""

    group: ClassVar[str] = ""  # the name of its group, for the sentences of check

    learning_rate: float = 2e-5  # at the end of warm-up
    epochs: float = 3.0  # passes over the data; unused when max_steps is set
    max_steps: int | None = None  # optimiser steps; null: from epochs
    batch_size: int = 16  # per optimiser step, over all devices: sft: rows (packed: sequences);
    # reward: prompts, each with all its replies; dpo: pairs (kto: replies)
    optimizer: Optimizer = Optimizer.adamw
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: never
    scheduler: Scheduler = Scheduler.cosine  # of the learning rate after warm-up
    warmup_ratio: float = 0.0  # share of all steps; unused when warmup_steps is set
    warmup_steps: int | None = None
    group_by_length: bool = False  # rows of similar length share a batch
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 0  # steps between measures on held-out rows; 0: only before and after
    save_every: int = 0  # steps between checkpoints; 0: none
    keep_checkpoints: int = 2  # the newest so many

    def check(self) -> None:
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("epochs", self.epochs > 0, "above 0")
        steps, warm = self.max_steps, self.warmup_steps
        self._require("max_steps", steps is None or steps >= 1, "at least 1, or null")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)")
        self._require("warmup_steps", warm is None or warm >= 0, "0 or more, or null")
        self._require("adam_epsilon", self.adam_epsilon > 0, "above 0")
        for key in ("adam_beta1", "adam_beta2"):
            self._require(key, 0 <= getattr(self, key) < 1, "in [0, 1)")
        for key in ("weight_decay", "max_grad_norm", "eval_every", "save_every"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        warms = bool(self.warmup_ratio if warm is None else warm)
        self._require(
            "scheduler",
            not (self.scheduler is Scheduler.constant and warms),
            "constant_with_warmup where there is a warm-up, which constant ignores",
        )
        for key in ("log_every", "keep_checkpoints"):
            self._require(key, getattr(self, key) >= 1, "at least 1")

    def check_batch(self, micro_batch_size: int, processes: int, nodes: int = 1) -> None:
        """Refuse a batch that the ranks cannot share out."""
        if self.batch_size % (micro_batch_size * processes * nodes):
            over = f" x {nodes} nodes" if nodes > 1 else ""
            raise ConfigError(
                f"{self.group}.batch_size={self.batch_size} is not a multiple of "
                f"launch.micro_batch_size={micro_batch_size} x launch.processes={processes}{over}; "
                "choose values that divide it."
            )

    def _require(self, key: str, holds: bool, allowed: str) -> None:
        require(holds, f"{self.group}.{key}", getattr(self, key), allowed)


@dataclass
class SftConfig(TrainingConfig):
    """Supervised fine-tuning."""

    group: ClassVar[str] = "sft"

    neftune_alpha: float | None = None  # noise on embeddings (arXiv:2310.05914), such as 5
    samples: int = 3  # held-out prompts answered before and after
    sample_tokens: int = 64  # length of those answers, greedy

    def check(self) -> None:
        super().check()
        noise = self.neftune_alpha
        self._require("neftune_alpha", noise is None or noise > 0, "above 0, or null")
        self._require("samples", self.samples >= 0, "0 or more")
        self._require("sample_tokens", self.sample_tokens >= 1, "at least 1")


@dataclass
class GateConfig:
    """What the reward report must show before PPO may use the model."""

    confidence: float = 0.95  # of the interval of the held-out accuracy
    min_accuracy: float = 0.5  # the interval's lower end must be above it; 0.5 is chance
    max_length_correlation: float = 0.5  # of reward with length within a prompt, either sign

    def check(self) -> None:
        for key, low, high in (
            ("confidence", 0.5, 1.0),
            ("min_accuracy", 0.0, 1.0),
            ("max_length_correlation", 0.0, 1.0),
        ):
            value = getattr(self, key)
            inside = low <= value < high if key == "confidence" else low <= value <= high
            end = ")" if key == "confidence" else "]"
            require(inside, f"reward.gate.{key}", value, f"in [{low:g}, {high:g}{end}")


@dataclass
class RewardConfig(TrainingConfig):
    """A reward model, learned from ranked replies."""

    group: ClassVar[str] = "reward"

    learning_rate: float = 1e-5
    epochs: float = 1.0
    start: Start = Start.policy  # policy: the stage before makes it; model: the run's base model
    margin: float = 0.0  # asks for a reward difference of this times the score difference
    l2: float = 0.0  # Open-Assistant's term, times the mean of both squared rewards of a pair
    center: float = 0.0  # times the squared sum of a pair's rewards (arXiv:2312.09244)
    ensemble: int = 1  # models of as many seeds; their spread is reported as disagreement
    normalize: Normalize = Normalize.chosen  # the held-out replies that get mean 0 and deviation 1
    gate: GateConfig = field(default_factory=GateConfig)

    def check(self) -> None:
        super().check()
        for key in ("margin", "l2", "center"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        self._require("ensemble", 1 <= self.ensemble <= 16, "from 1 to 16")
        self.gate.check()


# Losses that are given no reference.
REFERENCE_FREE = (PreferenceLoss.orpo, PreferenceLoss.simpo)
# Losses that read dpo.label_smoothing.
SMOOTHED = (PreferenceLoss.sigmoid, PreferenceLoss.robust, PreferenceLoss.exo_pair)


@dataclass
class DpoConfig(TrainingConfig):
    """Direct preference optimisation (arXiv:2305.18290) and its family."""

    group: ClassVar[str] = "dpo"

    learning_rate: float = 5e-7
    epochs: float = 1.0
    start: Start = Start.policy  # policy: the stage before makes it; model: the run's base model
    loss: PreferenceLoss = PreferenceLoss.sigmoid  # preferences/losses.py has their equations
    beta: float = 0.1  # strength of the tie to the reference (ipo: tau; orpo: lambda)
    label_smoothing: float = 0.0  # share of labels taken to be wrong: sigmoid (cDPO), robust, exo_pair
    gamma: float = 0.5  # simpo: the margin asked for (arXiv:2405.14734)
    discopop_tau: float = 0.05  # discopop: temperature of the blend (arXiv:2406.08414)
    desirable_weight: float = 1.0  # kto: lambda of wanted replies (arXiv:2402.01306)
    undesirable_weight: float = 1.0  # kto: lambda of unwanted replies
    sft_weight: float = 0.0  # RPO: times the chosen reply's mean nats per token (arXiv:2404.19733)
    r: int | None = None  # rank of a fresh adapter, on a policy that is a whole model; null: adapter.r
    alpha: int | None = None  # and its alpha; null: adapter.alpha
    samples: int = 3  # held-out prompts answered before and after
    sample_tokens: int = 64  # length of those answers, greedy

    def check(self) -> None:
        super().check()
        self._require("beta", self.beta > 0, "above 0")
        smoothing, smoothed = self.label_smoothing, self.loss in SMOOTHED
        if self.loss is PreferenceLoss.exo_pair:
            self._require(
                "label_smoothing", 0 < smoothing < 0.5, "in (0, 0.5) for exo_pair, such as 1e-3"
            )
        else:
            allowed = "in [0, 0.5)" if smoothed else f"0 for {self.loss}, which does not read it"
            self._require("label_smoothing", 0 <= smoothing < (0.5 if smoothed else 1e-12), allowed)
        for key in ("gamma", "sft_weight", "samples"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        no_chosen = self.loss is PreferenceLoss.kto and self.sft_weight > 0
        self._require("sft_weight", not no_chosen, "0 for kto, which has no chosen reply")
        self._require("discopop_tau", 0 < self.discopop_tau <= 1, "in (0, 1]")
        for key in ("desirable_weight", "undesirable_weight"):
            self._require(key, getattr(self, key) > 0, "above 0")
        for key in ("r", "alpha"):
            value = getattr(self, key)
            self._require(key, value is None or value >= 1, "at least 1, or null")
        self._require("sample_tokens", self.sample_tokens >= 1, "at least 1")
