"""Real stages: what is made twice is the same, and travels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe import cli, pipeline, schema
from ftpipe.runs import unpack

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process", "empty_folder")]


def test_a_dataset_made_twice_is_the_same_and_so_is_what_was_archived(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prepare", "recipe=tiny", "launch.workers=1"]
    for output in ("one", "two"):
        assert cli.main([*words, f"output={output}"]) == 0
    one, two = (next(Path(output, "runs").iterdir()) for output in ("one", "two"))
    capsys.readouterr()
    assert cli.main(["diff", str(one), str(two), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in found["config"]["rows"]] == ["output"]
    sections = ("stages", "data", "environment", "code", "trace", "results")
    assert {name: found[name]["rows"] for name in sections} == {name: [] for name in sections}
    assert cli.main(["runs", "export", str(one), "--to", "one.tar"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = unpack.unpack(tmp_path / "one.tar", Path("mine"))
    steps = pipeline.plan(schema.load(run / "run.yaml"), "prepare")
    assert all(step.artifact is not None for step in steps)
    capsys.readouterr()
    assert cli.main(["diff", str(run), str(tmp_path / two), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in found["config"]["rows"]] == ["output"]
    assert found["results"]["rows"] == []
