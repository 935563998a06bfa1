"""What a person reads about runs: all of them, also beside damaged ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ftpipe import artifacts, cli, pipeline, printing, schema
from ftpipe.choices import State
from ftpipe.config import RunConfig
from ftpipe.runs import listing, records
from tests.unit.runs import made

OUTPUT = Path("outputs")


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["runs", *words]) == code
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def states(run: records.Run) -> dict[str, State]:
    return {stage: listing.state_of(piece) for stage, piece in run.pieces.items()}


def test_runs_are_listed_the_newest_first(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for at, name in enumerate(["b", "c", "a"]):
        made.date(made.run(made.changed(cfg, "name", name), "prepare"), 1_700_000_000 + at * 60)
    lines = said(capsys).splitlines()
    assert lines[0].split() == ["run", "recipe", "started", "stages", "metrics"]
    assert [line.split()[1] for line in lines[1:]] == ["a", "c", "b"]
    assert "model prepare sft (missing)" in lines[1]
    assert lines[1].endswith("  prepare/train_rows 2")
    # columns begin one below the other
    assert {line.index("model") for line in lines[1:]} == {lines[0].index("stages")}
    assert said(capsys, "list") == said(capsys, f"output={OUTPUT.absolute()}")


def test_no_run_is_no_error(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys) == "no runs\n"
    assert json.loads(said(capsys, "--json")) == {"version": 1, "runs": []}


def test_the_states_of_stages(cfg: RunConfig) -> None:
    folder = made.run(cfg, "prepare")
    steps = pipeline.plan(cfg)
    pipeline.record(folder, steps)
    sft = steps[-1]
    assert states(records.read_run(folder))["sft"] is State.missing
    with artifacts.building(OUTPUT, "sft", sft.fingerprint):
        (run,) = records.runs(OUTPUT)
        assert states(run) == {
            "model": State.made,
            "prepare": State.made,
            "sft": State.building,
        }
        assert "sft (in the making)" in listing.stages(run)
    assert states(records.read_run(folder))["sft"] is State.begun
    made.place(folder, "model").joinpath("manifest.json").write_text("{", encoding="utf-8")
    assert states(records.read_run(folder))["model"] is State.damaged


def test_a_look_at_a_lock_does_not_keep_a_builder_out(cfg: RunConfig, empty_folder: Path) -> None:
    # as `ftpipe runs` holds it, for an instant; a builder waits that long
    with artifacts.building(OUTPUT, "sft", "ab"):
        pass
    look = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_SH)\n"
        "print('held', flush=True)\n"
        "sys.stdin.readline(); time.sleep(0.03)\n"
    )
    command = [sys.executable, "-c", look, "outputs/artifacts/sft-ab.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert artifacts.is_held(OUTPUT / "artifacts" / "sft-ab") is False  # two may look at once
        process.stdin.write(b"\n")
        process.stdin.flush()
        with artifacts.building(OUTPUT, "sft", "ab") as partial:
            assert partial.is_dir()


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("run.yaml", "a: [", "run.yaml cannot be read ("),
        ("run.yaml", "- a\n- b\n", "run.yaml holds no configuration."),
        ("run.yaml", "", "run.yaml holds no configuration."),
        ("artifacts.json", "{", "artifacts.json is damaged; "),
        ("artifacts.json", "[1]", "artifacts.json is damaged; "),
        ("manifest.json", "{", "manifest.json is damaged ("),
        ("manifest.json", "[]", "manifest.json is damaged ("),
    ],
)
def test_a_damaged_record_hides_no_other(
    cfg: RunConfig, file: str, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made.run(made.changed(cfg, "name", "whole"), "model")
    broken = made.run(made.changed(made.changed(cfg, "name", "broken"), "seed", 7), "model")
    place = made.place(broken, "model") if file == "manifest.json" else broken
    (place / file).write_text(text, encoding="utf-8")
    lines = said(capsys).splitlines()
    assert {line.split()[0] for line in lines[1:3]} == {whole.name, broken.name}
    assert len(lines) == 4
    assert lines[3].startswith("damaged: outputs/") and sentence in lines[3]
    told = json.loads(said(capsys, "--json"))["runs"]
    assert [len(run["damage"]) for run in sorted(told, key=lambda run: run["name"])] == [1, 0]


def test_a_manifest_that_lacks_what_others_have_is_listed(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    manifest = {
        "kind": "base_model",
        "stage": "model",
        "fingerprint": "ab",
        "metrics": "none",
        "inputs": 3,
    }
    (made.place(folder, "model") / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run,) = records.runs(OUTPUT)
    assert run.damage == ()
    assert listing.table([run])[1].split()[0] == folder.name
    assert any("not recorded" in line for line in listing.shown(run))


def test_the_keys_of_json(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg)
    made.date(folder, 1_700_000_000)
    (told,) = json.loads(said(capsys, "--json"))["runs"]
    assert set(told) == {"name", "recipe", "folder", "started", "stages", "damage"}
    assert (told["name"], told["recipe"], told["folder"]) == (folder.name, "mine", str(folder))
    assert [entry["stage"] for entry in told["stages"]] == ["model", "prepare", "sft"]
    for entry in told["stages"]:
        assert entry["artifact"] == made.names(folder)[entry["stage"]]
        assert entry["artifact"] == f"{entry['stage']}-{entry['fingerprint']}"
        assert entry["state"] == "made"
        assert entry["metrics"] == made.METRICS[entry["stage"]]


def test_a_run_is_shown_with_its_time_its_size_and_where_it_comes_from(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.run(cfg)
    text = said(capsys, "show", "mine")
    lines = text.splitlines()
    assert lines[0] == str(folder)
    assert lines[1].startswith("recipe mine, seed 0, started ")
    assert lines[2] == "record: run.yaml, artifacts.json"
    (sft,) = [line.split() for line in lines if line.startswith("sft ")]
    bytes_ = sum(len(content) for content in made.bytes_of(made.place(folder, "sft")).values())
    assert sft[1:4] == ["made", "3.5", "33%"]  # three stages took as long each
    assert sft[4:6] == [f"{bytes_ / 1024:.1f}", "KiB"]
    assert sft[6] == made.names(folder)["sft"]
    assert any(line.split() == ["sft/loss_last", "1.25"] for line in lines)
    assert f"  code         commit {made.COMMIT}" in lines
    assert "  torch        2.13.0" in lines
    told = json.loads(said(capsys, "show", folder.name, "--json"))
    entry = told["stages"][2]
    assert entry["bytes"] == bytes_
    assert entry["provenance"]["command"] == "ftpipe sft recipe=mine"
    assert entry["inputs"] == {
        "dataset": made.names(folder)["prepare"],
        "base_model": made.names(folder)["model"],
    }


def test_numbers_that_json_has_no_word_for_are_texts() -> None:
    value = {"a": [math.nan, math.inf, -math.inf, 1.5], "b": (None, True)}
    assert json.loads(printing.as_json(value)) == {"a": ["nan", "inf", "-inf", 1.5], "b": [None, True]}


def test_a_table_is_whole_unless_a_terminal_is_too_narrow() -> None:
    rows = [["a", "x" * 60, "y"], ["bb", "z", "w" * 30]]
    whole = printing.table(rows, indent="  ")
    assert whole == [f"  a   {'x' * 60}  y", f"  bb  {'z':60}  {'w' * 30}"]
    cut = printing.table(rows, indent="  ", fit=50)
    assert max(map(len, cut)) == 50
    assert cut[0].startswith("  a   xxxxx") and "…" in cut[0]
    assert "…" not in "".join(printing.table(rows, fit=200))
    assert (
        max(map(len, printing.table(rows, fit=3))) == 2 + 2 + 12 + 2 + 12
    )  # what cannot fit is legible
    assert printing.table([]) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert records.in_bytes(count) == text


def test_the_stages_beyond_those_asked_for_stay_listed(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    whole = made.names(folder)
    pipeline.record(folder, pipeline.plan(cfg, "prepare"))
    assert made.names(folder) == whole
    # but not where what they are made from is another now
    Path("rows.json").write_text(Path("rows.json").read_text() + " ", encoding="utf-8")
    pipeline.record(folder, pipeline.plan(cfg, "prepare"))
    assert set(made.names(folder)) == {"model", "prepare"}
    assert made.names(folder)["prepare"] != whole["prepare"]
    assert schema.load(folder / "run.yaml") == cfg
