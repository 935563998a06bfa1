"""From the words of a command line to configurations: recipes, overrides and sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftpipe import compose
from ftpipe.choices import Format, Method, Scheduler
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError

Recipe = Callable[[str, str], Path]


@pytest.fixture
def recipe(empty_folder: Path) -> Recipe:
    """Write a recipe into ./recipes."""

    def write(name: str, text: str) -> Path:
        file = empty_folder / "recipes" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


def one(*words: str) -> RunConfig:
    (cfg,) = compose.runs(words)
    return cfg


def refusal(*words: str, multirun: bool = False) -> str:
    with pytest.raises(ConfigError) as refused:
        compose.runs(words, multirun=multirun)
    return str(refused.value)


def shipped(name: str) -> dict[str, object]:
    """Return a shipped recipe as PyYAML reads it."""
    text = (compose.shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    tree: dict[str, object] = yaml.safe_load(text)
    return tree


def test_a_recipe_is_found_by_its_name(empty_folder: Path) -> None:
    cfg = one("recipe=tiny")
    assert cfg.name == "tiny"
    written = shipped("tiny")["sft"]
    assert isinstance(written, dict)
    assert (cfg.sft.learning_rate, cfg.sft.epochs) == (written["learning_rate"], written["epochs"])
    assert cfg.adapter.method is Method.lora
    assert cfg.model.architecture["model_type"] == "llama"
    assert "recipe" not in vars(cfg)


def test_what_a_recipe_leaves_out_is_the_default(empty_folder: Path) -> None:
    cfg = one("recipe=tiny")
    assert "weight_decay" not in str(shipped("tiny"))
    assert cfg.sft.weight_decay == RunConfig().sft.weight_decay


@pytest.mark.slow
def test_every_shipped_recipe_composes(empty_folder: Path) -> None:
    files = sorted((compose.shipped("recipes")).glob("*.yaml"))
    assert [cfg.name for cfg in compose.runs(["recipe=glob(*)"], multirun=True)] == [
        file.stem for file in files
    ]


@pytest.mark.slow
@pytest.mark.parametrize("group", compose.GROUPS)
def test_every_option_of_a_group_composes_and_every_group_has_its_folder(
    group: str, empty_folder: Path
) -> None:
    options = sorted(file.stem for file in (compose.shipped("conf") / group).glob("*.yaml"))
    assert options
    assert len(compose.runs(["recipe=tiny", f"{group}=glob(*)"], multirun=True)) == len(options)
    folders = {path.name for path in compose.shipped("conf").iterdir() if path.is_dir()}
    assert folders == set(compose.GROUPS)


def test_the_users_own_recipe_wins_over_the_shipped_one(recipe: Recipe) -> None:
    recipe("tiny", "# Mine.\nsft: {epochs: 11}\n")
    file = recipe("other", "sft: {epochs: 12}\n")
    assert one("recipe=tiny").sft.epochs == 11
    assert one("recipe=other").sft.epochs == 12
    assert compose.recipes()["other"] == file
    assert {"tiny", "other", "qlora-llama7b"} <= set(compose.recipes())


def test_a_recipe_extends_another_with_its_own_keys(recipe: Recipe) -> None:
    recipe("longer", "defaults: [tiny]\nsft: {epochs: 9}\n")
    tiny, longer = one("recipe=tiny"), one("recipe=longer")
    assert longer.name == "longer"
    assert (tiny.sft.epochs, longer.sft.epochs) == (3, 9)
    tiny.sft.epochs, tiny.name = 9, "longer"
    assert longer == tiny


def test_a_recipe_extends_a_recipe_that_extends_another(recipe: Recipe) -> None:
    recipe("middle", "defaults: [tiny]\nsft: {epochs: 9, weight_decay: 0.1}\n")
    recipe("last", "defaults: [middle, {override /adapter: qlora}]\nsft: {epochs: 10}\n")
    cfg = one("recipe=last")
    assert (cfg.sft.epochs, cfg.sft.weight_decay, cfg.sft.batch_size) == (10, 0.1, 8)
    assert cfg.adapter.method is Method.qlora


def test_a_recipe_chooses_options_of_groups(recipe: Recipe) -> None:
    recipe("mine", "defaults:\n  - override /adapter: qlora\n  - override /data: alpaca\n")
    cfg = one("recipe=mine")
    assert cfg.adapter.method is Method.qlora
    assert cfg.data.sources["alpaca"].path == "tatsu-lab/alpaca"
    # the command line has the last word
    assert one("recipe=mine", "adapter=lora").adapter.method is Method.lora


def test_a_recipe_may_name_its_runs(recipe: Recipe) -> None:
    recipe("mine", "name: called\n")
    assert one("recipe=mine").name == "called"
    assert one("recipe=mine", "name=better").name == "better"
    assert one("recipe=mine", "name=run").name == "run"  # the default, but asked for


def test_norwegian_is_a_language_and_no_boolean(recipe: Recipe) -> None:
    recipe(
        "nordic",
        "data:\n  sources:\n"
        "    oasst: {format: oasst, path: 'sample:oasst1.jsonl', languages: [no, en]}\n"
        "sft: {gradient_checkpointing: true, group_by_length: False}\n",
    )
    cfg = one("recipe=nordic")
    assert cfg.data.sources["oasst"].languages == ["no", "en"]
    assert (cfg.sft.gradient_checkpointing, cfg.sft.group_by_length) == (True, False)
    assert one("recipe=tiny", "data.sources.oasst1.languages=[no]").data.sources["oasst1"].languages == [
        "no"
    ]


def test_overrides_have_the_last_word(empty_folder: Path) -> None:
    cfg = one(
        "recipe=tiny",
        "sft.learning_rate=1e-4",
        "sft.scheduler=linear",
        "stages=[prepare]",
        "sft.max_steps=null",
        "adapter.targets=[q_proj,v_proj]",
    )
    assert cfg.sft.learning_rate == 1e-4
    assert cfg.sft.scheduler is Scheduler.linear
    assert cfg.stages == ["prepare"]
    assert cfg.sft.max_steps is None
    assert cfg.adapter.targets == ["q_proj", "v_proj"]


def test_the_last_recipe_and_the_last_value_count(empty_folder: Path) -> None:
    cfg = one("recipe=alpaca-7b", "seed=1", "recipe=tiny", "seed=2")
    assert (cfg.name, cfg.seed) == ("tiny", 2)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_new_source_with_quoted_spaces(plus: str, empty_folder: Path) -> None:
    cfg = one(
        "recipe=tiny",
        f"{plus}data.sources.mine.path='my rows, all.json'",
        f"{plus}data.sources.mine.format=messages",
        'name="two words"',
    )
    assert cfg.data.sources["mine"].path == "my rows, all.json"
    assert cfg.data.sources["mine"].format is Format.messages
    assert cfg.name == "two words"
    assert set(one("recipe=tiny").data.sources) < set(cfg.data.sources)


def test_a_source_of_the_recipe_is_changed_in_place(empty_folder: Path) -> None:
    cfg = one("recipe=tiny", "data.sources.alpaca.rows=5")
    plain = one("recipe=tiny")
    assert cfg.data.sources["alpaca"].rows == 5
    assert cfg.data.sources["alpaca"].path == plain.data.sources["alpaca"].path
    assert list(cfg.data.sources) == list(plain.data.sources)


def test_sources_given_as_a_whole_replace_those_of_the_recipe(empty_folder: Path) -> None:
    cfg = one(
        "recipe=tiny",
        "data.sources={mine: {format: alpaca, path: rows.json}}",
        "data.sources.mine.rows=7",
    )
    assert set(cfg.data.sources) == {"mine"}
    assert cfg.data.sources["mine"].rows == 7
    whole = one("recipe=tiny", "model.architecture={model_type: gpt2}").model.architecture
    assert whole == {"model_type": "gpt2"}


def test_a_source_is_left_out_with_a_tilde(empty_folder: Path) -> None:
    left = set(one("recipe=tiny", "~data.sources.alpaca").data.sources)
    assert left == set(one("recipe=tiny").data.sources) - {"alpaca"}


def test_new_keys_of_an_architecture(empty_folder: Path) -> None:
    cfg = one(
        "recipe=tiny", "model.architecture.attention_bias=true", "model.architecture.rope.factor=2.5"
    )
    assert cfg.model.architecture["attention_bias"] is True
    assert cfg.model.architecture["rope"] == {"factor": 2.5}
    assert cfg.model.architecture["model_type"] == "llama"


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [("sft.lr", "sft.learning_rate"), ("lr", "sft.learning_rate"), ("data.max_len", "data.max_length")],
)
def test_an_unknown_key_is_refused_behind_every_prefix(
    prefix: str, key: str, meant: str, empty_folder: Path
) -> None:
    line = f"{prefix}{key}" if prefix == "~" else f"{prefix}{key}=1"
    assert refusal("recipe=tiny", line) == f"unknown key '{key}'. Did you mean '{meant}'?"


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.searchpath", "defaults", "_target_"])
def test_hydras_own_keys_are_no_keys(key: str, empty_folder: Path) -> None:
    assert refusal("recipe=tiny", f"{key}=x").startswith(f"unknown key '{key}'.")


def test_a_misspelled_recipe_is_met_by_the_nearest(empty_folder: Path) -> None:
    said = refusal("recipe=tinny")
    assert said.startswith("no recipe 'tinny'. Did you mean 'tiny'? Known: alpaca-13b, ")
    for file in compose.shipped("recipes").glob("*.yaml"):
        assert file.stem in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model=tiny-lama", "model: no model 'tiny-lama'. Did you mean 'tiny-llama'? Known: "),
        ("adapter=lor", "adapter: no adapter 'lor'. Did you mean 'lora'? Known: full, lora, qlora."),
        ("tracking=wandbb", "tracking: no tracking 'wandbb'. Did you mean 'wandb'? Known: "),
        ("model=null", "model: no model 'None'. "),
    ],
)
def test_a_misspelled_option_is_met_by_the_nearest(word: str, said: str, empty_folder: Path) -> None:
    assert refusal("recipe=tiny", word).startswith(said)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sft.learning_rate=fast", "sft.learning_rate: "),
        ("sft.optimizer=adamm", "sft.optimizer=adamm is not one of "),
        ("data.learn=[user,asistant]", "data.learn[1]=asistant is not one of "),
        ("data.sources.mine.format=alpca", "data.sources.mine.format=alpca is not one of "),
        ("data.sources.mine.rows=few", "data.sources.mine.rows: "),
        ("sft=3", "sft: "),
        ("name=${nothing}", "name: "),
        ("stages=[[prepare]]", "stages=[['prepare']] "),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_key(
    word: str, said: str, empty_folder: Path
) -> None:
    assert refusal("recipe=tiny", word).startswith(said)


@pytest.mark.parametrize(
    "word", ["tiny", "sft.learning_rate", "sft.epochs 3", "a=[1", "data.learn[0]=user", "a==b}"]
)
def test_a_word_that_is_no_override_is_refused(word: str, empty_folder: Path) -> None:
    said = refusal("recipe=tiny", word)
    assert said.startswith("cannot read the override: ")
    assert "Write key=value, such as sft.learning_rate=1e-4; " in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sft:\n  epochs: 3\n lr: 1\n", 3),
        ("sft: {epochs: 3\n\n\n", 4),
        ("a: 'b\n", 2),
        ("\tsft: 1\n", 1),
    ],
)
def test_a_broken_recipe_is_named_with_its_line(text: str, line: int, recipe: Recipe) -> None:
    file = recipe("broken", text)
    assert refusal("recipe=broken") == f"recipe {file}, line {line} is not YAML."


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("sft: {epochs: 1}\ndata: {max_length: 9}\nsft: {epochs: 2}\n", 3, "sft"),
        ("sft:\n  epochs: 1\n  epochs: 2\n", 3, "epochs"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text: str, line: int, key: str, recipe: Recipe) -> None:
    # YAML would drop the first without a word
    file = recipe("broken", text)
    assert refusal("recipe=broken") == f"recipe {file}, line {line} repeats the key '{key}'."


@pytest.mark.parametrize(
    "text", ["a: [\n", "[1]\n", "defaults: tiny\n", "defaults: [3]\n", "sft: {lr: 1}\n"]
)
def test_a_broken_recipe_harms_no_other(text: str, recipe: Recipe) -> None:
    recipe("broken", text)
    assert one("recipe=tiny").name == "tiny"
    recipe("mine", "defaults: [tiny]\n")
    assert one("recipe=mine").name == "mine"
    recipe("mine", "defaults: [broken]\n")
    assert refusal("recipe=mine")


def test_no_value_is_taken_from_the_environment(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "secret")
    said = refusal("recipe=tiny", "name=${oc.env:PLANTED}")
    assert said.startswith("name: ")
    assert "secret" not in said


def test_a_recipe_that_is_no_text_is_named(recipe: Recipe) -> None:
    file = recipe("broken", "")
    file.write_bytes(b"name: \xff\xfe\n")
    assert refusal("recipe=broken") == f"recipe {file} is not UTF-8 text."


@pytest.mark.parametrize("text", ["[1, 2]\n", "just words\n", "3\n"])
def test_a_recipe_without_keys_is_named(text: str, recipe: Recipe) -> None:
    file = recipe("broken", text)
    assert refusal("recipe=broken") == f"recipe {file} holds no keys."


def test_an_empty_recipe_is_all_defaults(recipe: Recipe) -> None:
    recipe("empty", "# nothing but this\n")
    assert one("recipe=empty").sft == RunConfig().sft


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft: {lr: 1}\n", "unknown key 'sft.lr'. Did you mean 'sft.learning_rate'?"),
        ("sfft: {lr: 1}\n", "unknown key 'sfft'. Did you mean 'sft'?"),
        ("sft: {epochs: many}\n", "sft.epochs: "),
        ("adapter: {method: qlra}\n", "adapter.method=qlra is not one of full, lora, qlora. "),
        ("sft: 3\n", "recipe=broken: "),
        ("stages: {a: 1}\n", "recipe=broken: "),
        ("defaults: tiny\n", "recipe "),
        ("defaults: [3]\n", "recipe "),
        ("defaults: [tinny]\n", "recipe=broken: In 'recipe/broken': Could not load 'recipe/tinny'."),
        ("defaults: [{override /model: tiny-lama}]\n", "recipe=broken: "),
        ("defaults: [{override /modl: tiny-llama}]\n", "recipe=broken: "),
        ("defaults: [broken]\n", "recipe=broken: its defaults lead back to itself."),
    ],
)
def test_a_recipe_that_does_not_fit_the_schema_is_refused(text: str, said: str, recipe: Recipe) -> None:
    recipe("broken", text)
    sentence = refusal("recipe=broken")
    assert sentence.startswith(said)
    assert "\n" not in sentence
    assert "Config search path" not in sentence


def test_a_sweep_makes_one_configuration_for_each_combination(empty_folder: Path) -> None:
    found = compose.runs(["recipe=tiny", "seed=0,1", "sft.learning_rate=1e-3,1e-4,1e-5"], multirun=True)
    assert [(cfg.seed, cfg.sft.learning_rate) for cfg in found] == [
        (seed, rate) for seed in (0, 1) for rate in (1e-3, 1e-4, 1e-5)
    ]


def test_a_sweep_over_recipes_by_glob(recipe: Recipe) -> None:
    recipe("ours-a", "sft: {epochs: 1}\n")
    recipe("ours-b", "sft: {epochs: 2}\n")
    found = compose.runs(["recipe=glob(ours-*)"], multirun=True)
    assert [(cfg.name, cfg.sft.epochs) for cfg in found] == [("ours-a", 1), ("ours-b", 2)]


@pytest.mark.parametrize(
    ("word", "seeds"),
    [
        ("seed=range(0,3)", [0, 1, 2]),
        ("seed=choice(4,5)", [4, 5]),
        ("++seed=0,1", [0, 1]),
        ("seed=7", [7]),
    ],
)
def test_ways_to_write_a_sweep(word: str, seeds: list[int], empty_folder: Path) -> None:
    assert [cfg.seed for cfg in compose.runs(["recipe=tiny", word], multirun=True)] == seeds


def test_a_sweep_over_lists_and_over_a_new_source(empty_folder: Path) -> None:
    found = compose.runs(
        [
            "recipe=tiny",
            "data.learn=[user],[user,assistant]",
            "data.sources.mine.format=alpaca",
            "data.sources.mine.path=a.json,'b c.json'",
        ],
        multirun=True,
    )
    assert [(cfg.data.learn, cfg.data.sources["mine"].path) for cfg in found] == [
        (learn, path) for learn in (["user"], ["user", "assistant"]) for path in ("a.json", "b c.json")
    ]


@pytest.mark.parametrize("word", ["seed=0,1", "recipe=glob(*)", "seed=range(0,2)", "recipe=tiny,tiny"])
def test_a_sweep_without_m_is_refused(word: str, empty_folder: Path) -> None:
    assert refusal("recipe=tiny", word) == (
        f"{word} asks for several runs; add -m to run them one after another."
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recipe=glob(zz*)", "recipe=glob(zz*) matches nothing."),
        ("seed=glob(*)", "seed=glob(*) matches nothing."),
        ("sft.learning_rate=interval(0,1)", "sft.learning_rate=interval(0,1) is no list of values; "),
    ],
)
def test_a_sweep_of_nothing_is_refused(word: str, said: str, empty_folder: Path) -> None:
    assert refusal("recipe=tiny", word, multirun=True).startswith(said)


def test_no_recipe_is_refused_with_all_their_names(empty_folder: Path) -> None:
    said = refusal("seed=1")
    for name in ("alpaca-7b", "qlora-llama7b", "smollm2-135m-alpaca", "tiny"):
        assert name in said


def test_a_recipe_is_described_by_its_first_comment(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("\n#  What it is: a line. \n# More.\nseed: 1 # not this\n", encoding="utf-8")
    assert compose.describe(file) == "What it is: a line."
    file.write_text("seed: 1\n", encoding="utf-8")
    assert compose.describe(file) == ""


def test_every_shipped_recipe_says_what_it_is() -> None:
    for file in compose.shipped("recipes").glob("*.yaml"):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert compose.describe(file) == first.removeprefix("# ")
        assert len(compose.describe(file)) > 20
