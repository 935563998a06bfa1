"""From a command line's words to runs that can be planned: composed, locked, in smoke form, checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftpipe import home, origins, pipeline, provenance, schema, seeds
from ftpipe.choices import Device
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, unknown
from ftpipe.launch import resolve_device
from ftpipe.lock import hold, hub, record
from ftpipe.lock.record import Lock
from ftpipe.origins import Layer, Origins
from ftpipe.pipeline import Step
from ftpipe.smoke import smoke_form

DEVICE = "launch.device="  # a word that names it


@dataclass(frozen=True)
class Resolved:
    """A run that can be planned: every value stated, and where each came from.

    Attributes:
        recipe: its name, and ``file`` where it is.
        layers: the files that it is composed of.
        groups: those that the words choose an option of.
        lock: what the recipe is pinned to, if it is.
        family: the configuration with several seeds that this one is of, if it is.
    """

    cfg: RunConfig
    told: Origins
    recipe: str
    file: Path
    layers: Sequence[Layer]
    groups: frozenset[str]
    lock: Lock | None
    family: RunConfig | None = None

    def plan(self, upto: str | None = None, elsewhere: bool = False) -> list[Step]:
        """Return the steps of the run, and say what of its lock the words lift.

        Raises:
            LockError: if something moved that the recipe is pinned to.
            UserError: as ``pipeline.plan``.
        """
        steps = pipeline.plan(self.cfg, upto, elsewhere)
        if self.lock is not None:
            for line in hold.check(self.lock, steps, self.layers, self.told, self.groups):
                print(line, flush=True)
        return steps


def resolved(words: Sequence[str], elsewhere: bool = False, judged: bool = False) -> list[Resolved]:
    """Return the checked, resolved runs of a command line's words.

    Args:
        elsewhere: they run as jobs, not on this machine.
        judged: they do not run: where ``launch.gpu`` names a GPU, they are taken to be on a machine that
            has it, unless the words name ``launch.device``.

    Raises:
        ConfigError: for anything that does not exist or does not fit.
    """
    from ftpipe import compose

    flags = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if not word.startswith("-")]
    for flag in flags:
        if flag not in ("-m", "--multirun"):
            raise ConfigError(unknown("option", flag, ["-m", "--multirun", "--help"]))
    if not any(word.split("=")[0] == "recipe" for word in overrides):
        raise ConfigError("choose a recipe with recipe=NAME:\n" + recipe_list())
    runs = []
    for run in compose.composed(overrides, multirun=bool(flags)):
        cfg, told = run.cfg, run.told
        # a smoke form has other inputs than the recipe
        locked = None if cfg.smoke else record.find(run.recipe, run.file)
        if cfg.smoke:
            small = smoke_form(cfg)
            told, cfg = origins.changed(told, cfg, small, origins.SMOKE), small
        _check(cfg)
        home.expand(cfg)
        if locked is not None:
            hub.fill(locked, cfg, told)
        before = copy.deepcopy(cfg)
        named = judged and cfg.launch.gpu is not None
        if named and not any(word.startswith(DEVICE) for word in overrides):
            cfg.launch.device = Device.cuda
        resolve_device(cfg, elsewhere or named)
        # a job's precision follows from the device that it has to name
        filled = origins.DEVICE if elsewhere else origins.MACHINE
        told = origins.changed(told, before, cfg, filled)
        of = cfg if cfg.seeds > 1 else None
        for one in seeds.each(cfg):
            by_seed = origins.changed(told, cfg, one, origins.SEEDS)
            runs.append(Resolved(one, by_seed, run.recipe, run.file, run.layers, run.groups, locked, of))
    return runs


def to_lock(words: Sequence[str]) -> tuple[Path, Lock]:
    """Return what a recipe is to be pinned to, and the file for it.

    Raises:
        ConfigError: if the words mean no single recipe, or the hub cannot say what it holds.
    """
    from ftpipe import compose

    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"lock takes recipe=NAME and overrides, but got '{word}'.")
    if not any(word.split("=")[0] == "recipe" for word in words):
        raise ConfigError("choose a recipe with recipe=NAME:\n" + recipe_list())
    (run,) = compose.composed(words)
    cfg = run.cfg
    if cfg.smoke:
        raise ConfigError(
            "smoke=true has other inputs than the recipe; leave it out to lock the recipe."
        )
    _check(cfg)
    home.expand(cfg)
    hub.ask(cfg)
    # no resolve_device: a recipe for GPUs can be locked anywhere, since no pin depends on them
    steps = pipeline.plan(cfg, elsewhere=True)
    shipped = compose.HERE in run.file.parents
    return record.place(run.recipe, run.file, shipped), record.of(run.recipe, run.layers, steps)


def _check(cfg: RunConfig) -> None:
    """Refuse values that cannot work; and secrets, unrepeated: the record of a run holds every value."""
    cfg.check()
    for key, value in origins.leaves(schema.plain(cfg)).items():
        if provenance.holds_key(str(value)):
            raise ConfigError(
                f"{key} holds what looks like a secret, and it would be written to the record of the "
                "run; leave it out, and put it into an environment variable."
            )


def recipe_list() -> str:
    """Return every recipe with its first line."""
    from ftpipe import compose

    known = compose.recipes()
    width = max((len(name) for name in known), default=0)
    return "\n".join(f"  {name:{width}}  {compose.describe(file)}" for name, file in known.items())
