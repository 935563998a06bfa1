"""Where each value of a run's configuration came from: what said it last.

A mapping from dotted keys to words: ``default`` (the schema), ``group model=tiny-llama`` (a file of
``conf/``), ``recipe tiny``, ``command line``, ``lock``, ``smoke``, ``this machine``. What a file states
is replayed in the order in which Hydra merges the files, then the overrides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftpipe.artifacts import write_atomic
from ftpipe.config import RunConfig
from ftpipe.schema import plain

FILE = "origins.json"
DEFAULT, COMMAND, LOCK, SMOKE, MACHINE = "default", "command line", "lock", "smoke", "this machine"
SEEDS = "seeds"  # which asks for several runs
DEVICE = "launch.device"  # which a job has to name; what is left to it follows
COLUMN = 44  # at most, where ``commented`` begins; a longer line has its comment right behind it

Origins = dict[str, str]


@dataclass(frozen=True)
class Layer:
    """What one file states, of those that a configuration is composed of.

    Attributes:
        origin: the words for it.
        tree: its keys, from the top of the configuration.
    """

    origin: str
    file: Path
    tree: Mapping[str, Any]


def of_layers(layers: Iterable[Layer]) -> Origins:
    """Return who states each key last, in the order in which the files are merged."""
    told: Origins = {}
    for layer in layers:
        for key, value in layer.tree.items():
            state(told, key, value, layer.origin)
    return told


def state(told: Origins, key: str, value: Any, origin: str) -> None:
    """Note that ``origin`` gives ``key`` a value. A group is merged; anything else stands alone."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            state(told, f"{key}.{name}", inner, origin)
        return
    if not isinstance(value, Mapping):  # an empty group takes nothing away
        forget(told, key)
    told[key] = origin


def forget(told: Origins, key: str) -> None:
    """Note that a key, and what is below it, is back at what the schema says."""
    for known in [known for known in told if known == key or known.startswith(f"{key}.")]:
        del told[known]


def whole(told: Origins, cfg: RunConfig) -> Origins:
    """Return the origin of every key of a configuration, in its order."""
    return {key: told.get(key, DEFAULT) for key in leaves(plain(cfg))}


def changed(told: Origins, before: RunConfig, after: RunConfig, origin: str) -> Origins:
    """Return the origins of ``after``, which ``origin`` made of ``before``."""
    old = leaves(plain(before))
    return {
        key: told.get(key, DEFAULT) if key in old and old[key] == value else origin
        for key, value in leaves(plain(after)).items()
    }


def leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value by its dotted key; a list is one value, and so is an empty group."""
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write(run: Path, told: Mapping[str, str]) -> None:
    """Write the origins beside ``run.yaml``."""
    write_atomic(run / FILE, json.dumps(told, indent=1) + "\n")


def read(run: Path) -> Origins:
    """Return the origins of a run; nothing where they were not written."""
    if not (run / FILE).is_file():
        return {}
    told: Origins = json.loads((run / FILE).read_text(encoding="utf-8"))
    return told


def commented(text: str, told: Mapping[str, str]) -> str:
    """Return a configuration's YAML with a comment on each value that is not the default.

    Args:
        text: as ``schema.dump`` writes it.
    """
    lines = text.splitlines()
    tree = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(tree, yaml.MappingNode)
    said = {line: told[key] for key, line in _lines(tree, "") if told.get(key, DEFAULT) != DEFAULT}
    short = [len(lines[at]) for at in said if len(lines[at]) < COLUMN]
    column = max(short, default=0)
    for at, origin in said.items():
        lines[at] = f"{lines[at]:{column}}  # {origin}"
    return "".join(f"{line}\n" for line in lines)


def _lines(tree: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield each key with the line that takes its comment: that of a list's name, of a text's end."""
    for name, value in tree.value:
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _lines(value, f"{key}.")
        elif isinstance(value, yaml.ScalarNode):  # in one line or quoted: OmegaConf writes no others
            yield key, value.end_mark.line
        else:
            yield key, name.end_mark.line
