"""The words of ``ftpipe runs``."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import cli
from ftpipe.config import RunConfig
from ftpipe.runs import command
from tests.unit.runs import made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "no verb of runs 'lst'. Did you mean 'list'? Known: list, show, find, lineage, gc, "),
        (["list", "tiny"], "no verb of runs 'tiny'. "),
        (["--jsn"], "no option '--jsn'. Did you mean '--json'? Known: --json."),
        (["show"], "runs show takes a run, but got none. `ftpipe runs` lists the runs."),
        (["show", "a", "b"], "runs show takes a run, but got 2: a b. "),
        (["lineage"], "runs lineage takes a run or an artifact, but got none. "),
        (["find"], "runs find takes conditions, such as "),
        (["find", "x"], "'x' is no condition; "),
        (["gc", "tiny"], "runs gc takes no run, but got 'tiny'."),
        (["gc", "--force"], "no option '--force'. "),
        (["remove"], "runs remove takes one or more runs. "),
        (["export", "a", "--to"], "--to needs one value, such as --to run.tar."),
        (["export", "a", "--to", "--without-inputs"], "--to needs one value, "),
        (["export", "a", "--to=x", "--to=y"], "--to needs one value, "),
        (["export", "a"], "there is no run a: outputs holds none; say where with output=PATH."),
        (["import"], "runs import takes an archive, but got none. "),
        (["import", "--json", "a"], "no option '--json'. "),
        (["list", "output=a", "output=b"], "output=b: give one folder of outputs."),
        (["list", "output="], "output=: give one folder of outputs."),
        (["list", "output=~nobody-of-this-name/x"], "~nobody-of-this-name/x: there is no such home "),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert cli.main(["runs", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"ftpipe: {said}")
    assert list(Path.cwd().iterdir()) == []


def test_find_lists_what_it_finds(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg)
    made.run(made.changed(cfg, "name", "other"))
    assert cli.main(["runs", "find", "recipe=mine", "sft/loss_last<2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith(folder.name)
    assert cli.main(["runs", "find", "recipe=mine", "seed=4"]) == 1
    assert capsys.readouterr().out == "no runs\n"


def test_a_value_may_follow_its_option_or_an_equals_sign() -> None:
    for words in (["run", "--to", "a.tar"], ["--to=a.tar", "run"]):
        given = command.parse(words, ["--yes"], ["--to"])
        assert (given.names, given.values, given.flags) == (["run"], {"--to": "a.tar"}, set())
    assert command.parse(["--yes", "output=x/y"], ["--yes"]).output == Path("x/y")
