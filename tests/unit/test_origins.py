"""Where each value came from: the file or the word that says it last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftpipe import compose, origins, schema
from ftpipe.config import EvalSetConfig, RunConfig, SourceConfig
from ftpipe.evaluate_config import TextsConfig
from ftpipe.resolve import resolved

Write = Callable[[str, str], None]


@pytest.fixture
def recipe(empty_folder: Path) -> Write:
    """Write a recipe into ./recipes."""

    def write(name: str, text: str) -> None:
        (empty_folder / "recipes").mkdir(exist_ok=True)
        (empty_folder / "recipes" / f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def told(*words: str) -> dict[str, str]:
    (run,) = resolved(words)
    return run.told


# --- who says it last ---


def test_a_value_is_of_the_recipe_that_says_it_last(recipe: Write) -> None:
    recipe("first", "defaults: [tiny]\nsft: {epochs: 9, weight_decay: 0.1, batch_size: 4}\n")
    recipe("second", "defaults: [first]\nsft: {epochs: 10}\n")
    found = told("recipe=second", "sft.batch_size=8", "sft.adam_beta2=0.9")
    assert found["sft.epochs"] == "recipe second"
    assert found["sft.weight_decay"] == "recipe first"
    assert found["sft.learning_rate"] == found["launch.threads"] == "recipe tiny"
    assert found["sft.batch_size"] == found["sft.adam_beta2"] == "command line"
    assert found["sft.max_grad_norm"] == found["seed"] == "default"


def test_the_word_counts_even_where_it_says_the_same(recipe: Write) -> None:
    recipe("again", "defaults: [tiny]\nseed: 0\n")
    assert told("recipe=again")["seed"] == "recipe again"
    assert told("recipe=again", "seed=0")["seed"] == "command line"


def test_an_option_is_named_whoever_chose_it(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny, {override /adapter: qlora}]\n")
    # conf/adapter/full.yaml, lora.yaml and qlora.yaml say the method; conf/launch/cpu.yaml the device
    assert told("recipe=tiny")["adapter.method"] == "group adapter=lora"
    assert told("recipe=mine")["adapter.method"] == "group adapter=qlora"
    assert told("recipe=mine", "adapter=full")["adapter.method"] == "group adapter=full"
    assert told("recipe=mine")["launch.device"] == "group launch=cpu"


def test_a_recipe_wins_over_an_option_that_is_typed() -> None:
    (run,) = resolved(["recipe=tiny", "launch=auto"])
    written = yaml.safe_load((compose.shipped("recipes") / "tiny.yaml").read_text(encoding="utf-8"))
    assert run.cfg.launch.threads == written["launch"]["threads"]
    assert run.told["launch.threads"] == "recipe tiny"


def test_the_name_is_the_recipes(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\nname: called\n")
    recipe("other", "defaults: [mine]\n")
    assert told("recipe=tiny")["name"] == "recipe tiny"
    assert told("recipe=other")["name"] == "recipe mine"
    assert told("recipe=tiny", "name=better")["name"] == "command line"


# --- names of the user's choosing ---

SOURCES = "data.sources"


def test_of_a_source_each_key_has_its_own_origin(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\ndata: {sources: {alpaca: {count: 5}}}\n")
    found = told("recipe=mine", f"{SOURCES}.alpaca.weight=2")
    assert found[f"{SOURCES}.alpaca.path"] == "group data=sample"
    assert found[f"{SOURCES}.alpaca.count"] == "recipe mine"
    assert found[f"{SOURCES}.alpaca.weight"] == "command line"
    assert found[f"{SOURCES}.alpaca.split"] == "default"


def test_a_whole_group_of_names_is_the_command_lines_and_the_rest_default(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\ndata: {sources: {alpaca: {count: 5}}}\n")
    found = told("recipe=mine", f"{SOURCES}={{alpaca: {{format: alpaca, path: 'sample:alpaca.json'}}}}")
    ours = {key.rsplit(".", 1)[1]: origin for key, origin in found.items() if key.startswith(SOURCES)}
    assert set(ours) == set(vars(SourceConfig()))
    assert {key for key, origin in ours.items() if origin == "command line"} == {"format", "path"}
    # the count that the recipe gave went with its source
    assert {origin for key, origin in ours.items() if key not in ("format", "path")} == {"default"}


def test_one_name_set_as_a_whole_is_merged_into_what_it_was(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\ndata: {sources: {alpaca: {count: 5}}}\n")
    found = told("recipe=mine", f"{SOURCES}.alpaca={{weight: 2}}")
    keys = [found[f"{SOURCES}.alpaca.{name}"] for name in ("weight", "count", "path", "split")]
    assert keys == ["command line", "recipe mine", "group data=sample", "default"]


def test_what_is_deleted_has_no_origin() -> None:
    found = told("recipe=tiny", f"~{SOURCES}.alpaca")
    assert not [key for key in found if key.startswith(f"{SOURCES}.alpaca.")]
    assert [key for key in found if key.startswith(f"{SOURCES}.oasst1.")]


@pytest.mark.parametrize("new_first", [True, False])  # either way it is deleted, then set
def test_what_is_deleted_and_given_anew_keeps_nothing_of_before(new_first: bool, recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\ndata: {sources: {alpaca: {count: 5}}}\n")
    new = f"{SOURCES}.alpaca={{format: alpaca, path: 'sample:alpaca.json'}}"
    gone = f"~{SOURCES}.alpaca"
    (run,) = resolved(["recipe=mine", *((new, gone) if new_first else (gone, new))])
    assert run.cfg.data.sources["alpaca"].count is None
    assert run.told[f"{SOURCES}.alpaca.count"] == "default"
    assert run.told[f"{SOURCES}.alpaca.path"] == "command line"


def test_an_empty_group_is_of_who_emptied_it() -> None:
    assert told("recipe=tiny")["data.decontaminate"] == "default"
    assert told("recipe=tiny", "data.decontaminate={}")["data.decontaminate"] == "command line"


def test_an_empty_group_of_a_recipe_takes_nothing_away(recipe: Write) -> None:
    recipe("mine", "defaults: [tiny]\ndata: {sources: {}}\n")
    (run,) = resolved(["recipe=mine"])
    assert run.cfg.data.sources["alpaca"].path
    assert run.told[f"{SOURCES}.alpaca.path"] == "group data=sample"


def test_a_key_behind_plus_is_the_command_lines() -> None:
    assert told("recipe=tiny", "++sft.epochs=2")["sft.epochs"] == "command line"


# --- smoke and the machine ---


def test_what_smoke_swaps_is_smokes_and_what_it_keeps_is_not() -> None:
    found = told("recipe=qlora-llama7b", "smoke=true")
    assert found["smoke"] == "command line"
    swapped = ("model.init", "model.tokenizer", "sft.max_steps", "data.validation")
    assert {found[key] for key in swapped} == {"smoke"}
    kept = {
        "adapter.r": "recipe qlora-llama7b",
        "data.template": "recipe qlora-llama7b",
        "model.architecture.model_type": "group model=llama-7b",
    }
    assert {key: found[key] for key in kept} == kept
    assert found["model.architecture.hidden_size"] == "smoke"


def test_what_the_machine_fills_in_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = told("recipe=tiny", "launch=auto")
    assert (found["launch.device"], found["launch.precision"]) == ("this machine", "this machine")
    found = told("recipe=tiny", "launch.precision=fp32")
    assert (found["launch.device"], found["launch.precision"]) == ("group launch=cpu", "command line")


def test_in_a_job_the_precision_follows_from_the_device() -> None:
    (run,) = resolved(["recipe=tiny", "launch=slurm-cpu", "launch.precision=auto"], elsewhere=True)
    assert run.told["launch.precision"] == "launch.device"


def test_a_sweep_has_origins_of_its_own() -> None:
    first, second = resolved(["recipe=tiny", "adapter=lora,qlora", "-m"])
    assert first.told["adapter.method"] == "group adapter=lora"
    assert second.told["adapter.method"] == "group adapter=qlora"


# --- every shipped recipe, held to its own file and to the schema ---


def of_defaults(cfg: RunConfig) -> dict[str, Any]:
    """Return the schema's values by dotted key, with as many named entries as a configuration has."""
    bare = RunConfig()
    bare.data.sources = {name: SourceConfig() for name in cfg.data.sources}
    bare.data.decontaminate = {name: EvalSetConfig() for name in cfg.data.decontaminate}
    bare.evaluate.prompts = {name: TextsConfig() for name in cfg.evaluate.prompts}
    return flat(schema.plain(bare))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inside = flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else None
        found |= {f"{prefix}{name}": value} if inside is None else inside
    return found


@pytest.mark.parametrize(
    "name", ["tiny-dpo", "zephyr-7b-dpo-qlora", "instructgpt-tldr-pythia1b", "rlhf-llama7b"]
)
def test_a_shipped_recipes_values_are_where_they_are_said_to_be(name: str) -> None:
    (run,) = compose.composed([f"recipe={name}"])
    values, bare = flat(schema.plain(run.cfg)), of_defaults(run.cfg)
    assert set(run.told) == set(values)
    for key, origin in run.told.items():
        if origin == "default":
            assert values[key] == bare[key], key
    file = compose.shipped("recipes") / f"{name}.yaml"
    stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    own = {key for key in flat(stated) if not key.startswith("defaults")} | {"name"}
    assert {key for key, origin in run.told.items() if origin == f"recipe {name}"} == own


# --- shown and kept ---


def test_the_plan_says_behind_each_value_where_it_came_from() -> None:
    (run,) = resolved(["recipe=tiny", "seed=3", "data.sources.alpaca.languages=[no,en]"])
    text = origins.commented(schema.dump(run.cfg), run.told)
    assert yaml.safe_load(text) == schema.plain(run.cfg)
    lines = {line.split("#")[0].rstrip(): line.partition("#")[2].strip() for line in text.splitlines()}
    assert lines["seed: 3"] == "command line"
    assert lines["  learning_rate: 0.005"] == "recipe tiny"
    assert lines["stages:"] == "recipe tiny"
    assert lines["      languages:"] == "command line"  # of alpaca; of others it is []
    assert lines["output: outputs"] == lines["- prepare"] == lines["sft:"] == ""
    columns = {line.index("  # ") for line in text.splitlines() if "  # " in line and len(line) < 60}
    assert len(columns) == 1


def test_values_of_several_lines_and_long_ones_stay_yaml(cfg: RunConfig) -> None:
    cfg.launch.slurm.setup = ["module load a\nmodule load b\n", "x" * 200, "a # b"]
    cfg.launch.slurm.venv = "two words " * 30
    cfg.launch.slurm.account = "one\ntwo\n"
    cfg.data.sources["mine"].columns = {"prompt": "a: b # c"}
    dumped = schema.dump(cfg)
    everything = dict.fromkeys(flat(schema.plain(cfg)), "command line")
    text = origins.commented(dumped, everything)
    assert yaml.safe_load(text) == yaml.safe_load(dumped) == schema.plain(cfg)
    assert text.count("  # command line") == len(everything)


def test_origins_are_kept_beside_the_run(tmp_path: Path) -> None:
    assert origins.read(tmp_path) == {}
    origins.write(tmp_path, {"seed": "command line"})
    assert origins.read(tmp_path) == {"seed": "command line"}
    assert [file.name for file in tmp_path.iterdir()] == ["origins.json"]
