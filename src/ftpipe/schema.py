"""RunConfig as a file and as a list of keys: load, dump, and say in one sentence what does not fit."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ftpipe import home
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, nearest


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a resolved ``run.yaml``; paths that begin with ``~`` are those of the home here.

    Args:
        overrides: ``key=value``, in place of its values.

    Raises:
        ConfigError: if it cannot be read, or does not fit the schema.
    """
    try:
        composed = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({reason}).") from None
    if not isinstance(composed, DictConfig):
        raise ConfigError(f"{path} holds no configuration.")
    cfg = from_composed(OmegaConf.merge(composed, OmegaConf.from_dotlist(list(overrides))))
    home.expand(cfg)
    return cfg


def changed(cfg: RunConfig, parts: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Return a configuration with groups in place of its own, and then with single values.

    Args:
        parts: plain groups by name, as a manifest has them.
        overrides: ``key=value``.

    Raises:
        ConfigError: for what does not fit the schema.
    """
    whole = {**plain(cfg), **parts}
    found = from_composed(OmegaConf.merge(whole, OmegaConf.from_dotlist(list(overrides))))
    home.expand(found)
    return found


def dump(cfg: RunConfig) -> str:
    """Return the resolved configuration as YAML, keys in schema order, the home written as ``~``."""
    return OmegaConf.to_yaml(OmegaConf.structured(home.shortened(cfg)))


def recorded(cfg: RunConfig) -> dict[str, Any]:
    """Return what ``dump`` writes, as ``plain`` has it."""
    return plain(home.shortened(cfg))


def plain(cfg: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain dicts, lists, strings and numbers."""
    said = repr(cfg)
    if said not in _last:  # a plan asks for the same one once a stage, and OmegaConf takes its time
        container = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
        assert isinstance(container, dict)
        _last.clear()
        _last[said] = typing.cast(dict[str, Any], container)
    return copy.deepcopy(_last[said])


_last: dict[str, dict[str, Any]] = {}  # the last configuration in plain form, by its repr


def from_composed(composed: Any) -> RunConfig:
    """Merge a composed configuration onto a fresh schema, refusing what does not fit it.

    Hydra's ``+key`` gets past its own schema; it does not get past this one.

    Raises:
        ConfigError: for an unknown key, a wrong type or an unknown enum value.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), composed)
        assert isinstance(merged, DictConfig)
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain(error) from None
    assert isinstance(cfg, RunConfig)
    _check_lists(cfg)
    return cfg


def _check_lists(part: Any, prefix: str = "") -> None:
    """Refuse a list in a list, which OmegaConf lets through: ``stages=[[prepare,sft]]``."""
    for name, value in vars(part).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            _check_lists(value, f"{key}.")
        elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise ConfigError(f"{key}={value} is a list in a list; expected {type_name(key)}.")
        elif isinstance(value, dict):
            for entry in filter(dataclasses.is_dataclass, value.values()):
                _check_lists(entry, f"{key}.<name>.")


def explain(error: OmegaConfBaseException) -> ConfigError:
    """Turn OmegaConf's complaint into one sentence with the key and what is allowed."""
    key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
    if key and field_type(key) is None:
        return ConfigError(f"unknown key '{key}'.{nearest(key, [*all_keys(), *fields_of(RunConfig)])}")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} is not set; expected {type_name(key)}.")
    reason = str(getattr(error, "msg", None) or error).splitlines()[0]
    if not key:
        return ConfigError(f"{reason.rstrip('.')}.")
    wrong = re.match(r"Invalid value '(.*)', expected one of", reason)
    if wrong:
        word, allowed = wrong[1], allowed_values(key)
        return ConfigError(f"{key}={word} is not one of {', '.join(allowed)}.{nearest(word, allowed)}")
    return ConfigError(f"{key}: {reason.rstrip('.')}; expected {type_name(key)}.")


def fields_of(kind: type) -> dict[str, Any]:
    """Return the resolved type of each field of a config dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def all_keys(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema; ``<name>`` stands for names of the user's choosing."""
    found: list[str] = []
    for name, hint in fields_of(kind).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found += all_keys(hint, f"{key}.")
        elif _entry(hint) is not None and dataclasses.is_dataclass(_entry(hint)):
            found += all_keys(typing.cast(type, _entry(hint)), f"{key}.<name>.")
        else:
            found.append(key)
    return found


def field_type(key: str) -> Any:
    """Return the type behind a dotted key, or None if the schema has no such key."""
    hint: Any = RunConfig
    for part in key.replace("[", ".").replace("]", "").split("."):
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            hint = fields_of(hint).get(part)
        elif hint is not Any:
            hint = _entry(hint)
        if hint is None:
            return None
    return hint


def is_dict(key: str) -> bool:
    """Say whether a dotted key holds names of the user's choosing."""
    return typing.get_origin(field_type(key)) is dict


def allowed_values(key: str) -> list[str]:
    """Return the values of an enum key, or nothing for other keys."""
    hint = field_type(key) if key else None
    while _entry(hint) is not None:
        hint = _entry(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(member.value) for member in hint]
    return []


def type_name(key: str) -> str:
    """Return how to say the type of a key: ``int``, ``float or null``, ``list of str``."""
    if allowed := allowed_values(key):
        return f"one of {', '.join(allowed)}"
    hint = field_type(key) if key else RunConfig
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is list:
        return f"a list such as [{words.get(parts[0], 'name')}]"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a group of keys"
    if parts:
        return f"{words.get(parts[0], str(parts[0]))} or null"
    return words.get(hint, str(hint))


def _entry(hint: Any) -> Any:
    """Return the entry type of ``list[x]`` and ``dict[str, x]``, else None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return args[0]
    return args[1] if origin is dict else None
