"""The user's home: recorded as ~, and the home again where the record is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftpipe import home, modeling, pipeline, schema
from ftpipe.choices import EvalFormat
from ftpipe.config import EvalSetConfig, ModelConfig, RunConfig
from ftpipe.errors import ConfigError

HOME = "/home/ada"


@pytest.fixture(autouse=True)
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.delenv(home.HOME, raising=False)


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        ("/home/ada", "~"),
        ("/home/ada/x", "~/x"),
        ("output=/home/ada/x", "output=~/x"),
        ("{a: /home/ada/x, b: '/home/ada/y'}", "{a: ~/x, b: '~/y'}"),
        ("--to=/home/ada:/home/ada/z", "--to=~:~/z"),
    ],
)
def test_the_home_is_written_short_wherever_it_is_named(text: str, shortened: str) -> None:
    assert home.short(text) == shortened


@pytest.mark.parametrize(
    "text", ["/home/adam", "/home/ada.old/x", "/mnt/home/ada/x", "./home/ada", "/home/ada-2", "ada"]
)
def test_what_only_looks_like_the_home_is_left(text: str) -> None:
    assert home.short(text) == text
    assert home.short_path(text) == text


@pytest.mark.parametrize("text", ["output=~/x", "~", "~/x", "{a: ~/x}", "~data.sources.a", "a~/b"])
def test_long_undoes_short(text: str) -> None:
    assert home.short(home.long(text)) == text
    assert ("~/" in home.long(text)) is (text == "a~/b")


@pytest.mark.parametrize(
    ("path", "shortened"),
    [("/home/ada/x y", "~/x y"), ("/home/ada", "~"), ("data/home/ada", "data/home/ada"), ("", "")],
)
def test_a_path_comes_back(path: str, shortened: str) -> None:
    assert home.short_path(path) == shortened
    assert home.full(shortened) == path


def test_where_home_is_the_root_nothing_is_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert home.folder() is None
    assert (home.short("/data/x"), home.short_path("/data/x"), home.long("~/x")) == (
        "/data/x",
        "/data/x",
        "~/x",
    )


def test_a_rank_takes_its_drivers_home(monkeypatch: pytest.MonkeyPatch) -> None:
    # in a container HOME may be another; the driver's paths are meant
    monkeypatch.setenv(home.HOME, "/data/home/ada")
    assert home.full("~/x") == "/data/home/ada/x"


def test_what_other_programs_read_is_found_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ada" / "project").mkdir(parents=True)
    (tmp_path / "ada" / "base").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.chdir(tmp_path / "ada" / "project")
    base = str(tmp_path / "ada" / "base")
    assert home.from_here(base) == "../base"
    assert Path("../base").samefile(base)
    assert modeling.base_path(ModelConfig(path=base), None) == "../base"
    assert modeling.base_path(ModelConfig(), Path(base)) == "../base"
    for other in ("maker/base", "outputs/artifacts/x", "/data/base", str(tmp_path / "adam")):
        assert home.from_here(other) == other
    monkeypatch.chdir(tmp_path)  # from where the way would name the home
    assert home.from_here(base) == base


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^~nobody-of-this-name/x: there is no such home folder\.$"):
        home.full("~nobody-of-this-name/x")


def test_every_path_of_a_run_is_recorded_short_and_read_back(cfg: RunConfig) -> None:
    cfg.output = f"{HOME}/out"
    cfg.model.path, cfg.model.tokenizer = f"{HOME}/base", f"{HOME}/words"
    cfg.evolve.seeds.path = f"{HOME}/seeds.json"
    cfg.launch.sharding.nvme, cfg.launch.slurm.venv = f"{HOME}/disk", f"{HOME}/venv"
    cfg.data.sources["mine"].path = f"{HOME}/rows.json"
    cfg.data.decontaminate["asked"] = EvalSetConfig(format=EvalFormat.text, path=f"{HOME}/asked.txt")
    cfg.export.converter = f"{HOME}/llama.cpp/convert_hf_to_gguf.py"
    text = schema.dump(cfg)
    assert HOME not in text
    assert text.count("~/") == 9
    assert schema.recorded(cfg) == yaml.safe_load(text)
    assert cfg.output == f"{HOME}/out"  # what runs is left alone
    file = Path("run.yaml")
    file.write_text(text, encoding="utf-8")
    assert schema.load(file).output == f"{HOME}/out"
    assert schema.load(file).launch.slurm.venv == f"{HOME}/venv"
    assert schema.dump(schema.load(file)) == text


# Keys of text that name no place on this machine: by their last word, whatever group they are in.
NO_PLACES = {
    *("name", "license", "quantization", "max_shard_size", "url", "model", "api_key_env", "push"),
    *("revision", "tokenizer_revision", "subset", "split", "file"),  # of a repository, a file in it
    *("gpu", "gpu_type", "partition", "account", "qos", "reservation", "constraint", "exclude"),
    *("time", "memory", "sync", "project", "entity"),
}


def test_no_key_that_holds_a_path_is_forgotten() -> None:
    text = [key for key in schema.all_keys() if schema.field_type(key) in (str, str | None)]
    places = [key for key in text if key.rsplit(".", 1)[-1] not in NO_PLACES]
    told: dict[str, Any] = {}
    for key in places:
        group = told
        *groups, last = key.split(".")
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = f"{HOME}/{key}"
        formats = schema.field_type(".".join([*groups, "format"]))
        group |= {} if formats is None else {"format": next(iter(formats)).value}  # it has to be set
    recorded = schema.plain(home.shortened(schema.changed(RunConfig(), told)))
    for key in places:
        value: Any = recorded
        for part in key.split("."):
            value = value[part]
        assert value == f"~/{key}", f"home.py forgets {key}; or is it no path?"


def test_one_run_has_one_folder_whoevers_home_it_is_in(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.model.path = f"{HOME}/base"
    ours = pipeline.run_folder(cfg)
    monkeypatch.setenv("HOME", "/home/ben")
    assert pipeline.run_folder(cfg) != ours
    cfg.model.path = "/home/ben/base"
    assert pipeline.run_folder(cfg) == ours
