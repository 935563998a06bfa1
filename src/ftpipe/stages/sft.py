"""Supervised fine-tuning: maximise log p(response | prompt) of the demonstrations.

All weights, LoRA (arXiv:2106.09685) or QLoRA (arXiv:2305.14314), trained by TRL's SFTTrainer on rows
whose masks were made by `prepare`. Losses are nats per learned token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig

from ftpipe import checkpoints, determinism, isolation, modeling, training
from ftpipe.artifacts import Artifact
from ftpipe.choices import Method, Part, Use
from ftpipe.config import RunConfig
from ftpipe.data import table
from ftpipe.data.packing import packs_of
from ftpipe.heldout import HeldOut
from ftpipe.logs import say
from ftpipe.sampling import Answers, asked
from ftpipe.sequences import Collate, Layout, Order, sequences
from ftpipe.tokenizer import NEW_TOKENS
from ftpipe.trace import Trace
from ftpipe.tracking import Tracker
from ftpipe.trainer import DemonstrationTrainer
from ftpipe.trainer_callbacks import Report

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read ``inputs["dataset"]``, write the tuned policy to ``out``, return final metrics.

    The policy is an adapter, or a whole model where all weights are trained, with its tokenizer.
    A killed run continues from its last checkpoint.

    Raises:
        ModelError: if the base model cannot be loaded.
        ConfigError: if a row is longer than the model's positions.
    """
    determinism.begin(cfg)
    dataset, base = inputs["dataset"].path, inputs.get("base_model")
    tokenizer = AutoTokenizer.from_pretrained(str(dataset / "tokenizer"))
    new: dict[str, int] = json.loads((dataset / NEW_TOKENS).read_text(encoding="utf-8"))
    demonstrations = Use.demonstrations
    train, validation = (table.read(dataset, demonstrations, p) for p in (Part.train, Part.validation))
    plan = packs_of(table.place(dataset, demonstrations, Part.train)) if cfg.data.packing else None
    fed = sequences(train, plan, cfg.sft.batch_size)
    trainer = make_trainer(cfg, base.path if base else None, train, fed, tokenizer, new.values(), out)
    model: PreTrainedModel = trainer.model  # type: ignore[assignment]
    training.check_positions(model, max(max(rows["length"], default=0) for rows in (train, validation)))
    trained, whole = modeling.trainable(model)
    say(f"{trained:,} of {whole:,} weights are trained ({trained / whole:.2%}), {len(train):,} rows")

    held_out = None
    if len(validation):
        micro = cfg.launch.micro_batch_size
        held_out = HeldOut(trainer, model, validation, tokenizer.pad_token_id, micro)
    if cfg.sft.samples and not len(validation):
        say("no sample answers: no rows are held out (data.validation=0)")
    prompts = asked(validation, demonstrations, cfg.sft.samples)
    answers = Answers(model, tokenizer, prompts, cfg.sft.sample_tokens)
    checkpoint = training.last_checkpoint(out, cfg.launch)
    before: dict[str, Any] = {}

    def first() -> None:
        if cfg.data.packing and trainer.shares_out:  # only now is the model on its device
            pack(trainer)
        before.update(_before(out, checkpoint is not None, held_out, answers))

    with ExitStack() as stack:
        tracker = None
        if trainer.is_world_process_zero():
            done = checkpoints.step_of(checkpoint) if checkpoint else 0
            tracker = stack.enter_context(Tracker(cfg, "sft", out, done))
        trainer.add_callback(Report(tracker, held_out, cfg.sft.eval_every))
        trace = Trace.of(cfg.tracking, out, trainer.args.process_index)
        metrics = training.train(trainer, checkpoint, trace, first)
        if held_out is not None:
            loss = held_out.loss()
            metrics["held_out_loss_before"] = before["held_out_loss"]
            metrics["held_out_loss"] = loss
            metrics["held_out_perplexity"] = math.exp(min(loss, 700.0))
        if tracker is not None:
            tracker.summary(metrics)
    trainer.accelerator.wait_for_everyone()  # a rank may still be writing its part of a checkpoint
    trainer.save_model(str(out))
    after = answers.give()
    if trainer.is_world_process_zero():
        answers.write(out / "samples.md", before["answers"], after)
        checkpoints.tidy(out)
    return metrics


def make_trainer(
    cfg: RunConfig,
    base: Path | None,
    rows: Dataset,
    fed: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    new: Collection[int],
    out: Path,
) -> DemonstrationTrainer:
    """Return TRL's trainer on the base model with its adapter, ready to train.

    Args:
        fed: the sequences of ``rows``.
        new: tokens that the base model does not know.

    Raises:
        ConfigError: if the model lets packed rows see each other.
    """
    model = modeling.load_base(cfg, base)
    fresh = modeling.add_rows(model, tokenizer, new)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    pad = int(tokenizer.pad_token_id)
    revision = None if base else cfg.model.revision
    trainer = DemonstrationTrainer(
        order=Order(fed["length"][:], cfg.seed, training.grouping(cfg.sft)),
        launch=cfg.launch,
        model=model,
        args=arguments(cfg, out),
        data_collator=Collate(rows, pad, Layout.padded),
        train_dataset=fed,
        processing_class=tokenizer,
        peft_config=modeling.adapter_config(cfg.adapter, model, revision, fresh),
    )
    trainer.remove_callback(PrinterCallback)  # Report prints the lines of a log
    policy: PreTrainedModel = trainer.model  # type: ignore[assignment]
    if cfg.adapter.method is not Method.full:
        if fresh:
            modeling.keep_to_rows(policy)
        # TRL casts QLoRA's adapter to bfloat16, whatever was asked for
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(modeling.TORCH[cfg.adapter.dtype])
    if cfg.data.packing and not trainer.shares_out:
        pack(trainer)
    return trainer


def pack(trainer: DemonstrationTrainer) -> None:
    """Lay batches out so that this model's packed rows do not see each other.

    Raises:
        ConfigError: if there is no such layout.
    """
    model: PreTrainedModel = trainer.model  # type: ignore[assignment]
    collate: Collate = trainer.data_collator  # type: ignore[assignment]
    layout = isolation.find_layout(model, collate.pad, trainer.compute_loss_context_manager())
    collate.lay_out(layout, model.dtype)


def arguments(cfg: RunConfig, out: Path) -> SFTConfig:
    """Return TRL's arguments: those of every training, and what the rows of this one need."""
    own: dict[str, Any] = {
        "neftune_noise_alpha": cfg.sft.neftune_alpha,
        "max_length": None,  # prepare has settled what happens to long rows
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(**training.arguments(cfg.sft, cfg.launch, cfg.seed, out), **own)


def _before(out: Path, resumed: bool, held_out: HeldOut | None, answers: Answers) -> dict[str, Any]:
    """Measure the untrained policy, or read what was measured before the run was interrupted."""
    measured = checkpoints.read_before(out) if resumed else None
    if measured is not None:
        return measured
    fresh = {"held_out_loss": held_out.loss() if held_out else None, "answers": answers.give()}
    if held_out:
        say(f"held-out loss {fresh['held_out_loss']:.4f} before training")
    if os.environ.get("RANK", "0") == "0":
        checkpoints.write_before(out, fresh)
    return fresh
