"""The configuration as a file and as keys: what fits comes back the same, what does not is named."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import ftpipe
from ftpipe import compose, schema
from ftpipe.choices import Format, Method, Precision, Role
from ftpipe.config import RunConfig, SourceConfig
from ftpipe.errors import ConfigError
from ftpipe.schema import all_keys
from ftpipe.training_config import TrainingConfig

SOURCE = Path(ftpipe.__file__).parent


def another(hint: Any, old: Any) -> Any:
    """Return a value of a type, other than ``old``."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind = kinds[0]
    if typing.get_origin(hint) is list:
        return [another(kind, None), another(kind, another(kind, None))]
    if typing.get_origin(hint) is dict and typing.get_args(hint)[1] is str:
        return {"no": "3"}
    if typing.get_origin(hint) is dict:
        return {"model_type": "llama", "nested": {"a": 1, "no": [1.5, None, "no"]}}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(member for member in kind if member is not old)
    if kind is bool:
        return not old
    if kind is str:
        return "no" if old != "no" else "3"  # YAML reads both as something else
    return kind(7 if old != 7 else 8)


def filled(kind: type) -> Any:
    """Return a config dataclass of which no field has its default."""
    made = kind()
    for name, hint in schema.fields_of(kind).items():
        entry = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            setattr(made, name, filled(hint))
        elif dataclasses.is_dataclass(entry) and isinstance(entry, type):
            setattr(made, name, {"a b": filled(entry), "no": filled(entry)})
        else:
            setattr(made, name, another(hint, getattr(made, name)))
    return made


def leaves(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(cfg).items():
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for entry in value.values():
                yield from leaves(entry, f"{prefix}{name}.<name>.")
        else:
            yield f"{prefix}{name}", value


def test_a_configuration_of_no_defaults_comes_back_from_its_file(tmp_path: Path) -> None:
    cfg = filled(RunConfig)
    defaults = dict(leaves(RunConfig()))
    same = [key for key, value in leaves(cfg) if key in defaults and defaults[key] == value]
    assert same == []  # else the round trip would prove nothing for them
    (tmp_path / "run.yaml").write_text(schema.dump(cfg), encoding="utf-8")
    assert schema.load(tmp_path / "run.yaml") == cfg


def test_the_file_is_plain_yaml_with_the_keys_in_the_order_of_the_schema() -> None:
    cfg = filled(RunConfig)
    # read by PyYAML, which knows nothing of the schema
    assert yaml.safe_load(schema.dump(cfg)) == schema.plain(cfg)
    assert list(schema.plain(cfg)) == [field.name for field in dataclasses.fields(RunConfig)]


def test_plain_has_no_enums_left() -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                assert type(key) is str
                check(entry)
        elif isinstance(value, list):
            for entry in value:
                check(entry)
        else:
            assert type(value) in (str, int, float, bool, type(None)), value

    check(schema.plain(filled(RunConfig)))


def test_keys_are_all_the_leaves() -> None:
    listed = all_keys()
    assert sorted(listed) == sorted({key for key, _ in leaves(filled(RunConfig))})
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"lr": 1}, "unknown key 'lr'. Did you mean 'sft.learning_rate'?"),
        ({"sft": {"lr": 1}}, "unknown key 'sft.lr'. Did you mean 'sft.learning_rate'?"),
        (
            {"sft": {"learning_rte": 1}},
            "unknown key 'sft.learning_rte'. Did you mean 'sft.learning_rate'?",
        ),
        (
            {"data": {"sources": {"mine": {"pth": "x"}}}},
            "unknown key 'data.sources.mine.pth'. Did you mean 'data.sources.<name>.path'?",
        ),
        ({"sft": {"epochs": {"a": 1}}}, "sft.epochs"),
        ({"qqqqqq": 1}, "unknown key 'qqqqqq'."),
    ],
)
def test_an_unknown_key_is_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        schema.from_composed(OmegaConf.create(tree))
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sft.learning_rate", "fast", "a number"),
        ("sft.epochs", True, "a number"),
        ("seed", 1.5, "a whole number"),
        ("seed", "one", "a whole number"),
        ("sft.max_steps", "all", "a whole number or null"),
        ("smoke", "maybe", "true or false"),
        ("data.validation", None, "a number"),
        ("model.path", ["a"], "text or null"),
        ("name", None, "text"),
        ("stages", "prepare", "a list such as [text]"),
        ("stages", [["prepare", "sft"]], "a list such as [text]"),
        ("data.learn", [["user"]], "one of system, user, assistant"),
        ("data.learn", None, "one of system, user, assistant"),
        ("model.architecture", 3, "a group of keys"),
        ("data.sources.mine", 3, "a group of keys"),
        ("model.init", None, "one of pretrained, random"),
        ("data.sources.mine.rows", "few", "a whole number or null"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: Any, expected: str) -> None:
    tree = OmegaConf.create()
    OmegaConf.update(tree, key, value)
    with pytest.raises(ConfigError) as refused:
        schema.from_composed(tree)
    assert str(refused.value).startswith(key)
    assert str(refused.value).endswith(f"; expected {expected}.")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "adapter.method",
            "qlra",
            "adapter.method=qlra is not one of full, lora, qlora. Did you mean 'qlora'?",
        ),
        (
            "data.learn",
            ["user", "asistant"],
            "data.learn[1]=asistant is not one of system, user, assistant. Did you mean 'assistant'?",
        ),
        (
            "launch.precision",
            "bf61",
            "launch.precision=bf61 is not one of auto, fp32, bf16, fp16. Did you mean 'bf16'?",
        ),
        ("adapter.method", "zzz", "adapter.method=zzz is not one of full, lora, qlora."),
        ("model.init", "it's", "model.init=it's is not one of pretrained, random."),
    ],
)
def test_a_misspelled_choice_is_met_by_the_nearest(key: str, value: Any, sentence: str) -> None:
    tree = OmegaConf.create()
    OmegaConf.update(tree, key, value)
    with pytest.raises(ConfigError) as refused:
        schema.from_composed(tree)
    assert str(refused.value) == sentence


@pytest.mark.parametrize("key", ["format", "path"])
def test_a_source_without_format_or_path_is_refused(key: str) -> None:
    source = {"format": "alpaca", "path": "rows.json"}
    del source[key]
    with pytest.raises(ConfigError) as refused:
        schema.from_composed(OmegaConf.create({"data": {"sources": {"mine": source}}}))
    assert str(refused.value).startswith(f"data.sources.mine.{key} is not set; expected ")


def test_words_and_numbers_take_the_type_of_their_key() -> None:
    cfg = schema.from_composed(
        OmegaConf.create(
            {
                "seed": "3",
                "adapter": {"method": "lora"},
                "sft": {"learning_rate": "1e-4", "epochs": 3},
                "data": {
                    "learn": ["user"],
                    "packing": "yes",
                    "sources": {"x": {"format": "oasst", "path": "y"}},
                },
            }
        )
    )
    assert cfg.seed == 3
    assert cfg.adapter.method is Method.lora
    assert (cfg.sft.learning_rate, cfg.sft.epochs, cfg.data.packing) == (1e-4, 3.0, True)
    assert type(cfg.sft.epochs) is float
    assert cfg.data.learn == [Role.user]
    assert cfg.data.sources == {"x": SourceConfig(format=Format.oasst, path="y")}


def test_a_value_may_be_taken_from_another_key() -> None:
    cfg = schema.from_composed(OmegaConf.create({"seed": 5, "name": "seed-${seed}"}))
    assert cfg.name == "seed-5"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("seed", int),
        ("launch.precision", Precision),
        ("data.sources.anything.path", str),
        ("data.learn[0]", Role),
        ("model.architecture.hidden_size", Any),
        ("model.architecture.rope_scaling.factor", Any),
        ("sft.lr", None),
        ("seed.x", None),
        ("model.path.x", None),
        ("data.sources.anything.pth", None),
    ],
)
def test_the_type_behind_a_key(key: str, kind: Any) -> None:
    assert schema.field_type(key) == kind


def test_every_key_is_read_by_something() -> None:
    """Walk the schema: a key nobody reads is a promise nobody keeps.

    A read is ``<group>.<key>``, such as ``cfg.sft.epochs``, ``sft.epochs`` or ``source.path``, outside
    of the files that define, check or shrink the configuration.
    """
    read: set[tuple[str, str]] = set()
    for file in SOURCE.rglob("*.py"):
        if file.name.endswith("config.py") or file.name in ("schema.py", "smoke.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                read.add((name.removeprefix("_"), node.attr))
    shared = {field.name for field in dataclasses.fields(TrainingConfig)}  # by whatever trains
    for key in all_keys():
        *path, leaf = key.split(".")
        group = "cfg" if not path else {"<name>": "source"}.get(path[-1], path[-1])
        group = "job" if key.startswith("launch.slurm.stages.") else group
        group = "task" if key.startswith("evaluate.harness.tasks.") else group
        by_all = path[-1:] in (["sft"], ["reward"], ["dpo"], ["ppo"]) and leaf in shared
        assert (group, leaf) in read or (by_all and ("training", leaf) in read), f"nobody reads {key}"


def test_no_target_anywhere() -> None:
    # _target_ would run whatever a YAML file names
    files = [file for name in ("conf", "recipes") for file in compose.shipped(name).rglob("*.yaml")]
    assert len(files) > 10
    for file in files:
        assert "_target_" not in file.read_text(encoding="utf-8"), file
    for source in SOURCE.rglob("*.py"):
        assert "_target_" not in source.read_text(encoding="utf-8"), source


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "run.yaml cannot be read ("),
        (b"\xff\xfe\x00", "run.yaml cannot be read ("),
        (b"- a\n", "run.yaml holds no configuration."),
        (None, "run.yaml cannot be read (No such file or directory)."),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(
    content: bytes | None, said: str, empty_folder: Path
) -> None:
    if content is not None:
        Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        schema.load(Path("run.yaml"))
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_the_plain_form_is_that_of_the_moment() -> None:
    cfg = RunConfig()
    first = schema.plain(cfg)
    first["seed"], first["model"]["architecture"]["x"] = 99, 1  # the caller's own
    assert schema.plain(cfg)["seed"] == 0 and schema.plain(cfg)["model"]["architecture"] == {}
    cfg.model.architecture["x"] = 2
    cfg.sft.learning_rate = 1e-3
    again = schema.plain(cfg)
    assert (again["model"]["architecture"], again["sft"]["learning_rate"]) == ({"x": 2}, 1e-3)
    assert again == OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
