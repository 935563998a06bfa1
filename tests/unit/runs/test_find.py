"""Which run is meant, and which runs meet conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import pipeline
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, UserError
from ftpipe.runs import find, records
from ftpipe.runs.records import Piece, Run
from tests.unit.runs import made

OUTPUT = Path("outputs")


def found(output: Path, *words: str) -> list[str]:
    wanted = find.conditions(words)
    return sorted(run.recipe for run in find.matching(records.runs(output), wanted))


def test_a_run_is_found_by_its_folder_its_name_and_a_beginning_of_it(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.run(cfg, "prepare")
    for word in (str(folder), str(folder.absolute()), folder.name, folder.name[:6], "m", f"{folder}/"):
        run = find.run(word, OUTPUT)
        assert run.name == folder.name
        assert run.pieces["prepare"] is not None and run.pieces["prepare"].artifact is not None
    monkeypatch.chdir(folder)
    inside = find.run(".", Path("nowhere"))
    assert inside.made().keys() == {"model", "prepare"}


def test_a_whole_name_goes_before_the_beginning_of_others(cfg: RunConfig) -> None:
    first = made.run(cfg, "model")
    longer = first.with_name(first.name + "0")
    first.rename(longer)
    again = made.run(cfg, "model")
    assert find.run(again.name, OUTPUT).folder.name == again.name
    with pytest.raises(UserError) as refused:
        find.run("mine-", OUTPUT)
    assert str(refused.value) == (
        f"mine- could be any of {again.name}, {longer.name}; give more of the name."
    )


def test_many_runs_of_one_beginning_are_not_all_told(cfg: RunConfig) -> None:
    for seed in range(7):
        pipeline.write_run(made.changed(cfg, "seed", seed), "name: mine")
    with pytest.raises(UserError, match=r"^mine could be any of (mine-\w+, ){4}mine-\w+ and 2 more; "):
        find.run("mine", OUTPUT)


def test_an_artifact_is_found_by_its_folder_and_by_the_beginning_of_its_name(cfg: RunConfig) -> None:
    folder = made.run(cfg, "prepare")
    place = made.place(folder, "prepare")
    for word in (str(place), place.name, "prepare", place.name[:12]):
        piece = find.anything(word, OUTPUT)
        assert isinstance(piece, Piece) and piece.name == place.name
        with pytest.raises(UserError, match=" is an artifact; give a run, "):
            find.run(word, OUTPUT)


def test_a_run_that_is_named_like_an_artifact_goes_first(cfg: RunConfig) -> None:
    folder = made.run(made.changed(cfg, "name", "prepare"), "prepare")
    assert isinstance(find.anything("prepare", OUTPUT), Run)
    assert find.anything(folder.name, OUTPUT) == find.run(folder.name, OUTPUT)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rows.json", "there is no run rows.json in outputs."),
        ("outputs", "outputs is the folder of no run (it has no run.yaml) and of no artifact (no "),
    ],
)
def test_what_is_no_run_is_one_sentence(cfg: RunConfig, word: str, said: str) -> None:
    made.run(cfg, "model")
    with pytest.raises(UserError) as refused:
        find.run(word, OUTPUT)
    assert str(refused.value).startswith(said)


def test_a_mistyped_name_gets_the_nearest(cfg: RunConfig) -> None:
    name = made.run(cfg, "model").name
    with pytest.raises(UserError) as refused:
        find.run(f"mien{name[4:]}", OUTPUT)
    assert str(refused.value).endswith(f" in outputs. Did you mean '{name}'?")


def test_an_empty_output_folder_is_told(empty_folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        find.run("tiny", Path("elsewhere"))
    assert str(refused.value) == (
        "there is no run tiny: elsewhere holds none; say where with output=PATH."
    )


# --- conditions ---


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that differ in name, seed, learning rate and loss; the last one made nothing."""
    output = tmp_path_factory.mktemp("three")
    cfg = made.config(output)
    for name, rate, seed, loss in (("a", 1e-4, 0, 1.5), ("b", 2e-4, 1, 2.5)):
        one = made.changed(made.changed(cfg, "name", name), "sft.learning_rate", rate)
        made.run(made.changed(one, "seed", seed), metrics={"loss_last": loss, "broken": float("nan")})
    folder = made.run(made.changed(cfg, "name", "c"), "model")
    (folder / "artifacts.json").unlink()
    return output


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["recipe=a"], ["a"]),
        (["recipe!=a"], ["b", "c"]),
        (["name=b"], ["b"]),
        (["sft.learning_rate=1e-4"], ["a"]),
        (["sft.learning_rate=0.00010"], ["a"]),
        (["sft.learning_rate>1e-4"], ["b"]),
        (["sft.learning_rate>=1e-4", "seed=0"], ["a"]),
        (["seed<1"], ["a", "c"]),
        (["seed<=1"], ["a", "b", "c"]),
        (["sft/loss_last<2.0"], ["a"]),
        (["sft/loss_last>=2.5"], ["b"]),
        (["sft/loss_last!=1.5"], ["b"]),
        (["sft/broken<1"], []),  # NaN is below nothing
        (["sft/broken>1"], []),
        (["smoke=false"], ["a", "b", "c"]),
        (["smoke=true"], []),
        (["smoke<1"], []),  # a yes has no order
        (["model.path=null"], ["a", "b", "c"]),
        (["stages=[prepare, sft]"], ["a", "b", "c"]),
        (["stages=[sft]"], []),
        (["data.template=alpaca"], ["a", "b", "c"]),
        (["data.sources.mine.path=sample:alpaca.json"], ["a", "b", "c"]),
        (["data.template<2"], []),
        (["recipe=a", "recipe=b"], []),
        (["adapter.r=16", "recipe=c"], ["c"]),
    ],
    ids=" ".join,
)
def test_all_conditions_must_hold(three: Path, words: list[str], names: list[str]) -> None:
    assert found(three, *words) == names


def test_a_fingerprint_is_found_by_its_beginning(cfg: RunConfig) -> None:
    folder = made.run(cfg, "prepare")
    other = made.run(made.changed(made.changed(cfg, "seed", 1), "name", "other"), "prepare")
    print_ = made.names(folder)["prepare"].split("-")[1]
    assert made.names(other)["prepare"].split("-")[1][:6] != print_[:6]
    assert found(OUTPUT, f"fingerprint={print_}") == ["mine"]
    assert found(OUTPUT, f"fingerprint={print_[:6]}") == ["mine"]
    assert found(OUTPUT, f"fingerprint!={print_[:6]}") == ["other"]
    assert found(OUTPUT, f"fingerprint={print_[1:]}x") == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tiny", "'tiny' is no condition; write recipe=NAME, "),
        ("", "'' is no condition; "),
        ("sft.learning_rat=1", "unknown key 'sft.learning_rat'. Did you mean 'sft.learning_rate'?"),
        ("sft/los_last<1", "no run has the metric 'sft/los_last'. Did you mean 'sft/loss_last'?"),
        ("seed<many", "seed<many compares with 'many', which is no number."),
        ("recipe<3", "recipe<3: a recipe has no order; use = or !=."),
        ("fingerprint>=3", "fingerprint>=3: a fingerprint has no order; use = or !=."),
    ],
)
def test_a_condition_that_cannot_be_met_is_refused(three: Path, word: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        found(three, word)
    assert str(refused.value).startswith(said)
