"""How far a training goes: rows, steps, tokens, operations, and what it leaves on the disk.

Steps are exact once `prepare` has made the dataset, by its ledger, and where ``max_steps`` says them;
tokens are for `sft` alone, since a batch of the others holds replies. Before, rows of local files are
counted and each is taken to be as long as ``data.max_length`` lets it, so that is a bound. Rows of a hub
are not known here.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftpipe.artifacts import Artifact
from ftpipe.choices import Format, Method, OverLength, Part, Use
from ftpipe.config import RunConfig, SourceConfig
from ftpipe.data import ledger
from ftpipe.data.uses import uses
from ftpipe.errors import UserError
from ftpipe.fit.training import REPLIES, Training, optimizer_bytes
from ftpipe.pins import local_data

LARGEST = 64 * 2**20  # bytes of a file whose rows are counted: a plan answers at once
OF_STAGE = {"sft": Use.demonstrations, "reward": Use.preferences, "ppo": Use.prompts}


@dataclass(frozen=True)
class Rows:
    """Rows that a stage learns from: `dpo` from pairs, `reward` from prompts with all their replies.

    Attributes:
        tokens: of all of them.
        exact: counted in the dataset, not a bound.
        held: rows that are held out.
    """

    count: int
    tokens: int
    exact: bool
    held: int = 0


@dataclass(frozen=True)
class Extent:
    """What a stage goes through.

    Attributes:
        steps, tokens, operations: None where the number of rows is not known; tokens are those that go
            through the model for a gradient.
        steps_exact: the steps are those of the dataset that is made, or of ``max_steps``.
        tokens_exact: the tokens are those of the dataset; else at most so many.
        disk: bytes of the artifact with the checkpoints that stay.
        whole: all of its time is in ``operations``; PPO's drawing of answers is not.
    """

    steps: int | None
    tokens: float | None
    operations: float | None
    steps_exact: bool
    tokens_exact: bool
    disk: float
    whole: bool = True

    def hours(self, speed: float, utilization: float, ranks: int) -> float | None:
        """Return the time on GPUs of so many 10^12 operations a second, used to such a share."""
        if self.operations is None or not speed:
            return None
        return self.operations / (speed * 1e12 * utilization * ranks) / 3600


def use_of(cfg: RunConfig, stage: str) -> Use:
    """Return which rows a stage learns from."""
    from ftpipe.pipeline import STAGES

    if stage in ("reference", "dpo"):
        return next(iter(STAGES["dpo"].learns_from(cfg)))
    return OF_STAGE[stage]


def rows_of(cfg: RunConfig, stage: str, dataset: Artifact | None) -> Rows | None:
    """Return the rows that a stage learns from; None where nothing here says how many there are."""
    use = use_of(cfg, stage)
    pairs = use is Use.preferences and stage != "reward"
    if dataset is not None:
        return _in_dataset(dataset.path, use, pairs, cfg.data.packing)
    if "evolve" in cfg.stages:
        return None  # how many survive shows when it is done
    if cfg.data.over_length is OverLength.split and use is Use.demonstrations:
        return None  # a long row becomes several
    count = 0
    for source in cfg.data.sources.values():
        if use not in uses(source) or source.part not in (Part.auto, Part.train):
            continue
        ranked = pairs and source.format is Format.ultrafeedback  # a row may hold several replies
        found = None if ranked else _counted(source, use)
        if found is None:
            return None
        count += found
    share = cfg.data.validation
    held = round(count * share) if share < 1 else min(count, int(share))
    count -= held
    return Rows(count, count * cfg.data.max_length, exact=False, held=held)


def _in_dataset(folder: Path, use: Use, pairs: bool, packed: bool) -> Rows | None:
    """Return what the ledger says.

    Args:
        pairs: pairs of replies are the rows, not the prompts that they answer.
        packed: sequences of several rows are, of demonstrations.
    """
    from ftpipe.data import table

    try:
        found, packing = ledger.from_dict(json.loads((folder / "ledger.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    every = ledger.total(one for (_, of), one in found.items() if of is use)
    whole = every.train
    rows, held = whole.rows, every.validation.rows
    if packed and packing is not None and use is Use.demonstrations:
        rows = packing.sequences
    if pairs:
        files = (table.place(folder, use, part) for part in (Part.train, Part.validation))
        rows, held = (_pairs(file) if file.is_file() else 0 for file in files)
    return Rows(rows, whole.tokens, exact=True, held=held)


def _pairs(file: Path) -> int:
    """Return how many pairs of replies a table of preferences compares."""
    from ftpipe.data import table

    return sum(len(row) // 2 for batch in table.batches(file) for row in batch["pairs"].to_pylist())


def _counted(source: SourceConfig, use: Use) -> int | None:
    """Return the examples of a local file that is small enough to be counted."""
    if source.format is Format.oasst or source.weight != 1:
        return None  # rows are messages of threads, or are seen more or less than once
    try:
        path = local_data(source.path)
        if path is None or not path.is_file() or path.stat().st_size > LARGEST:
            return source.count
        found = _lines(path)
    except (OSError, ValueError, UserError):
        return None
    if found is None:
        return source.count
    found = found if source.rows is None else min(found, source.rows)
    if use is Use.unpaired and source.format is not Format.unpaired:
        found *= REPLIES  # each of a pair is one by itself
    return found if source.count is None else min(found, source.count)


def _lines(path: Path) -> int | None:
    names = path.name.removesuffix(".gz")
    opener = gzip.open if path.suffix == ".gz" else open
    if names.endswith(".jsonl"):
        with opener(path, "rb") as file:
            return sum(1 for line in _filled(file))
    if names.endswith(".json"):
        with opener(path, "rb") as file:
            found = json.loads(file.read())
        return len(found) if isinstance(found, list) else None
    return None


def _filled(lines: object) -> Iterator[bytes]:
    assert hasattr(lines, "__iter__")
    for line in lines:
        if line.strip():
            yield line


def extent(cfg: RunConfig, t: Training, dataset: Artifact | None) -> Extent:
    """Return how far a stage goes.

    Args:
        dataset: what `prepare` made, if it has.
    """
    disk = disk_of(cfg, t)
    rows = rows_of(cfg, t.name, dataset)
    if not t.trains:  # every reply once, held-out ones as well
        replies = 1 if use_of(cfg, t.name) is Use.unpaired else REPLIES
        asked = None if rows is None else float((rows.count + rows.held) * replies * t.length)
        done = None if asked is None else asked * per_token(t)
        return Extent(None, asked, done, False, False, disk)
    settings = getattr(cfg, t.name)
    steps = settings.max_steps
    if steps is None and rows is not None:
        each = cfg.ppo.answers_per_prompt if t.name == "ppo" else 1
        if t.name == "ppo":
            steps = math.ceil(settings.epochs * rows.count * each / settings.batch_size)
        else:
            steps = math.ceil(settings.epochs * math.ceil(rows.count / settings.batch_size))
    whole, counted = t.name != "ppo", rows is not None and rows.exact
    if steps is None:
        return Extent(None, None, None, False, False, disk, whole)
    tokens = _tokens(cfg, t, steps, rows)
    known = counted or settings.max_steps is not None
    exact = counted and t.name == "sft"
    return Extent(steps, tokens, tokens * per_token(t), known, exact, disk, whole)


def _tokens(cfg: RunConfig, t: Training, steps: int, rows: Rows | None) -> float:
    """Return the tokens of all passes: those of the dataset where it is made, else of full rows.

    Where the last step of an epoch is not full, empty rows fill it (``sequences.py``).
    """
    settings = getattr(cfg, t.name)
    seen = float(steps * settings.batch_size)
    if t.name == "ppo":
        return seen * t.length * cfg.ppo.ppo_epochs
    if rows is not None and rows.exact and rows.count and t.name in ("sft", "reward"):
        return float(steps * rows.tokens / math.ceil(rows.count / settings.batch_size))
    return seen * t.length * (REPLIES if t.rows > cfg.launch.micro_batch_size else 1)


def per_token(t: Training) -> float:
    """Return the operations of a token's forward and backward pass.

    Two for each weight forward, four backward, of which two are for the gradient of the weight itself
    and fall away where it is frozen; checkpointing goes forward once more (arXiv:2204.02311, appendix
    B, with its term of attention; arXiv:2305.14314 trains as many on a frozen base). A reference goes
    forward once.
    """
    s = t.shape
    table = (s.vocabulary + s.places) * s.hidden
    weights = s.body - table + (s.vocabulary * s.hidden if t.headed else 0)
    attention = 2 * s.layers * s.attention * t.length  # of the forward pass: scores, and values
    passes = 2 * weights + 2 * attention
    if not t.trains:
        return passes
    backward = 2.0 if t.method is Method.full else 1.0
    forward = 1.0 + (1.0 if t.checkpointing else 0.0)
    roles = t.learned if t.name == "ppo" else 1
    return passes * (roles * (forward + backward) + int(t.asks_reference))


def disk_of(cfg: RunConfig, t: Training) -> float:
    """Return the bytes that a stage leaves: its weights, and the checkpoints that stay with them.

    A checkpoint holds the trained weights and what the optimiser keeps of them.
    """
    if not t.trains:
        return 0.0
    settings = getattr(cfg, t.name)
    full = t.method is Method.full
    width = t.numbers.stored if full else t.numbers.adapter
    made = float(t.body if full else t.adapter + t.fresh) * width
    if t.name == "reward":
        made *= cfg.reward.ensemble
    kept = optimizer_bytes(t.optimizer, gpu=False, width=width)  # pages of host memory are saved too
    one = t.trained * (width + kept)
    return made + (settings.keep_checkpoints * one if settings.save_every else 0.0)
