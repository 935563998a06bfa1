"""Hydra: from the words on the command line to one RunConfig for each run.

Composed once, in the driver, from ``conf/`` groups, ``recipes/`` and overrides. Recipes are read
from the project and from ``./recipes`` of the user's own directory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftpipe import origins, schema
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, nearest, unknown
from ftpipe.origins import Layer, Origins

HERE = Path(__file__).resolve().parent
GROUPS = ("model", "adapter", "data", "evolve", "evaluate", "launch", "tracking")


class Loader(yaml.SafeLoader):
    """YAML with the booleans of its version 1.2: ``languages: [no]`` is Norwegian, not False."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice: the first would be dropped without a word."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"repeats the key '{key.value}'"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


BOOL = "tag:yaml.org,2002:bool"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


@dataclass(frozen=True)
class Composed:
    """A run as its words compose it.

    Attributes:
        recipe: its name, and ``file`` where it is.
        layers: the files of ``conf/`` and the recipes, in the order in which they are merged.
        groups: those that the words choose an option of.
        told: where each value came from.
    """

    cfg: RunConfig
    recipe: str
    file: Path
    layers: Sequence[Layer]
    groups: frozenset[str]
    told: Origins


def shipped(name: str) -> Path:
    """Return the folder ``conf``, ``recipes`` or ``slurm``: of the package, or the checkout's."""
    inside = HERE / name
    return inside if inside.is_dir() else HERE.parents[1] / name


def recipes() -> dict[str, Path]:
    """Return every recipe by name; those in ``./recipes`` win over the shipped ones."""
    folders = (shipped("recipes"), Path.cwd() / "recipes")
    files = (file for folder in folders for file in sorted(folder.glob("*.yaml")))
    return {file.stem: file for file in files if file.is_file()}


def describe(recipe: Path) -> str:
    """Return a recipe's first comment line: what it is, in a sentence."""
    for line in recipe.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


def group_options(group: str) -> list[str]:
    return sorted(file.stem for file in (shipped("conf") / group).glob("*.yaml"))


def runs(words: Sequence[str], multirun: bool = False) -> list[RunConfig]:
    """Return the configurations alone of what ``composed`` returns."""
    return [run.cfg for run in composed(words, multirun)]


def composed(words: Sequence[str], multirun: bool = False) -> list[Composed]:
    """Return the runs that the words of a command line ask for.

    Args:
        words: ``recipe=NAME`` and overrides in Hydra's grammar.
        multirun: whether ``a=1,2`` and ``recipe=glob(*)`` mean several runs.

    Raises:
        ConfigError: for anything that does not exist or does not fit.
    """
    known = recipes()
    ConfigStore.instance().store(name="schema", node=RunConfig, provider="src/ftpipe/config.py")
    # a resolver that reads the environment would write a secret into run.yaml
    OmegaConf.clear_resolver("oc.env")
    return [_compose(overrides, known) for overrides in _sweep(_parse(words), known, multirun)]


def _parse(words: Sequence[str]) -> list[Override]:
    try:
        overrides: list[Override] = OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot read the override: {reason.rstrip('.')}. "
            "Write key=value, such as sft.learning_rate=1e-4; odd values want quotes: key='\"~/x y\"'."
        ) from None
    for override in overrides:
        _check_key(override)
    return overrides


def _check_key(override: Override) -> None:
    """Refuse a key that the schema lacks, also behind ``+``, ``++`` and ``~``."""
    key = override.key_or_group
    if _is_choice(override):
        return
    if schema.field_type(key) is None:
        known = [*schema.all_keys(), "recipe", *GROUPS]
        raise ConfigError(f"unknown key '{key}'.{nearest(key, known)}")


def _sweep(overrides: Sequence[Override], known: dict[str, Path], multirun: bool) -> list[list[str]]:
    """Return one list of overrides for each run: the product of all sweeps."""
    choices: list[list[str]] = []
    for override in overrides:
        line = str(override.input_line)
        if not override.is_sweep_override():
            choices.append([line])
            continue
        key = override.key_or_group
        if not multirun:
            raise ConfigError(f"{line} asks for several runs; add -m to run them one after another.")
        value: Any = override.value()
        if isinstance(value, Glob):
            options = list(known) if key == "recipe" else group_options(key)
            values = value.filter(options)
        elif override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
        else:
            raise ConfigError(f"{line} is no list of values; write {key}=1,2 or {key}=range(0,3).")
        if not values:
            raise ConfigError(f"{line} matches nothing.")
        choices.append([f"{key}={text}" for text in values])
    return [list(chosen) for chosen in itertools.product(*choices)]


def _register(recipe: str, known: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Put a recipe, and those it extends, into Hydra's store; return what they state.

    Others may be unfit without harm.
    """
    store = ConfigStore.instance()
    waiting: list[str] = [recipe]
    read: dict[str, dict[str, Any]] = {}
    while waiting:
        name = waiting.pop()
        if name in read or name not in known:
            continue
        file = known[name]
        try:
            node = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
        except UnicodeDecodeError:
            raise ConfigError(f"recipe {file} is not UTF-8 text.") from None
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            if isinstance(error, yaml.constructor.ConstructorError):
                raise ConfigError(f"recipe {file}{line} {error.problem}.") from None
            raise ConfigError(f"recipe {file}{line} is not YAML.") from None
        if not isinstance(node, dict):
            raise ConfigError(f"recipe {file} holds no keys.")
        if not isinstance(node.get("defaults", []), list):
            raise ConfigError(f"recipe {file}: defaults must be a list, such as [tiny].")
        defaults = node.get("defaults", [])
        if not all(isinstance(entry, str | dict) for entry in defaults):
            raise ConfigError(
                f"recipe {file}: each of its defaults is a recipe or 'override /group: name'."
            )
        waiting += [entry for entry in defaults if isinstance(entry, str)]
        read[name] = {key: value for key, value in node.items() if key != "defaults"}
        try:
            store.store(group="recipe", name=name, node=node, package="_global_", provider=str(file))
        except OmegaConfBaseException as error:
            raise ConfigError(f"recipe {file}: {str(error).splitlines()[0]}") from None
    return read


def _compose(lines: list[str], known: dict[str, Path]) -> Composed:
    overrides = OverridesParser.create().parse_overrides(lines)
    chosen = {override.key_or_group: str(override.value()) for override in overrides}
    recipe = chosen.get("recipe")
    if recipe is None:
        raise ConfigError("no recipe; choose one with recipe=NAME: " + ", ".join(known) + ".")
    if recipe not in known:
        raise ConfigError(unknown("recipe", recipe, known))
    for group in GROUPS:
        if group in chosen and chosen[group] not in group_options(group):
            raise ConfigError(f"{group}: " + unknown(group, chosen[group], group_options(group)))
    read = _register(recipe, known)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(shipped("conf")), version_base="1.3"):
            named = [override for override in overrides if _is_named(override)]
            lines = [str(override.input_line) for override in overrides if override not in named]
            composed = hydra_compose(config_name="config", overrides=lines)
            layers = _layers(lines, known, read)
        _apply(named, composed)
    except (OmegaConfBaseException, HydraException) as error:
        raise _explain(error, recipe) from None
    except RecursionError:
        raise ConfigError(f"recipe={recipe}: its defaults lead back to itself.") from None
    finally:
        GlobalHydra.instance().clear()
    cfg = schema.from_composed(composed)
    told = origins.of_layers(layers)
    for override in sorted(overrides, key=named.__contains__):
        _tell(override, told)
    if "name" not in chosen and cfg.name == RunConfig.name:
        cfg.name = recipe
        told["name"] = f"recipe {recipe}"
    groups = frozenset(override.key_or_group for override in overrides if _is_choice(override))
    return Composed(cfg, recipe, known[recipe], layers, groups, origins.whole(told, cfg))


def _layers(lines: list[str], known: dict[str, Path], read: dict[str, dict[str, Any]]) -> list[Layer]:
    """Return what Hydra merges, in its order, without the schema and its own settings."""
    loader = GlobalHydra.instance().config_loader()
    layers = []
    for default in loader.compute_defaults_list("config", lines, RunMode.RUN).defaults:
        group, _, name = str(default.config_path).partition("/")
        if group == "recipe":
            layers.append(Layer(f"recipe {name}", known[name], read[name]))
        elif group in GROUPS:
            file = shipped("conf") / group / f"{name}.yaml"
            stated = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            layers.append(Layer(f"group {group}={name}", file, {group: stated}))
    return layers


def _tell(override: Override, told: Origins) -> None:
    """Note what a word of the command line changed."""
    key = override.key_or_group.replace("[", ".").replace("]", "")
    if _is_choice(override):
        return  # its layer says it
    if override.is_delete() or schema.is_dict(key):  # as `_apply` has it
        origins.forget(told, key)
    if not override.is_delete():
        origins.state(told, key, override.value(), origins.COMMAND)


def _is_choice(override: Override) -> bool:
    """Whether a word chooses a recipe or an option of a group, or none of it."""
    key = override.key_or_group
    return key == "recipe" or (key in GROUPS and not isinstance(override.value(), dict))


def _explain(error: Exception, recipe: str) -> ConfigError:
    """Turn Hydra's or OmegaConf's complaint into one sentence with the key, or with the recipe."""
    cause = error.__cause__ or error.__context__ if isinstance(error, HydraException) else error
    if not isinstance(cause, OmegaConfBaseException):
        reason = " ".join(str(error).split()).split(" Config search path:")[0]
        return ConfigError(f"recipe={recipe}: {reason}")
    sentence = schema.explain(cause)
    return sentence if getattr(cause, "full_key", None) else ConfigError(f"recipe={recipe}: {sentence}")


def _is_named(override: Override) -> bool:
    """Whether a value concerns names of the user's choosing, such as ``data.sources.mine.path``."""
    parts = override.key_or_group.split(".")
    heads = (".".join(parts[:at]) for at in range(1, len(parts) + 1))
    return not override.is_delete() and any(schema.is_dict(head) for head in heads)


def _apply(named: Sequence[Override], composed: DictConfig) -> None:
    """Set values at names of the user's choosing: Hydra takes no new ones, and adds to old ones."""
    OmegaConf.set_struct(composed, False)
    for override in named:
        key = override.key_or_group
        if schema.is_dict(key):  # who gives the whole group means these names alone
            OmegaConf.update(composed, key, {}, merge=False)
        tree = OmegaConf.create()
        OmegaConf.update(tree, key, override.value())
        composed.merge_with(tree)
