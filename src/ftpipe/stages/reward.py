"""A reward model: a score of replies that ranks them as people did.

Ouyang et al. 2022 (arXiv:2203.02155, section 3.5): the policy with a score in place of its output head,
trained on all pairs of the replies to a prompt at once. The rewards are then normalised on held-out
replies (Ziegler et al. 2019), and what the model knows is reported on prompts it has not seen.

Shapes: M members of an ensemble, N replies.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments

from ftpipe import checkpoints, modeling, policy, training
from ftpipe.artifacts import Artifact, write_atomic
from ftpipe.choices import Device, Normalize, Part, Use
from ftpipe.config import RunConfig
from ftpipe.data import table
from ftpipe.errors import ConfigError, DataError
from ftpipe.logs import say
from ftpipe.reward import batches, gate, model, report
from ftpipe.reward.heldout import (
    HeldOut,
    Replies,
    Scorer,
    of_demonstrations,
    of_groups,
    pairs_of,
)
from ftpipe.reward.model import Normalization
from ftpipe.reward.trainer import RewardTrainer
from ftpipe.sequences import Order, sequences
from ftpipe.trace import Trace
from ftpipe.tracking import Tracker
from ftpipe.trainer_callbacks import Report, in_words

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftpipe.policy import Incoming
    from ftpipe.reward.gate import Verdict
    from ftpipe.reward.measures import Floats, Measures
    from ftpipe.training_config import RewardConfig

TRAINED = "trained.json"  # of a finished member: its metrics and the raw rewards the rest is made from


@dataclass(frozen=True)
class Inputs:
    """What every member is trained from and measured on.

    Attributes:
        anchors: the replies whose rewards get mean 0 and deviation 1.
        of: which ones they are, in words.
    """

    start: Incoming
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Mapping[Part, Dataset]  # validation, be it empty, and test if there are any
    anchors: Replies
    of: str


def run(cfg: RunConfig, inputs: Mapping[str, Artifact], out: Path) -> dict[str, float]:
    """Read ``inputs["dataset"]``, write the reward model and its report to ``out``, return metrics.

    One model lies in ``out`` itself, those of an ensemble in ``member-0``, ``member-1``, ... A killed
    run continues from its last checkpoint, past the members that are trained. The gate's verdict is in
    the report and the metrics; it ends nothing here.

    Raises:
        ModelError: if the weights that come in cannot be loaded, or all rewards are equal.
        ConfigError: if a row is longer than the model's positions, or there are no rows of the kind that
            ``reward.normalize`` (two at least) or ``reward.margin`` asks for.
        DataError: if there is no pair of replies to learn from.
    """
    found = _inputs(cfg, inputs)
    reward = cfg.reward
    if not len(pairs_of(found.train)):
        raise DataError(
            "no prompt of the dataset's train part has replies of different rank; "
            "let a source of preferences serve it (data.sources.NAME.part), or hold out fewer rows."
        )
    missing = batches.without_scores(found.train, reward.margin) if reward.margin else 0
    if missing:
        say(f"{missing:,} of {len(found.train):,} prompts have replies without scores: no margin there")
    single = reward.ensemble == 1
    folders = [out] if single else [out / f"member-{k}" for k in range(reward.ensemble)]
    members = []
    with ExitStack() as stack:
        for number, folder in enumerate(folders):
            if not single:
                say(f"{folder.name} of {reward.ensemble}, seed {cfg.seed + number}")
            checkpoint = training.last_checkpoint(folder, cfg.launch)
            with ExitStack() as own:
                tracker = (stack if single else own).enter_context(_tracker(cfg, folder, checkpoint))
                members.append(_member(cfg, found, cfg.seed + number, folder, checkpoint, tracker))
            gc.collect()  # the next one needs the memory
        if not single:
            tracker = stack.enter_context(_tracker(cfg, out, None))
        # the first rank takes away what says that a member is trained: all must have seen it
        PartialState(cpu=cfg.launch.device is Device.cpu).wait_for_everyone()
        metrics = _conclude(cfg, found, dict(zip(folders, members, strict=True)), out, tracker)
    return metrics


def _inputs(cfg: RunConfig, inputs: Mapping[str, Artifact]) -> Inputs:
    dataset = inputs["dataset"].path
    parts = {part: table.read(dataset, Use.preferences, part) for part in (Part.train, Part.validation)}
    test = table.place(dataset, Use.preferences, Part.test)
    if test.is_file() and len(table.read(dataset, Use.preferences, Part.test)):
        parts[Part.test] = table.read(dataset, Use.preferences, Part.test)
    part = Part.validation if len(parts[Part.validation]) else Part.train
    kind = cfg.reward.normalize
    if kind is Normalize.demonstrations:
        anchors, part = _demonstrations(dataset)
    else:
        anchors = of_groups(parts[part], best=kind is Normalize.chosen)
    if len(anchors.lengths) < 2:
        raise ConfigError(
            f"reward.normalize={kind} finds {_replies(len(anchors.lengths))} ({part}), and a deviation "
            "needs two; hold out more (data.validation), or let reward.normalize name other replies."
        )
    return Inputs(
        start=policy.incoming(cfg, inputs),
        tokenizer=AutoTokenizer.from_pretrained(str(dataset / "tokenizer")),
        train=parts[Part.train],
        held_out={part: rows for part, rows in parts.items() if part is not Part.train},
        anchors=anchors,
        of=f"{kind}, {part}",
    )


def _replies(count: int) -> str:
    return "1 reply" if count == 1 else f"{count} replies"


def _demonstrations(dataset: Path) -> tuple[Replies, Part]:
    for part in (Part.validation, Part.train):
        if table.place(dataset, Use.demonstrations, part).is_file():
            rows = table.read(dataset, Use.demonstrations, part)
            if len(rows):
                return of_demonstrations(rows), part
    raise ConfigError(
        "reward.normalize=demonstrations, but the dataset has none; let a source serve them "
        "(data.sources.NAME.use), or set reward.normalize=chosen."
    )


@contextmanager
def _tracker(cfg: RunConfig, folder: Path, checkpoint: Path | None) -> Iterator[Tracker | None]:
    """Open the tracker of a folder on the first rank; lines after its last checkpoint are dropped."""
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    folder.mkdir(exist_ok=True)
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    if (folder / TRAINED).is_file():
        done = int(json.loads((folder / TRAINED).read_text())["metrics"]["steps"])
    with Tracker(cfg, "reward", folder, done) as tracker:
        yield tracker


def _member(
    cfg: RunConfig,
    found: Inputs,
    seed: int,
    folder: Path,
    checkpoint: Path | None,
    tracker: Tracker | None,
) -> dict[str, Any]:
    """Train one model into ``folder``, unless it is there; return its metrics and raw rewards."""
    if (folder / TRAINED).is_file():
        say("trained already")
        finished: dict[str, Any] = json.loads((folder / TRAINED).read_text())
        return finished
    trainer = make_trainer(cfg, found, seed, folder)
    scored: PreTrainedModel = trainer.model  # type: ignore[assignment]
    longest = max(max(rows["length"], default=0) for rows in (found.train, *found.held_out.values()))
    training.check_positions(scored, max(longest, *found.anchors.lengths))
    trained, whole = modeling.trainable(scored)
    share = f"{trained:,} of {whole:,} weights are trained ({trained / whole:.2%})"
    say(f"{share}, {len(found.train):,} prompts")

    pad = int(found.tokenizer.pad_token_id)
    scorer = Scorer(trainer, scored, pad, cfg.launch.micro_batch_size)
    validation = found.held_out[Part.validation]
    held_out = HeldOut(scorer, validation) if len(pairs_of(validation)) else None
    metrics: dict[str, Any] = {}

    def first() -> None:
        metrics.update(_before(folder, checkpoint is not None, held_out))

    trainer.add_callback(Report(tracker, held_out, cfg.reward.eval_every))
    trace = Trace.of(cfg.tracking, folder, trainer.args.process_index)
    metrics |= training.train(trainer, checkpoint, trace, first)
    trainer.accelerator.wait_for_everyone()  # a rank may still be writing its part of a checkpoint
    trainer.save_model(str(folder))
    raw = {str(part): scorer.score(of_groups(rows)) for part, rows in found.held_out.items()}
    raw["anchors"] = scorer.score(found.anchors)
    member = {"metrics": metrics, "raw": {name: rewards.tolist() for name, rewards in raw.items()}}
    if trainer.is_world_process_zero():
        write_atomic(folder / TRAINED, json.dumps(member))
    trainer.accelerator.wait_for_everyone()
    return member


def make_trainer(cfg: RunConfig, found: Inputs, seed: int, folder: Path) -> RewardTrainer:
    """Return the trainer of one model, ready to train."""
    reward = cfg.reward
    fed = sequences(found.train, None, reward.batch_size)
    trainer = RewardTrainer(
        order=Order(fed["length"][:], seed, training.grouping(reward)),
        launch=cfg.launch,
        l2=reward.l2,
        center=reward.center,
        model=model.make(cfg, found.start, found.tokenizer, seed),
        args=TrainingArguments(**training.arguments(reward, cfg.launch, seed, folder)),
        data_collator=batches.Collate(found.train, int(found.tokenizer.pad_token_id), reward.margin),
        train_dataset=fed,
        processing_class=found.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # Report prints the lines of a log
    return trainer


def _before(folder: Path, resumed: bool, held_out: HeldOut | None) -> dict[str, float]:
    """Measure the untrained model, or read what was measured before the run was interrupted."""
    measured = checkpoints.read_before(folder) if resumed else None
    if measured is not None:
        return measured
    fresh = {f"{name}_before": value for name, value in held_out.measure().items()} if held_out else {}
    if fresh:
        say(in_words(fresh))
    if os.environ.get("RANK", "0") == "0":
        checkpoints.write_before(folder, fresh)
    return fresh


def _conclude(
    cfg: RunConfig,
    found: Inputs,
    members: Mapping[Path, dict[str, Any]],
    out: Path,
    tracker: Tracker | None,
) -> dict[str, float]:
    """Normalise, report, leave the artifact as it stays; return the metrics of the stage."""
    normalizations = [
        Normalization.measured(member["raw"]["anchors"], found.of) for member in members.values()
    ]
    metrics = _mean([member["metrics"] for member in members.values()])
    if os.environ.get("RANK", "0") != "0":
        return metrics
    for part, rows in found.held_out.items():
        raw_MN = np.array([member["raw"][part] for member in members.values()])
        measures, verdict = _judged(cfg.reward, rows, raw_MN, normalizations)
        test = part is Part.test
        plots = report.write(out / "test" if test else out, measures, verdict)
        named = {f"test_{name}" if test else name: one for name, one in _numbers(measures).items()}
        metrics |= named | ({} if test else {"gate_passed": float(verdict.passed)})
        for failure in verdict.failures:
            say(f"{'test: ' if test else ''}{failure}")
        if tracker is not None:
            tracker.images({f"test/{name}" if test else name: path for name, path in plots.items()})
    if tracker is not None:
        tracker.summary(metrics)
    names = [str(folder.relative_to(out)) for folder in members]
    held = model.Held.by(cfg)
    model.state(out, dict(zip(names, normalizations, strict=True)), found.tokenizer, held)
    checkpoints.tidy(out)
    for folder in members:
        (folder / TRAINED).unlink()
    return metrics


def _mean(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over members of each metric; of tokens, the sum."""
    mean = {name: float(np.mean([one[name] for one in members])) for name in members[0]}
    return mean | {"tokens": float(sum(one["tokens"] for one in members))}


def _judged(
    reward: RewardConfig, rows: Dataset, raw_MN: Floats, normalizations: Sequence[Normalization]
) -> tuple[Measures, Verdict]:
    """Return the report's numbers of some held-out rows, and the gate's verdict."""
    mean_M1 = np.array([[one.mean] for one in normalizations])
    deviation_M1 = np.array([[one.deviation] for one in normalizations])
    groups = _groups(rows, (raw_MN - mean_M1) / deviation_M1)
    measures = report.measure(groups, float(deviation_M1.mean()), reward.gate.confidence)
    return measures, gate.verdict(measures, reward.gate)


def _groups(rows: Dataset, rewards_MN: Floats) -> list[report.Group]:
    groups = []
    first = 0
    columns = rows.select_columns(["source", "input_ids", "ranks", "starts", "stops", "pairs"])
    for row in columns:
        ours = rewards_MN[:, first : first + len(row["ranks"])]
        first += len(row["ranks"])
        groups.append(
            report.Group(
                source=row["source"],
                prompt=_prompt(row),
                rewards=ours.mean(0),
                ranks=np.array(row["ranks"]),
                lengths=np.subtract(row["stops"], row["starts"]),
                pairs=np.array(row["pairs"], np.int64).reshape(-1, 2),
                spread=ours.std(0) if len(ours) > 1 else None,
            )
        )
    return groups


def _prompt(row: Mapping[str, Any]) -> str:
    """Return a digest of the tokens before the replies: rows of one prompt share it."""
    ids = row["input_ids"][0][: row["starts"][0]]
    return hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()


def _numbers(measures: Measures) -> dict[str, float]:
    """Return the report's main numbers, where there is enough to compute them from."""
    accuracy = measures["accuracy"]
    _, length = gate.strongest(measures["length"]["within"])
    found = {
        "held_out_accuracy": accuracy["value"],
        "accuracy_low": accuracy["low"],
        "accuracy_high": accuracy["high"],
        "length_correlation": length,
        "kendall_tau": measures["ranked"]["tau"],
    }
    return {name: value for name, value in found.items() if value is not None}
