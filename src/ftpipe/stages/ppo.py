"""Proximal policy optimisation: raise the reward of the policy's own answers, near its reference.

``ppo/trainer.py`` has the steps with their sources. One base serves policy, reference, value function
and reward model as adapters (``ppo/roles.py``); scores come from the reward model, or from a function
(``ppo.reward=function``).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, Trainer, TrainingArguments, get_scheduler

from ftpipe import checkpoints, determinism, modeling, policy, sharding, training
from ftpipe.artifacts import Artifact, write_atomic
from ftpipe.choices import Device, Part, Precision, RewardKind, Use
from ftpipe.config import RunConfig
from ftpipe.data import table
from ftpipe.errors import ConfigError, DataError, ModelError
from ftpipe.logs import say
from ftpipe.ppo import functions, plots
from ftpipe.ppo.ptx import Demonstrations
from ftpipe.ppo.roles import Role, Roles, load, shared_out
from ftpipe.ppo.trainer import PpoTrainer, held_out
from ftpipe.ppo.update import Ranks, Updater
from ftpipe.reward import gate
from ftpipe.sampling import markdown
from ftpipe.sequences import Order
from ftpipe.trace import Trace
from ftpipe.tracking import Tracker
from ftpipe.trainer_callbacks import in_words

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HELD_OUT = "held_out"  # the folder of answers to held-out prompts, a file for each time


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read ``inputs["dataset"]`` and the policy that comes in, write the trained policy to ``out``.

    The policy is an adapter, or a whole model where all weights are trained, with its tokenizer. A
    killed run continues from its last checkpoint, with the same result.

    Args:
        inputs: with ``reward_model``, unless the reward is a function.

    Raises:
        ModelError: if weights cannot be loaded, or the reward model fails its gate.
        ConfigError: if a prompt and its answer are longer than the model's positions, or a reward
            function has other parameters.
        DataError: if there are no prompts, or a reward function fails.
        HealthError: if the training goes wrong; its state is saved.
    """
    determinism.begin(cfg)
    for function in (cfg.ppo.function, cfg.ppo.watch):
        if function.name is not None:
            functions.named(function.name, function.parameters)
    if cfg.ppo.reward is RewardKind.model:
        check_gate(cfg, inputs["reward_model"].path)
    dataset = inputs["dataset"].path
    validation = table.read(dataset, Use.prompts, Part.validation)
    validation = validation.select(range(min(len(validation), cfg.ppo.batch_size)))
    trainer = make_trainer(cfg, inputs, validation, out)
    roles, first = trainer.roles, trainer.ranks.rank == 0
    for role in (Role.policy, Role.value):
        if weights := roles.trained(role).values():
            say(f"{sum(map(torch.numel, weights)):,} weights of the {role} are trained")
    trainer.resume()
    with ExitStack() as stack:
        tracker = None
        if first:
            tracker = stack.enter_context(Tracker(cfg, "ppo", out, trainer.progress.rollouts))
        shown = Shown(cfg, trainer, validation, tracker, out, trainer.progress.rollouts)
        before = shown.measure(0)
        metrics = trainer.train(shown.rollout, shown.measure)
        metrics |= {f"{name}_before": value for name, value in before.items()}
        metrics |= shown.measure(trainer.rollouts) | training.peak_gpu_memory()
        if tracker is not None:
            tracker.summary(metrics)
            shown.conclude(trainer.rollouts)
            tracker.images({plots.CURVES.removesuffix(".png"): out / plots.CURVES})
    roles.save(out, first)
    if first:
        trainer.tokenizer.save_pretrained(str(out))
        shutil.rmtree(trainer.checkpoints, ignore_errors=True)  # they served a resume alone
    return metrics


def make_trainer(
    cfg: RunConfig, inputs: Mapping[str, Artifact], validation: Dataset, out: Path
) -> PpoTrainer:
    """Return the trainer of a run, at its first rollout.

    Raises:
        ModelError, ConfigError, DataError: as ``run`` does.
    """
    dataset = inputs["dataset"].path
    prompts = table.read(dataset, Use.prompts, Part.train)
    if not len(prompts):
        raise DataError("no prompts are left to train on; hold out fewer rows (data.validation).")
    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    stops = stop_tokens(cfg, tokenizer)
    check_positions(cfg, inputs, max([*prompts["length"][:], *validation["length"][:]]))
    roles = load(cfg, inputs, tokenizer)
    updater, schedule, steps = make_updater(cfg, roles, tokenizer, len(prompts), out)
    if cfg.ppo.ptx_weight:
        updater.ptx = Demonstrations.of(dataset, updater).gradients
    return PpoTrainer(
        updater=updater,
        tokenizer=tokenizer,
        prompts=prompts,
        order=Order(prompts["length"][:], cfg.seed),
        stops=stops,
        rollouts=steps,
        schedule=schedule,
        checkpoints=out / checkpoints.CHECKPOINTS,
        trace=Trace.of(cfg.tracking, out, updater.ranks.rank),
    )


def check_gate(cfg: RunConfig, folder: Path) -> None:
    """Refuse a reward model that fails its gate, unless it is wanted by name.

    Raises:
        ModelError: with what its report shows.
    """
    verdict = gate.read(folder, cfg.reward.gate)
    if verdict.passed:
        return
    why = " ".join(verdict.failures)
    if not cfg.ppo.ignore_gate:
        raise ModelError(
            f"the reward model {folder} fails its gate: {why} PPO would raise a reward that says "
            "little; set ppo.ignore_gate=true to use it all the same."
        )
    say(f"the reward model fails its gate, which ppo.ignore_gate=true lets pass: {why}")


def check_positions(cfg: RunConfig, inputs: Mapping[str, Artifact], longest: int) -> None:
    """Refuse prompts whose answers would run past the positions that the model knows.

    Args:
        longest: tokens of the longest prompt.

    Raises:
        ConfigError: naming the length that fits.
        ModelError: if the model's configuration cannot be read.
    """
    start = policy.incoming(cfg, inputs)
    config = modeling.text_config(start.weights, start.revision, cfg.model.trust_remote_code)
    known = modeling.positions(config)
    if known is not None and longest + cfg.ppo.max_new_tokens > known:
        fits = known - longest
        raise ConfigError(
            f"a prompt has {longest:,} tokens, and with ppo.max_new_tokens={cfg.ppo.max_new_tokens:,} "
            f"its answer would run past the {known:,} positions of the model; "
            + (
                f"set ppo.max_new_tokens to {fits:,} at most."
                if fits > 0
                else f"set data.max_length below {known:,}."
            )
        )


def stop_tokens(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: eos and ``ppo.stop``.

    Raises:
        ConfigError: if a stop is not one token of the tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    for text in cfg.ppo.stop:
        if text not in vocabulary:
            raise ConfigError(
                f"ppo.stop: {text!r} is no token of the tokenizer; give tokens such as "
                f"{tokenizer.eos_token!r} (which ends an answer in any case)."
            )
    return frozenset({int(tokenizer.eos_token_id), *(vocabulary[text] for text in cfg.ppo.stop)})


def make_updater(
    cfg: RunConfig, roles: Roles, tokenizer: PreTrainedTokenizerBase, prompts: int, out: Path
) -> tuple[Updater, Any, int]:
    """Return what updates the roles, the schedule of its learning rate, and how many rollouts there are.

    Args:
        prompts: how many there are.
    """
    ppo, precision = cfg.ppo, cfg.launch.precision
    steps = ppo.max_steps or math.ceil(ppo.epochs * prompts * ppo.answers_per_prompt / ppo.batch_size)
    given = training.arguments(ppo, cfg.launch, cfg.seed, out)
    # micro-batches are our own; transformers' optimiser and schedule are what is wanted
    arguments = TrainingArguments(**{**given, "gradient_accumulation_steps": 1})
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    rates = {Role.policy: ppo.learning_rate, Role.value: ppo.value_learning_rate or ppo.learning_rate}
    groups = [
        {"params": weights, "lr": rate, "weight_decay": ppo.weight_decay}
        for role, rate in rates.items()
        for weights in sharding.alike(roles.trained(role).values())
    ]
    optimizer = kind(groups, **options)
    warmup = arguments.get_warmup_steps(steps)
    # a warm-up begins at 0, at which a whole rollout would teach nothing: the first one is left out
    ahead = 1 if warmup else 0
    schedule = get_scheduler(str(ppo.scheduler), optimizer, warmup, num_training_steps=steps + ahead)
    if ahead:
        given_by = schedule.lr_lambdas[0]
        schedule = LambdaLR(optimizer, lambda rollout: given_by(rollout + ahead))
    where = PartialState(cpu=cfg.launch.device is Device.cpu)

    def autocast() -> torch.autocast:
        whole = precision is Precision.fp32
        return torch.autocast(roles.device.type, modeling.TORCH[precision], enabled=not whole)

    updater = Updater(
        roles=roles,
        optimizer=optimizer,
        ppo=ppo,
        seed=cfg.seed,
        micro_batch=cfg.launch.micro_batch_size,
        precision=precision,
        autocast=autocast,
        ranks=Ranks(where.process_index, where.num_processes, shared_out(cfg)),
        pad=int(tokenizer.pad_token_id),
    )
    return updater, schedule, steps


@dataclass(frozen=True)
class Shown:
    """What a person sees of a run: lines, metrics, held-out answers over time, curves.

    Attributes:
        tracker: of the first rank.
        done: rollouts that an interrupted run left, from which this one goes on.
        measured: of held-out prompts by this process, by how many rollouts came before.
    """

    cfg: RunConfig
    trainer: PpoTrainer
    validation: Dataset
    tracker: Tracker | None
    out: Path
    done: int
    measured: dict[int, dict[str, float]] = field(default_factory=dict)

    def rollout(self, number: int, shown: dict[str, float]) -> None:
        """Show one rollout's measures."""
        if self.tracker is None:
            return
        self.tracker.log(number, shown)
        if number % self.cfg.ppo.log_every and number != self.trainer.rollouts:
            return
        watched = f"  watched {shown['watched']:.4f}" if "watched" in shown else ""
        times = " + ".join(
            f"{shown[f'seconds_{part}']:.1f}" for part in ("rollout", "scoring", "update")
        )
        say(
            f"rollout {number}/{self.trainer.rollouts}  score {shown['score']:.4f}{watched}  "
            f"kl {shown['kl']:.4f}  length {shown['length']:.1f}  ended {shown['eos_rate']:.0%}  "
            f"entropy {shown['entropy']:.3f}  clipped {shown['clip_fraction']:.1%}  {times} s"
        )

    def measure(self, number: int) -> dict[str, float]:
        """Measure held-out prompts after so many rollouts, or return what was measured then."""
        if not len(self.validation):
            return {}
        if number in self.measured:
            return self.measured[number]
        path = self._answers(number)
        if path.is_file() and number <= self.done:  # a later one's line is dropped from the metrics
            known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["measures"]
            return known
        found = held_out(self.trainer, self.validation)
        measures: dict[str, float] = found["measures"]
        if self.tracker is not None:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            self.tracker.log(number, measures)
            say(f"after {number} rollouts: {in_words(measures)}")
        self.measured[number] = measures
        return measures

    def _answers(self, number: int) -> Path:
        return self.out / HELD_OUT / f"rollout-{number}.json"

    def conclude(self, steps: int) -> None:
        """Draw the curves, and write the first prompts with their answers before and after."""
        plots.write(self.out)
        if not len(self.validation) or not self.cfg.ppo.samples:
            return
        before, after = (
            json.loads(self._answers(number).read_text(encoding="utf-8"))["answers"]
            for number in (0, steps)
        )
        shown = [
            {
                "Prompt": old["prompt"],
                f"Before (score {old['score']:.3f})": old["answer"],
                f"After (score {new['score']:.3f})": new["answer"],
            }
            for old, new in list(zip(before, after, strict=True))[: self.cfg.ppo.samples]
        ]
        write_atomic(self.out / "samples.md", markdown(shown))
