"""Direct preference optimisation and its family: learn from preferences without a reward model.

DPO (arXiv:2305.18290) raises log p(chosen) over log p(rejected), both measured against a reference: the
policy exactly as it comes in. ``preferences/losses.py`` has the equation of every loss. Rewards are
beta log(p / p_reference), in nats.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments

from ftpipe import checkpoints, determinism, modeling, policy, sharding, training
from ftpipe.artifacts import Artifact
from ftpipe.choices import Method, Part, PreferenceLoss, Strategy, Use
from ftpipe.config import RunConfig
from ftpipe.data import table
from ftpipe.errors import ModelError
from ftpipe.logs import say
from ftpipe.preferences import batches, logps, reference
from ftpipe.preferences import policy as preference_policy
from ftpipe.preferences.heldout import HeldOutPreferences
from ftpipe.preferences.trainer import PreferenceTrainer
from ftpipe.sampling import Answers, asked
from ftpipe.sequences import Order
from ftpipe.trace import Trace
from ftpipe.tracking import Tracker
from ftpipe.trainer_callbacks import Report, in_words
from ftpipe.training_config import REFERENCE_FREE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nats per token that a policy may differ from its own reference before the first step. Rounding of
# 16-bit weights under another padding reaches a few thousandths; another policy is far beyond.
SAME = 0.02
CHECKED = 16  # rows of that check


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read ``inputs["dataset"]`` and the policy that comes in, write the aligned policy to ``out``.

    The policy is an adapter, or a whole model where all weights are trained, with its tokenizer. A
    killed run continues from its last checkpoint.

    Args:
        inputs: with ``reference_logps``, the reference's log-probs are read, not computed.

    Raises:
        ModelError: if the policy cannot be loaded, or is not its own reference at the start.
        ConfigError: if a row is longer than the model's positions.
        DataError: if kto is given answers to one prompt only.
    """
    determinism.begin(cfg)
    dataset = inputs["dataset"].path
    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    use = Use.unpaired if cfg.dpo.loss is PreferenceLoss.kto else Use.preferences
    known = inputs.get("reference_logps")
    parts = {
        part: Rows.of(cfg, dataset, use, part, known.path if known else None, tokenizer.pad_token_id)
        for part in (Part.train, Part.validation)
    }
    train, validation = parts[Part.train], parts[Part.validation]
    start = policy.incoming(cfg, inputs)
    trainer, model = make_trainer(cfg, start, train, tokenizer, known is not None, out)
    training.check_positions(model, max(rows.longest for rows in parts.values()))
    trained, whole = modeling.trainable(model)
    say(
        f"{trained:,} of {whole:,} weights are trained ({trained / whole:.2%}), {len(train.rows):,} rows"
    )

    held_out = None
    if len(validation.rows):
        micro = cfg.launch.micro_batch_size
        held_out = HeldOutPreferences(trainer, validation.units(1), validation.collate, micro)
    elif cfg.dpo.samples:
        say("no sample answers: no rows are held out (data.validation=0)")
    prompts = asked(validation.rows, use, cfg.dpo.samples)
    answers = Answers(model, tokenizer, prompts, cfg.dpo.sample_tokens)
    checkpoint = training.last_checkpoint(out, cfg.launch)
    before: dict[str, Any] = {}

    def first() -> None:
        if checkpoint is None and cfg.dpo.loss not in REFERENCE_FREE:
            check_reference(trainer, train)
        before.update(_before(out, checkpoint is not None, held_out, answers))

    with ExitStack() as stack:
        tracker = None
        if trainer.is_world_process_zero():
            done = checkpoints.step_of(checkpoint) if checkpoint else 0
            tracker = stack.enter_context(Tracker(cfg, "dpo", out, done))
        trainer.add_callback(Report(tracker, held_out, cfg.dpo.eval_every))
        trace = Trace.of(cfg.tracking, out, trainer.args.process_index)
        metrics = training.train(trainer, checkpoint, trace, first)
        if held_out is not None:
            metrics |= {f"{name}_before": value for name, value in before["held_out"].items()}
            metrics |= held_out.measure()
        if tracker is not None:
            tracker.summary(metrics)
    trainer.accelerator.wait_for_everyone()  # a rank may still be writing its part of a checkpoint
    trainer.save_model(str(out))
    after = answers.give()
    if trainer.is_world_process_zero():
        answers.write(out / "samples.md", before["answers"], after)
        checkpoints.tidy(out)
    return metrics


@dataclass(frozen=True)
class Rows:
    """The rows of one part, and what makes batches of them."""

    rows: Dataset
    use: Use
    collate: batches.CollatePairs | batches.CollateSingles

    @classmethod
    def of(
        cls, cfg: RunConfig, dataset: Path, use: Use, part: Part, known: Path | None, pad: int
    ) -> Rows:
        rows = table.read(dataset, use, part)
        # first: it refuses rows that `reference` left out
        partners = batches.partners(rows, cfg.seed) if use is Use.unpaired else None
        read = reference.read(known, use, part) if known else None
        if partners is not None:
            return cls(rows, use, batches.CollateSingles(rows, partners, read, pad))
        return cls(rows, use, batches.CollatePairs(rows, read, pad))

    @property
    def longest(self) -> int:
        return max(self.rows["length"][:], default=0)

    def units(self, multiple: int) -> Dataset:
        """Return what an optimiser step counts: pairs, or single replies."""
        listed = batches.singles if self.use is Use.unpaired else batches.pairs
        return listed(self.rows, multiple)


def make_trainer(
    cfg: RunConfig,
    start: policy.Incoming,
    train: Rows,
    tokenizer: PreTrainedTokenizerBase,
    known: bool,
    out: Path,
) -> tuple[PreferenceTrainer, PreTrainedModel]:
    """Return the trainer of the policy that comes in, and the policy.

    Args:
        known: whether batches bring the reference's log-probs.

    Raises:
        ModelError, ConfigError: if the policy cannot be loaded, or not be trained so.
    """
    free = cfg.dpo.loss in REFERENCE_FREE
    loaded = preference_policy.load(cfg, start, tokenizer, copy=not free and not known)
    units = train.units(cfg.dpo.batch_size)
    trainer = PreferenceTrainer(
        order=Order(units["length"][:], cfg.seed, training.grouping(cfg.dpo)),
        launch=cfg.launch,
        dpo=cfg.dpo,
        reference=None,
        model=loaded.model,
        args=TrainingArguments(**training.arguments(cfg.dpo, cfg.launch, cfg.seed, out)),
        data_collator=train.collate,
        train_dataset=units,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # Report prints the lines of a log
    autocast = trainer.compute_loss_context_manager
    if free or known:
        pass
    elif cfg.adapter.method is not Method.full:
        adapted: Any = loaded.model
        trainer.reference = logps.adapter_reference(adapted, autocast)
    elif loaded.frozen is not None:
        frozen: torch.nn.Module = loaded.frozen
        if trainer.strategy is Strategy.fsdp:
            sharding.fully_shard(frozen, cfg.launch.sharding, trainer.compute)
        else:
            frozen.to(trainer.args.device)
        trainer.reference = logps.model_reference(frozen, autocast)
    return trainer, loaded.model


def check_reference(trainer: PreferenceTrainer, train: Rows) -> None:
    """Refuse a reference that is not the policy before its first step.

    Raises:
        ModelError: with the difference in nats per token.
    """
    units = train.units(1)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    micro, apart = trainer.args.per_device_train_batch_size, 0.0
    for at in range(0, min(CHECKED, len(units)), micro):
        batch = train.collate(list(units.select(range(at, min(at + micro, len(units))))))
        inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
        ref_N = trainer.reference_logps(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            policy_N = logps.reply_logps(model, inputs)
        apart_N = (policy_N - ref_N).abs() / inputs["reply_tokens"].clamp(min=1)
        apart = float(apart_N.nan_to_num(nan=math.inf).max().clamp(min=apart))
    if apart > SAME:
        raise ModelError(
            f"the reference is not the policy that comes in: they differ by {apart:.4f} nats per token "
            f"before the first step (at most {SAME} is rounding); if 'reference' ran elsewhere, delete "
            "its artifact and run it here."
        )
    say(f"policy and reference differ by {apart:.1e} nats per token before the first step")


def _before(
    out: Path, resumed: bool, held_out: HeldOutPreferences | None, answers: Answers
) -> dict[str, Any]:
    """Measure the policy as it came in, or read what was measured before an interruption."""
    measured = checkpoints.read_before(out) if resumed else None
    if measured is not None:
        return measured
    measures = held_out.measure() if held_out else {}
    fresh = {"held_out": measures, "answers": answers.give()}
    if measures:
        say(f"before training: {in_words(measures)}")
    if os.environ.get("RANK", "0") == "0":
        checkpoints.write_before(out, fresh)
    return fresh
