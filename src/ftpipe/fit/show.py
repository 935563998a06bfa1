"""Whether a run fits, as `ftpipe plan` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ftpipe import printing, provenance
from ftpipe.artifacts import Artifact
from ftpipe.choices import Device, Gpu, Method, Precision
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.fit.advice import advise
from ftpipe.fit.extent import Extent, extent
from ftpipe.fit.gpus import CARDS, Card, seen
from ftpipe.fit.memory import Parts, Peak, peak
from ftpipe.fit.model import Model, model_of
from ftpipe.fit.training import TRAINED, Training, training_of

GIB = 2**30
DORA = "not counted: DoRA's magnitudes, and what its norms need (adapter.dora=true)"


@dataclass(frozen=True)
class Stage:
    """One training of a run: what it is, needs, and goes through."""

    training: Training
    peak: Peak
    extent: Extent


def card_of(cfg: RunConfig) -> tuple[str, Card] | None:
    """Return the GPU that a run is judged on: the one that is named, or this machine's; or None."""
    launch = cfg.launch
    if launch.gpu is not None:
        return launch.gpu, CARDS[Gpu(launch.gpu)]
    if launch.device is not Device.cuda:
        return None
    return next((found for line in provenance.gpus() if (found := seen(line))), None)


def stages(cfg: RunConfig, model: Model, names: Sequence[str], dataset: Artifact | None) -> list[Stage]:
    """Return the trainings among the stages of a run, reckoned on a GPU where one is named."""
    on_gpu = True if cfg.launch.gpu is not None else None
    found = [training_of(cfg, name, model, on_gpu) for name in names if name in TRAINED]
    return [Stage(one, peak(one), extent(cfg, one, dataset)) for one in found]


def lines(cfg: RunConfig, names: Sequence[str], dataset: Artifact | None) -> list[str]:
    """Return what `plan` says of memory, steps, disk, time and cost.

    Args:
        names: the run's stages.
        dataset: what `prepare` made, if it has.

    Raises:
        ConfigError: if an adapter's target names no module.
    """
    if not any(name in TRAINED for name in names):
        return []
    try:
        model = model_of(cfg.model)
    except ConfigError as error:
        return [f"sizes: not known: {error}"]
    every, card = stages(cfg, model, names, dataset), card_of(cfg)
    return [
        *printing.table(_sizes(every)),
        *_memory(every),
        *([DORA] if cfg.adapter.dora and cfg.adapter.method is not Method.full else []),
        *printing.table(_extents(cfg, every, card)),
        *(_verdicts(cfg, model, every, *card) if card is not None else []),
    ]


def _sizes(every: Sequence[Stage]) -> list[list[str]]:
    rows = [["stage", "parameters", "trained", "share"]]
    for one in every:
        t = one.training
        share = t.trained / t.whole if t.whole else 0.0
        rows.append([t.name, f"{t.whole:,}", f"{t.trained:,}", f"{share:.2%}"])
    return rows


def _memory(every: Sequence[Stage]) -> list[str]:
    """Return a table of the parts of each peak, without those that are nothing throughout."""
    names = [one.name for one in fields(Parts) if any(getattr(s.peak.parts, one.name) for s in every)]
    small = max(one.peak.total for one in every) < GIB
    unit, word = (GIB / 1024, "MiB") if small else (GIB, "GiB")
    rows = [[f"{word} at the peak", *names, "in all", "at"]]
    for one in every:
        cells = [f"{getattr(one.peak.parts, name) / unit:.2f}" for name in names]
        rows.append([one.training.name, *cells, f"{one.peak.total / unit:.2f}", one.peak.moment])
    return printing.table(rows)


def _extents(cfg: RunConfig, every: Sequence[Stage], card: tuple[str, Card] | None) -> list[list[str]]:
    launch = cfg.launch
    rows = [["stage", "steps", "tokens", "disk"]]
    speed = card[1].speed(launch.precision, launch.tf32) if card is not None else 0.0
    timed = speed > 0
    priced = timed and launch.gpu_price is not None
    rows[0] += ["time"] if timed else []
    rows[0] += ["cost"] if priced else []
    for one in every:
        far, t = one.extent, one.training
        steps = f"{_most(far.steps_exact)}{far.steps:,}" if far.steps is not None else "after prepare"
        tokens = f"{_most(far.tokens_exact)}{_short(far.tokens)}" if far.tokens is not None else ""
        row = [
            t.name,
            steps if t.trains else "-",
            tokens or "after prepare",
            f"{far.disk / GIB:.2f} GiB",
        ]
        if timed:
            hours = far.hours(speed, launch.utilization, t.ranks)
            least = "" if far.whole else "beside drawing "
            row.append(f"{least}{_time(hours)}" if hours is not None else "after prepare")
            if launch.gpu_price is not None:
                cost = None if hours is None else hours * t.ranks * launch.gpu_price
                row.append(f"{cost:.2f}" if cost is not None else "after prepare")
        rows.append(row)
    return rows


def _most(exact: bool) -> str:
    return "" if exact else "<= "


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:.0f}"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _verdicts(cfg: RunConfig, model: Model, every: Sequence[Stage], name: str, card: Card) -> list[str]:
    """Return of each stage whether it fits on the GPU, and else what to set."""
    launch = cfg.launch
    used = ""
    if card.speed(launch.precision, launch.tf32):
        used = f"; time at {launch.utilization:.0%} of its peak speed"
    elif not card.bf16 and launch.precision in (Precision.auto, Precision.bf16):
        used = "; it has no bf16: set launch.precision=fp16"
    said = [f"on {name}: {card.memory:.1f} GiB, {card.usable / GIB:.1f} for a training{used}"]
    for one in every:
        need, stage = one.peak.total, one.training.name
        if need <= card.usable:
            said.append(f"  {stage} fits, with {(card.usable - need) / GIB:.1f} GiB left")
            continue
        found = advise(cfg, stage, model, card.usable)
        less = f"{need / GIB:.1f} GiB do not fit"
        if found.change:
            said.append(f"  {stage}: {less}; {found.total / GIB:.1f} do with {found.words}")
        else:
            said.append(
                f"  {stage}: {less}, and nothing that was tried brings it below "
                f"{found.total / GIB:.1f} GiB; name a larger launch.gpu"
            )
    return said
