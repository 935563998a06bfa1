"""Stages that fit together, and a fingerprint that changes with what decides a result alone."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftpipe import artifacts, pipeline, schema
from ftpipe.choices import EvalFormat, Format, Init, Precision, Role, TemplateName
from ftpipe.config import EvalSetConfig, ModelConfig, RunConfig, SourceConfig
from ftpipe.errors import ConfigError, UserError
from ftpipe.pipeline import STAGES, Stage, check_stages, plan
from ftpipe.schema import all_keys
from ftpipe.slurm_config import StageJobConfig

from .test_config import COMMIT, put
from .test_schema import another

Change = Callable[[RunConfig], object]
ALL = {"model", "prepare", "sft"}


def prints(cfg: RunConfig) -> dict[str, str]:
    """Return the fingerprint of each stage."""
    return {step.stage.name: step.fingerprint for step in plan(cfg)}


def changed(cfg: RunConfig, change: Change) -> set[str]:
    """Return the stages whose fingerprint a change of the configuration changes."""
    other = copy.deepcopy(cfg)
    change(other)
    before, after = prints(cfg), prints(other)
    assert list(before) == list(after)
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def pretrained(cfg: RunConfig, empty_folder: Path) -> RunConfig:
    """Return the configuration with a model folder, as far as a plan looks at one."""
    (empty_folder / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (empty_folder / "base" / name).write_text(f"bytes of {name}", encoding="utf-8")
    cfg.model = ModelConfig(path="base", architecture={"model_type": "llama"})
    return cfg


# --- stages ---


def test_a_need_that_nothing_makes_is_refused_with_who_could(cfg: RunConfig) -> None:
    cfg.stages = ["sft"]
    with pytest.raises(ConfigError) as refused:
        plan(cfg)
    assert str(refused.value) == (
        "stages: 'sft' needs a dataset, but nothing before it makes one. "
        "Put 'prepare' earlier in `stages`."
    )


def test_the_sentence_of_the_design(monkeypatch: pytest.MonkeyPatch) -> None:
    # DESIGN, "Core things", word for word, with its table: stages are data
    stages = (
        Stage("prepare", does="", makes="dataset"),
        Stage("sft", does="", makes="policy", needs=("dataset",)),
        Stage("dpo", does="", makes="policy", needs=("dataset", "policy")),
    )
    monkeypatch.setattr(pipeline, "STAGES", pipeline.table(*stages))
    with pytest.raises(ConfigError) as refused:
        check_stages(["prepare", "dpo"], RunConfig())
    assert str(refused.value) == (
        "stages: 'dpo' needs a policy, but nothing before it makes one. Put 'sft' or 'dpo' earlier in "
        "`stages`, or set dpo.start=model to start from the base model."
    )
    check_stages(["prepare", "sft", "dpo"], RunConfig())


def test_a_need_takes_the_latest_one_made(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (
        Stage("one", does="", makes="policy", reads=("seed",)),
        Stage("two", does="", makes="policy", needs=("policy",)),
        Stage("three", does="", makes="report", needs=("policy",), takes=("model", "report")),
    )
    monkeypatch.setattr(pipeline, "STAGES", pipeline.table(*stages))
    cfg.stages, cfg.model = ["one", "two", "three"], ModelConfig(path="hub/model")
    assert [dict(step.inputs) for step in plan(cfg)] == [{}, {"policy": "one"}, {"policy": "two"}]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            ["prepare", "stf"],
            "stages: no stage 'stf'. Did you mean 'sft'? Known: model, evolve, prepare, sft",
        ),
        (["prepare", "sft", "sft"], "stages: 'sft' appears twice."),
        (["sft", "prepare"], "stages: 'sft' needs a dataset, "),
        ([], "stages is empty; choose from model, evolve, prepare, sft"),
        (["prepare", ""], "stages: no stage ''."),
        (["model", "prepare", "model"], "stages: 'model' appears twice."),
    ],
)
def test_stages_that_cannot_run_are_refused(cfg: RunConfig, stages: list[str], said: str) -> None:
    cfg.stages = stages
    with pytest.raises(ConfigError) as refused:
        plan(cfg)
    assert str(refused.value).startswith(said)


def test_a_stage_that_the_recipe_lacks_cannot_be_the_last(cfg: RunConfig) -> None:
    cfg.stages = ["prepare"]
    with pytest.raises(ConfigError) as refused:
        plan(cfg, upto="sft")
    assert str(refused.value) == ("the recipe 'mine' has no stage 'sft'; its stages are model, prepare.")


def test_a_plan_ends_at_the_stage_that_was_asked_for(cfg: RunConfig) -> None:
    whole = plan(cfg)
    assert [step.stage.name for step in whole] == ["model", "prepare", "sft"]
    assert plan(cfg, upto="prepare") == whole[:2]
    assert plan(cfg, upto="sft") == whole


@pytest.mark.parametrize(
    ("init", "path", "made"),
    [
        (Init.random, None, True),
        (Init.pretrained, "base.gguf", True),
        (Init.pretrained, "base", False),
        (Init.pretrained, "hub/model", False),
    ],
)
def test_the_base_model_is_made_where_it_is_no_ordinary_folder(
    pretrained: RunConfig, init: Init, path: str | None, made: bool
) -> None:
    cfg = pretrained
    Path("base.gguf").write_text("weights", encoding="utf-8")
    cfg.model.init, cfg.model.path, cfg.model.revision = init, path, COMMIT
    cfg.model.tokenizer = "bytes" if init is Init.random else None
    steps = plan(cfg)
    assert [step.stage.name for step in steps] == ["model"] * made + ["prepare", "sft"]
    base = {"base_model": "model"} if made else {}
    assert [dict(step.inputs) for step in steps[-2:]] == [base, {"dataset": "prepare"} | base]


def test_a_model_stage_that_is_asked_for_is_not_doubled(cfg: RunConfig) -> None:
    cfg.stages = ["model", "prepare"]
    assert [step.stage.name for step in plan(cfg)] == ["model", "prepare"]


# --- fingerprints ---


def test_the_same_configuration_has_the_same_fingerprints(cfg: RunConfig) -> None:
    first = prints(cfg)
    assert prints(copy.deepcopy(cfg)) == first
    for print_ in first.values():
        assert len(print_) == 16 and set(print_) <= set("0123456789abcdef")
    assert len(set(first.values())) == 3


def test_a_plan_writes_nothing(cfg: RunConfig, empty_folder: Path) -> None:
    before = sorted(empty_folder.rglob("*"))
    plan(cfg)
    assert sorted(empty_folder.rglob("*")) == before


# Which stages another value changes. A key that is not here changes those of its group.
GROUPS: dict[str, set[str]] = {
    "model": ALL,
    "adapter": {"sft"},
    "data": {"prepare", "sft"},
    "evolve": set(),  # no stage of these; its own are in test_evolve_plan.py
    "export": set(),  # nor of these
    "sft": {"sft"},
    "launch": set(),
    "tracking": set(),
    "name": set(),
    "output": set(),
    "smoke": set(),
    "seed": ALL,
}
KEYS: dict[str, set[str]] = {
    "model.dtype": {"sft"},  # how it is trained, not what it is
    "model.attention": {"sft"},
    "model.new_tokens": {"prepare", "sft"},  # the base is left as it is
    "model.license": set(),  # told of what is exported
    "model.path": set(),  # unused: its weights are random
    "model.revision": set(),
    "model.tokenizer_revision": set(),  # unused: its tokenizer is made by code
    "data.sources.<name>.path": set(),  # where the rows lie; their bytes count
    "data.sources.<name>.revision": set(),  # unused: the rows are in a file
    "data.sources.<name>.license": set(),
    "data.decontaminate.<name>.path": set(),
    "data.decontaminate.<name>.revision": set(),
    "sft.log_every": set(),  # what is shown on the way
    "launch.precision": {"sft"},  # rounding changes weights
    "launch.tf32": {"sft"},
}
# The choice of stages is no value of any of them; another tokenizer or init needs more than a word.
NOT_TRIED = {"stages", "model.init", "model.tokenizer"}
NOT_TRIED |= {"data.sources.<name>.file"}  # only of a hub dataset
TRIED = [key for key in all_keys() if key.split(".")[0] in GROUPS and key not in NOT_TRIED]


def test_every_key_is_tried() -> None:
    assert {*NOT_TRIED, *KEYS} <= set(all_keys())
    groups = {key.split(".")[0] for key in all_keys()}
    assert set(GROUPS) | {"stages"} <= groups


@pytest.mark.parametrize("key", TRIED)
def test_a_value_changes_the_stages_that_it_decides(
    cfg: RunConfig, rows: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a value by itself, also where it needs another one beside it
    monkeypatch.setattr("ftpipe.combinations.check", lambda cfg, names, elsewhere: None)
    expected = KEYS.get(key, GROUPS[key.split(".")[0]])
    questions = EvalSetConfig(format=EvalFormat.text, path=str(rows))
    cfg.data.decontaminate = {"mine": questions}
    cfg.launch.slurm.stages = {"sft": StageJobConfig()}
    value: Any = None

    def change(other: RunConfig) -> None:
        nonlocal value
        path = key.replace("stages.<name>", "stages.sft").replace("<name>", "mine")
        part: Any = other
        for name in path.split("."):
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        value = another(schema.field_type(path), part)
        if key.endswith("revision"):
            value = COMMIT
        elif key.endswith("<name>.path"):
            value = "elsewhere.json"
            shutil.copy(rows, value)
        put(other, path, value)

    assert changed(cfg, change) == expected, f"{key}={value}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cfg: put(cfg, "sft.learning_rate", 1e-3), {"sft"}),
        (lambda cfg: put(cfg, "seed", 1), ALL),
        (lambda cfg: put(cfg, "data.template", TemplateName.chatml), {"prepare", "sft"}),
        (lambda cfg: put(cfg, "data.learn", [Role.user]), {"prepare", "sft"}),
        (lambda cfg: put(cfg, "launch.precision", Precision.bf16), {"sft"}),
        (lambda cfg: put(cfg, "launch.micro_batch_size", 2), set()),
        (lambda cfg: put(cfg, "launch.processes", 2), set()),
        (lambda cfg: put(cfg, "tracking.project", "other"), set()),
        (lambda cfg: put(cfg, "tracking.tags", ["x"]), set()),
        (lambda cfg: put(cfg, "output", "other"), set()),
        (lambda cfg: put(cfg, "sft.log_every", 1), set()),
        (lambda cfg: cfg.model.architecture.update(num_hidden_layers=3), ALL),
        (lambda cfg: cfg.model.architecture.update(rope_theta=5.0), ALL),
    ],
)
def test_what_a_change_makes_anew(cfg: RunConfig, change: Change, expected: set[str]) -> None:
    assert changed(cfg, change) == expected


def test_one_byte_of_the_data_changes_the_preparation_and_what_follows(
    cfg: RunConfig, rows: Path
) -> None:
    def one_byte(_: RunConfig) -> None:
        text = rows.read_text(encoding="utf-8")
        rows.write_text(text.replace("Green", "Greem"), encoding="utf-8")

    before = prints(cfg)
    one_byte(cfg)
    after = prints(cfg)
    assert {name for name in before if before[name] != after[name]} == {"prepare", "sft"}


def test_moving_the_data_changes_nothing(
    cfg: RunConfig, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints(cfg)
    Path("far/away").mkdir(parents=True)
    rows.rename("far/away/other.json")
    cfg.data.sources["mine"].path = "far/away/other.json"
    assert prints(cfg) == before
    cfg.data.sources["mine"].path = str(Path("far/away/other.json").resolve())
    assert prints(cfg) == before
    # standing in another folder
    monkeypatch.chdir("far")
    cfg.data.sources["mine"].path = "away/other.json"
    assert prints(cfg) == before


def test_renaming_dropping_or_turning_sources_makes_the_data_anew(cfg: RunConfig, rows: Path) -> None:
    Path("b.json").write_text("[{}]", encoding="utf-8")
    mine = cfg.data.sources["mine"]
    second = SourceConfig(format=Format.alpaca, path="b.json")

    def sources(**named: SourceConfig) -> Change:
        return lambda other: put(other, "data.sources", named)

    sources(mine=mine, second=second)(cfg)
    assert changed(cfg, sources(mine=mine)) == {"prepare", "sft"}
    assert changed(cfg, sources(mine=mine, other=second)) == {"prepare", "sft"}
    # rows are prepared in the order of their sources, so the order decides the result
    assert changed(cfg, sources(second=second, mine=mine)) == {"prepare", "sft"}
    assert changed(cfg, sources(mine=second, second=mine)) == {"prepare", "sft"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", {"sft"}),
        ("config.json", {"prepare", "sft"}),  # it may name the tokenizer's class
        ("generation_config.json", {"prepare", "sft"}),
        ("tokenizer.json", {"prepare", "sft"}),
        ("README.md", set()),
    ],
)
def test_a_byte_of_the_model_changes_what_reads_it(
    pretrained: RunConfig, name: str, expected: set[str]
) -> None:
    before = prints(pretrained)
    with (Path("base") / name).open("a", encoding="utf-8") as file:
        file.write("x")
    after = prints(pretrained)
    assert {stage for stage in before if before[stage] != after[stage]} == expected


def test_another_tokenizer_of_a_random_model_changes_its_size_and_all_that_follows(
    cfg: RunConfig,
) -> None:
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_text("one", encoding="utf-8")
    assert changed(cfg, lambda other: put(other, "model.tokenizer", "tokenizer")) == ALL
    cfg.model.tokenizer = "tokenizer"
    before = prints(cfg)
    Path("tokenizer/tokenizer.json").write_text("two", encoding="utf-8")
    after = prints(cfg)
    assert not set(before.values()) & set(after.values())


def test_a_key_is_read_by_its_whole_name(cfg: RunConfig) -> None:
    # data.max is no part of data.max_length
    names = ("data.max", "sf", "model.architecture.hidden", "sft.epochs", "adapter")
    found = pipeline.read_keys(cfg, Stage("x", does="", makes="y", reads=names))
    assert found == {"sft.epochs": 3.0} | {
        f"adapter.{key}": value for key, value in schema.plain(cfg)["adapter"].items()
    }


def test_two_stages_that_read_the_same_are_told_apart(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [Stage(name, does="", makes=name) for name in ("one", "two")]
    monkeypatch.setattr(pipeline, "STAGES", pipeline.table(*stages))
    cfg.stages, cfg.model = ["one", "two"], ModelConfig(path="hub/model")
    assert len(set(prints(cfg).values())) == 2


def test_a_plan_remembers_digests_beside_the_artifacts(
    cfg: RunConfig, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 10_000_000_000)
    monkeypatch.setattr("ftpipe.pins.time", later)
    Path("outputs/artifacts").mkdir(parents=True)
    plan(cfg)
    monkeypatch.setattr("ftpipe.pins.digest", None)  # nothing can be read anew
    assert plan(cfg)
    with rows.open("a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(TypeError):
        plan(cfg)


def test_moving_the_model_changes_nothing(pretrained: RunConfig) -> None:
    before = prints(pretrained)
    Path("base").rename("moved")
    pretrained.model.path = str(Path("moved").resolve())
    assert prints(pretrained) == before


def test_the_architecture_of_a_pretrained_model_is_its_own(pretrained: RunConfig) -> None:
    # it only tells the smoke form which tiny model stands in
    assert changed(pretrained, lambda cfg: cfg.model.architecture.update(hidden_size=8)) == set()


def test_a_hub_commit_is_what_a_hub_model_is(cfg: RunConfig) -> None:
    cfg.model = ModelConfig(path="hub/model", revision=COMMIT)
    assert changed(cfg, lambda other: put(other, "model.revision", COMMIT[::-1])) == {"prepare", "sft"}
    assert changed(cfg, lambda other: put(other, "model.path", "hub/other")) == {"prepare", "sft"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda cfg: put(cfg, "model", ModelConfig(path="hub/model")), "model.revision"),
        (lambda cfg: put(cfg, "data.sources.mine.path", "hub/rows"), "data.sources.mine.revision"),
        (
            lambda cfg: put(
                cfg, "model", ModelConfig(path="hub/model", revision=COMMIT, tokenizer="hub/other")
            ),
            "model.tokenizer_revision",
        ),
    ],
)
def test_a_hub_id_without_a_commit_is_refused(cfg: RunConfig, change: Change, key: str) -> None:
    change(cfg)
    with pytest.raises(ConfigError) as refused:
        plan(cfg)
    assert str(refused.value).endswith(f"pin it with {key}=<commit>.")


def test_raising_a_stages_version_makes_it_and_what_follows_anew(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints(cfg)
    raised = Stage(**{**vars(STAGES["prepare"]), "version": STAGES["prepare"].version + 1})
    monkeypatch.setitem(STAGES, "prepare", raised)
    after = prints(cfg)
    assert {name for name in before if before[name] != after[name]} == {"prepare", "sft"}


def test_all_ranks_work_on_the_stage_that_trains() -> None:
    assert STAGES["sft"].all_ranks
    assert not STAGES["model"].all_ranks and not STAGES["prepare"].all_ranks


def test_every_key_that_a_stage_reads_is_in_the_schema() -> None:
    known = all_keys()
    for stage in STAGES.values():
        for read in stage.reads:
            assert any(key == read or key.startswith(f"{read}.") for key in known), read
    for key in pipeline.UNREAD_KEYS:
        assert key in known


# --- what a run leaves behind ---


def test_a_plan_finds_what_is_finished(cfg: RunConfig) -> None:
    step = plan(cfg)[0]
    assert step.artifact is None
    step.place.mkdir(parents=True)
    assert plan(cfg)[0].artifact is None  # a folder without a manifest is no artifact
    manifest = {"kind": "base_model", "stage": "model", "fingerprint": step.fingerprint}
    (step.place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert plan(cfg)[0].artifact == artifacts.open_artifact(step.place)


def test_the_run_is_written_under_its_name_and_digest(cfg: RunConfig) -> None:
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    assert folder.parent == Path("outputs/runs")
    assert folder.name.startswith("mine-")
    assert schema.load(folder / "run.yaml") == cfg
    # an edit does not last: the file says what runs
    (folder / "run.yaml").write_text("edited", encoding="utf-8")
    assert pipeline.write_run(cfg, schema.dump(cfg)) == folder
    assert schema.load(folder / "run.yaml") == cfg
    cfg.tracking.tags = ["x"]  # other words, another run
    assert pipeline.write_run(cfg, schema.dump(cfg)) != folder


def test_a_run_says_which_artifacts_its_stages_stand_for(cfg: RunConfig) -> None:
    folder = pipeline.write_run(cfg, schema.dump(cfg))
    steps = plan(cfg)
    pipeline.record(folder, steps)
    assert json.loads((folder / "artifacts.json").read_text(encoding="utf-8")) == {
        step.stage.name: f"{step.stage.name}-{step.fingerprint}" for step in steps
    }


def test_an_output_folder_that_cannot_be_written_is_named(cfg: RunConfig, rows: Path) -> None:
    cfg.output = str(rows / "outputs")
    with pytest.raises(UserError) as refused:
        pipeline.write_run(cfg, "x")
    assert str(refused.value) == (
        f"output={rows}/outputs cannot be written (Not a directory); "
        "choose another folder with output=PATH."
    )
