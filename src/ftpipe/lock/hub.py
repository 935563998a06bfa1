"""Inputs on the hub without a commit: ``lock`` asks for the newest, later runs take that one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpipe import origins, pins, pipeline
from ftpipe.choices import Init
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError
from ftpipe.lock.record import Lock
from ftpipe.origins import Origins
from ftpipe.pipeline import STAGES


@dataclass(frozen=True)
class Unpinned:
    """An input on the hub whose commit the configuration leaves open."""

    owner: str  # as in Lock.inputs
    key: str  # that takes the commit
    id: str
    kind: str  # "dataset" or "model", as the hub has it
    group: Any  # of the configuration, which holds the key

    def settle(self, commit: str) -> None:
        setattr(self.group, self.key.rpartition(".")[2], commit)

    def pin(self, commit: str) -> str:
        """Return how ``pins`` writes it."""
        return f"{self.id}@{commit}" if self.owner == "model.path" else f"hub:{self.id}@{commit}"


def ask(cfg: RunConfig) -> None:
    """Settle what the configuration leaves open by the commit that the hub's default branch is at now.

    Raises:
        ConfigError: if the hub does not say.
    """
    for input_ in unpinned(cfg):
        input_.settle(_newest(input_))


def _newest(input_: Unpinned) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        found = HfApi().repo_info(input_.id, repo_type=input_.kind).sha
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except Exception as error:  # of its client's transport, too, which has names of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    else:
        if found:
            return str(found)
        reason = "it names none"
    raise ConfigError(
        f"{input_.key} is not set, and the hub cannot be asked for the newest commit of {input_.id} "
        f"({reason}); give {input_.key}=<commit>."
    )


def unpinned(cfg: RunConfig) -> Iterator[Unpinned]:
    """Yield the inputs of the run's stages that are on the hub and have no commit."""
    wanted: set[str] = set()
    for name in pipeline.stage_names(cfg):
        stage = STAGES.get(name)
        wanted |= {pin for pin in stage.pins if pin not in stage.unused(cfg)} if stage else set()
    found = list(_rows(cfg, wanted))
    seeds, model = cfg.evolve.seeds, cfg.model
    if "seeds" in wanted and seeds.path:
        found.append(Unpinned("evolve.seeds", "evolve.seeds.revision", seeds.path, "dataset", seeds))
    beside = "tokenizer" in wanted and model.tokenizer is None  # the tokenizer is the model's
    if ("model" in wanted or beside) and model.init is Init.pretrained and model.path:
        owner = "model.path" if "model" in wanted else "model.tokenizer"
        found.append(Unpinned(owner, "model.revision", model.path, "model", model))
    if "tokenizer" in wanted and model.tokenizer not in (None, pins.BYTES):
        key = "model.tokenizer_revision"
        found.append(Unpinned("model.tokenizer", key, str(model.tokenizer), "model", model))
    for input_ in found:
        name = input_.key.rpartition(".")[2]
        if getattr(input_.group, name) is None and _on_hub(input_, model):
            yield input_


def _rows(cfg: RunConfig, wanted: Collection[str]) -> Iterator[Unpinned]:
    """Yield all sets of rows that the pins concern, by the group of their keys."""
    groups = (
        ("data", "data.sources", cfg.data.sources),
        ("data", "data.decontaminate", cfg.data.decontaminate),
        ("evaluation", "evaluate.prompts", cfg.evaluate.prompts),
        ("evaluation", "evaluate.answers", cfg.evaluate.answers),
    )
    for pin, group, sets in groups:
        for name, rows in sets.items() if pin in wanted else ():
            owner = f"{group}.{name}"
            yield Unpinned(owner, f"{owner}.revision", rows.path, "dataset", rows)


def _on_hub(input_: Unpinned, model: Any) -> bool:
    try:
        if input_.key == "model.revision":
            return pins.local_model(model) is None
        if input_.owner == "model.tokenizer":
            return not pins.exists(Path(input_.id)) and not input_.id.startswith((".", "/"))
        return pins.local_data(input_.id) is None
    except UserError:  # no such file: the plan says so
        return False


def fill(lock: Lock, cfg: RunConfig, told: Origins) -> None:
    """Settle what the configuration leaves open by the commits of the lock, for the same hub ids."""
    for input_ in unpinned(cfg):
        pin = lock.inputs.get(input_.owner, {}).get("", "")
        commit = pin.rpartition("@")[2]
        if pin == input_.pin(commit):
            input_.settle(commit)
            told[input_.key] = origins.LOCK
