"""The words of ``verify``: one run, how much of it, nothing that would make it another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import cli
from ftpipe.errors import ConfigError
from ftpipe.verify.verb import parse


def test_words_are_read() -> None:
    asked = parse(["outputs/runs/a", "--steps", "5", "--stage=sft", "--stage", "dpo", "--json"])
    assert asked.run == Path("outputs/runs/a")
    assert (asked.steps, asked.stages, asked.as_json, asked.full) == (5, ("sft", "dpo"), True, False)
    assert parse(["a", "--full", "launch.processes=2"]).overrides == ("launch.processes=2",)
    assert parse(["a", "export.quantizer=v/bin/python"]).overrides == ("export.quantizer=v/bin/python",)
    asked = parse(["recipe=tiny", "--write"])
    assert (asked.run, asked.recipe, asked.write) == (None, "tiny", True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "takes one run or recipe, but got 0"),
        (["a", "b"], "takes one run or recipe, but got 2"),
        (["a", "recipe=tiny"], "takes one run or recipe, but got 2"),
        (["recipe=tiny", "--full"], "--full is for a run"),
        (["recipe=tiny", "--stage=sft"], "--stage is for a run"),
        (["a", "--write"], "give recipe=NAME"),
        (["a", "--step", "3"], "--steps"),
        (["a", "--steps", "0"], "--steps=0 is no number of steps"),
        (["a", "--steps=x"], "--steps=x is no number"),
        (["a", "--steps"], "--steps needs a value"),
        (["a", "--steps=3", "--full"], "leave --steps out"),
        (["a", "--full=yes"], "--full"),
        (["a", "sft.learning_rate=1"], "sft.learning_rate is the run.s own"),
        (["a", "seed=1"], "seed is the run.s own"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(words)


def test_a_folder_in_use_is_no_scratch(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        parse(["a", f"--scratch={tmp_path}"])


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "there is no run" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("{}")
    assert cli.main(["verify", str(tmp_path), "launch.procesess=2"]) == 2
    assert "launch.processes" in capsys.readouterr().err
