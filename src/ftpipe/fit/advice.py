"""The smallest change under which a stage fits, found by the formulas that say it does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations as choices_of
from itertools import product
from typing import Any

from ftpipe import combinations
from ftpipe.choices import Method, Offload, Optimizer, Precision, Strategy
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.fit.memory import peak
from ftpipe.fit.model import Model
from ftpipe.fit.training import training_of

Change = Mapping[str, Any]  # values by dotted key
Kinds = Sequence[list[Change]]  # of each its degrees
MOST = 4  # changes that are made together
RANKS = (2, 4, 8, 16, 32, 64)  # processes that are tried
# strategies that share out more, the gentlest first
STRONGER = {
    Strategy.ddp: (Strategy.zero2, Strategy.zero3, Strategy.fsdp),
    Strategy.zero1: (Strategy.zero2, Strategy.zero3, Strategy.fsdp),
    Strategy.zero2: (Strategy.zero3, Strategy.fsdp),
}


@dataclass(frozen=True)
class Advice:
    """What to set, and what the stage needs then; no keys: nothing that was tried is enough."""

    change: Change
    total: float

    @property
    def words(self) -> str:
        """Return the change as words of a command line."""
        return " ".join(f"{key}={_word(value)}" for key, value in self.change.items())


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def advise(cfg: RunConfig, stage: str, model: Model, usable: float) -> Advice:
    """Return the first change that fits: of as few kinds as possible, the gentlest first.

    First those after which the same weights are trained: fewer rows at once, checkpointing, ranks that
    share out what they hold, optimiser states in host memory or in 8 bits. Where no four of them do: an
    adapter, 4 bits, alone or with the others. Then more GPUs.

    Args:
        usable: bytes that a training may take.
    """
    same, other = list(_same(cfg, stage)), list(_other(cfg))
    least: Advice | None = None
    for levels, needed in ((same, None), ([*same, *other], other)):
        for changes in _together(levels, needed):
            found = _tried(cfg, stage, model, _joined(changes))
            if found is not None and found.total <= usable:
                return found
            if found is not None and (least is None or found.total < least.total):
                least = found
    for processes in RANKS:
        if processes > cfg.launch.processes:
            more = _joined(({"launch.processes": processes}, *_sharing(cfg)))
            found = _tried(cfg, stage, model, more)
            if found is not None and found.total <= usable:
                return found
    return Advice({}, least.total if least is not None else float("inf"))


def _together(levels: Kinds, needed: Kinds | None) -> Iterator[tuple[Change, ...]]:
    """Yield changes of one kind, then of two, up to ``MOST``.

    Args:
        needed: at least one of these kinds is among them.
    """
    for size in range(1, MOST + 1):
        for chosen in choices_of(levels, size):
            if needed is None or any(kind in needed for kind in chosen):
                yield from product(*chosen)


def _joined(changes: tuple[Change, ...]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _sharing(cfg: RunConfig) -> tuple[Change, ...]:
    """Return how more ranks would share what they hold: a 4-bit base cannot be."""
    if cfg.adapter.method is Method.qlora or cfg.launch.strategy not in STRONGER:
        return ()
    scaled = cfg.launch.precision is Precision.fp16
    precision: Change = {"launch.precision": Precision.bf16} if scaled else {}
    return ({"launch.strategy": Strategy.fsdp, **precision},)


def _same(cfg: RunConfig, stage: str) -> Iterator[list[Change]]:
    """Yield kinds of change after which the same weights are trained, the gentlest first, by degrees."""
    launch, settings = cfg.launch, getattr(cfg, "dpo" if stage == "reference" else stage)
    yield [{"launch.micro_batch_size": rows} for rows in _fewer(launch.micro_batch_size)]
    if stage == "ppo":
        share = -(-settings.batch_size // launch.processes)
        at_once = settings.generation_batch_size or share
        yield [{"ppo.generation_batch_size": rows} for rows in _fewer(min(at_once, share))]
    shared: list[Change] = [{"launch.strategy": one} for one in STRONGER.get(launch.strategy, ())]
    if launch.precision is Precision.fp32:
        yield [{"launch.precision": Precision.bf16}]
    if launch.precision is Precision.fp16:  # its loss scale is not shared between ranks
        shared = [{**one, "launch.precision": Precision.bf16} for one in shared]
    if not settings.gradient_checkpointing and stage != "reference":
        yield [{f"{stage}.gradient_checkpointing": True}]
    if launch.processes * launch.nodes_of(stage) > 1 and shared:
        yield shared
    if settings.optimizer is Optimizer.adamw:
        yield [{f"{stage}.optimizer": Optimizer.paged_adamw_32bit}]
        yield [{f"{stage}.optimizer": Optimizer.paged_adamw_8bit}]
    if launch.strategy is Strategy.zero3 and launch.sharding.offload_parameters is Offload.none:
        yield [
            {
                "launch.sharding.offload_optimizer": Offload.cpu,
                "launch.sharding.offload_parameters": Offload.cpu,
            }
        ]


def _other(cfg: RunConfig) -> Iterator[list[Change]]:
    """Yield kinds of change after which fewer weights are trained, or the base is rounded."""
    if cfg.adapter.method is Method.full:
        yield [{"adapter.method": Method.lora}]
    if cfg.adapter.method is not Method.qlora:
        yield [{"adapter.method": Method.qlora}]


def _fewer(rows: int) -> Iterator[int]:
    while rows > 1:
        rows = rows // 2
        yield rows


def _tried(cfg: RunConfig, stage: str, model: Model, change: Change) -> Advice | None:
    """Return what the stage needs after a change; None if that is no run."""
    changed = changed_by(cfg, change)
    try:
        changed.check()
        combinations.check(changed, [stage], elsewhere=True)
    except ConfigError:
        return None
    return Advice(change, peak(training_of(changed, stage, model, gpu=True)).total)


def changed_by(cfg: RunConfig, change: Change) -> RunConfig:
    """Return a configuration with other values."""
    other = copy.deepcopy(cfg)
    for key, value in change.items():
        *path, name = key.split(".")
        at: Any = other
        for part in path:
            at = getattr(at, part)
        setattr(at, name, value)
    return other
