"""Garbage goes, all of it and nothing else, whoever is at work meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpipe import artifacts, cli, pipeline, schema
from ftpipe.config import RunConfig
from ftpipe.errors import BusyError, UserError
from ftpipe.runs import collect, find
from ftpipe.runs.collect import References
from tests.unit.runs import made

OUTPUT = Path("outputs")
HOLD = """
import sys
from pathlib import Path
from ftpipe.artifacts import building
with building(Path("outputs"), *sys.argv[1].rsplit("-", 1)):
    print("held", flush=True)
    sys.stdin.read()
"""


def left() -> set[str]:
    """Return what lies among the artifacts, but for what is hidden."""
    return {path.name for path in (OUTPUT / "artifacts").iterdir() if path.name[0] != "."}


def gc(*words: str) -> int:
    return cli.main(["runs", "gc", *words])


def two_runs(cfg: RunConfig) -> tuple[Path, Path]:
    """Two runs with one model and dataset, that differ in what is trained."""
    return made.run(cfg), made.run(made.changed(cfg, "sft.learning_rate", 9e-4))


def test_what_no_run_refers_to_goes_with_its_lock(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = two_runs(cfg)
    kept, gone = made.names(one), made.names(two)["sft"]
    assert cli.main(["runs", "remove", two.name, "--yes"]) == 0
    assert not two.exists() and len(left()) == 8
    size = sum(map(len, made.bytes_of(OUTPUT / "artifacts" / gone).values()))
    capsys.readouterr()
    assert gc("--yes") == 0
    assert left() == {*kept.values(), *(f"{name}.lock" for name in kept.values())}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-2:] == [f"outputs/artifacts/{gone}", "no run refers to it"]
    assert lines[1:] == [f"{size / 1024:.1f} KiB in all", "removed"]
    assert [step.artifact is not None for step in pipeline.plan(cfg)] == [True] * 3
    assert gc() == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_without_a_yes_it_is_only_shown(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    _, two = two_runs(cfg)
    before = left()
    assert cli.main(["runs", "remove", two.name]) == 1
    assert two.is_dir()
    collect.drop(find.run(two.name, OUTPUT))
    assert gc() == 1
    assert capsys.readouterr().out.endswith("nothing was removed; --yes removes it\n")
    assert gc("--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["removed"] is False and len(told["garbage"]) == 1
    assert left() == before


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("YES ", True), ("", False), ("n", False)])
def test_on_a_terminal_it_asks(
    cfg: RunConfig, answer: str, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run(cfg, "model").joinpath("run.yaml").unlink()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert gc() == (0 if goes else 1)
    assert bool(left()) is not goes


def test_what_an_artifact_was_made_from_stays_with_it(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    names = made.names(folder)
    # a record of the last stage alone: its inputs are known by its manifest
    (folder / "artifacts.json").write_text(json.dumps({"sft": names["sft"]}), encoding="utf-8")
    assert gc("--yes") == 0
    assert {name for name in left() if not name.endswith(".lock")} == set(names.values())


def test_a_run_that_has_only_begun_keeps_what_it_will_use(cfg: RunConfig) -> None:
    # of a run that an earlier version has started: no record before its end
    folder = made.run(cfg)
    (folder / "artifacts.json").unlink()
    assert gc() == 0
    (folder / "run.yaml").unlink()
    assert gc() == 1


def test_a_model_that_another_run_reads_by_its_path_stays(cfg: RunConfig) -> None:
    folder = made.run(cfg)
    sft = made.place(folder, "sft")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (sft / file).write_text("{}", encoding="utf-8")
    other = made.changed(made.changed(cfg, "model.path", str(sft)), "model.init", "pretrained")
    other = made.changed(other, "model.tokenizer", None)
    made.run(schema.from_composed(schema.plain(other)), "prepare")
    collect.drop(find.run(folder.name, OUTPUT))
    assert gc() == 0
    assert sft.is_dir()


def test_what_a_stage_was_started_with_stays(cfg: RunConfig) -> None:
    # the record was written anew for other data, but a job of the run still reads these
    folder = made.run(cfg)
    names = made.names(folder)
    places = {kind: f"outputs/artifacts/{names[kind]}" for kind in ("prepare", "model")}
    job = {"out": f"outputs/artifacts/{names['sft']}.partial", "inputs": places}
    (folder / "sft.job.json").write_text(json.dumps(job), encoding="utf-8")
    (folder / "other.job.json").write_text("{", encoding="utf-8")
    with Path("rows.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    pipeline.record(folder, pipeline.plan(cfg))
    assert made.names(folder)["prepare"] != names["prepare"]
    assert gc() == 0
    (folder / "sft.job.json").unlink()
    assert gc() == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "run.yaml").write_text("a: ["),
        lambda run: (run / "run.yaml").write_text("name: x\nnobody_knows: 1\n"),
        lambda run: (run / "artifacts.json").write_text("{"),
    ],
)
def test_where_it_cannot_be_told_what_a_run_needs_nothing_goes(
    cfg: RunConfig, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.run(cfg, "model")
    (folder / "artifacts.json").unlink()
    damage(folder)
    Path("rows.json").unlink()  # else the run could be planned
    before = left()
    assert gc("--yes") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ftpipe: it cannot be told what the run {folder.name} refers to, ")
    assert said.endswith(f"or drop it with `ftpipe runs remove {folder.name}`.\n")
    assert left() == before
    assert cli.main(["runs", "remove", folder.name, "--yes"]) == 0
    assert gc("--yes") == 0
    assert left() == set()


def test_what_is_half_made_goes_unless_a_run_can_go_on(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.run(cfg, "prepare")
    steps = pipeline.plan(cfg)
    pipeline.record(folder, steps)
    mine = steps[-1].place.name
    for name in (mine, "sft-0123456789abcdef"):
        with artifacts.building(OUTPUT, *name.rsplit("-", 1)) as partial:
            (partial / "checkpoint").write_text("half", encoding="utf-8")
    assert gc("--yes") == 0
    assert f"{mine}.partial" in left()
    assert not any(name.startswith("sft-0123456789abcdef") for name in left())
    said = capsys.readouterr().out
    assert f"stays: outputs/artifacts/{mine}.partial (4 bytes): half made, and a run can go on" in said
    assert gc("--yes", "--unfinished") == 0
    assert not any(name.startswith(mine) for name in left())
    assert {"model", "prepare"} == {name.split("-")[0] for name in left()}


def test_leftovers_of_a_removal_and_locks_of_nothing_go(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    names = set(made.names(folder).values())
    root = OUTPUT / "artifacts"
    for name in ("dpo-ab.removed", f"{next(iter(names))}.removed"):
        (root / name).mkdir()
        (root / name / "manifest.json").write_text("{}", encoding="utf-8")
    (root / "sft-cd.lock").touch()
    (root / "sft-ef").mkdir()  # no manifest
    (root / "notes.txt").write_text("mine", encoding="utf-8")  # not ours to remove
    (root / "photographs").mkdir()
    (OUTPUT / "runs" / ".x-1.removed").mkdir()
    (OUTPUT / "inputs" / ("ab" * 32)).mkdir(parents=True)
    assert gc("--yes") == 0
    assert left() == {*names, *(f"{name}.lock" for name in names), "notes.txt", "photographs"}
    assert [path.name for path in (OUTPUT / "runs").iterdir()] == [folder.name]
    assert list((OUTPUT / "inputs").iterdir()) == []


def test_a_damaged_artifact_that_nobody_needs_can_go(cfg: RunConfig) -> None:
    made.run(cfg, "model")
    (OUTPUT / "artifacts" / "sft-ab").mkdir()
    (OUTPUT / "artifacts" / "sft-ab" / "manifest.json").write_text("{", encoding="utf-8")
    assert gc("--yes") == 0
    assert not (OUTPUT / "artifacts" / "sft-ab").exists()


def test_there_is_nothing_to_collect_where_there_is_nothing(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gc("--yes") == 2
    assert capsys.readouterr().err == "ftpipe: there is no folder outputs; say where with output=PATH.\n"


# --- who is at work meanwhile ---


def test_what_a_living_process_builds_stays(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg, "model")
    command = [sys.executable, "-c", HOLD, "sft-ab"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        before = left()
        assert gc("--yes", "--unfinished") == 0
        assert left() == before >= {"sft-ab.partial", "sft-ab.lock"}
        assert "sft-ab.partial (0 bytes): it is being built" in capsys.readouterr().out
        # nor does it go if the builder came after the look
        thing = collect.Garbage(
            OUTPUT / "artifacts" / "sft-ab.partial", "", 0, OUTPUT / "artifacts/sft-ab"
        )
        why = collect.remove(thing, References(OUTPUT), unfinished=True)
        assert why is not None and why.startswith(f"sft-ab is being built by process {process.pid} ")
        assert left() == before
        listed = {"model": made.names(folder)["model"], "sft": "sft-ab"}
        (folder / "artifacts.json").write_text(json.dumps(listed), encoding="utf-8")
        with pytest.raises(BusyError, match="its stage 'sft' is being built; wait for it"):
            collect.drop(find.run(folder.name, OUTPUT))
        assert folder.is_dir()
        process.stdin.close()


def test_a_run_that_begins_after_the_look_keeps_what_it_needs(cfg: RunConfig) -> None:
    made.run(cfg, "model").joinpath("run.yaml").unlink()
    refers = References(OUTPUT)
    (thing,), _ = collect.garbage(OUTPUT, refers, unfinished=False)
    folder = pipeline.write_run(cfg, schema.dump(cfg))  # as another process does first of all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", None)  # it does not vanish even for an instant
        why = collect.remove(thing, refers, unfinished=False)
    assert why == f"{thing.path.name} is needed by a run that has begun meanwhile"
    assert (thing.path / "manifest.json").is_file()
    assert folder.is_dir()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_begins_at_the_very_moment_finds_it_whole_or_not_at_all(
    cfg: RunConfig, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process writes its run down, then looks: around the rename, it is one or the other."""
    made.run(cfg, "model").joinpath("run.yaml").unlink()
    refers = References(OUTPUT)
    (thing,), _ = collect.garbage(OUTPUT, refers, unfinished=False)
    seen: list[bool] = []
    rename = Path.rename

    def meanwhile(path: Path, target: Path) -> Path:
        if path.name.startswith("run") or target.suffix != ".removed":
            return rename(path, target)
        if when == "before":
            pipeline.write_run(cfg, schema.dump(cfg))
        moved = rename(path, target)
        if when == "after":
            pipeline.write_run(cfg, schema.dump(cfg))
        seen.append(pipeline.plan(cfg, "model")[0].artifact is not None)
        return moved

    monkeypatch.setattr(Path, "rename", meanwhile)
    why = collect.remove(thing, refers, unfinished=False)
    assert seen == [False]  # so the other process makes it anew, or waits for the lock
    assert why is not None
    assert pipeline.plan(cfg, "model")[0].artifact is not None


def test_a_run_that_breaks_at_the_very_moment_loses_nothing(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run(cfg, "model").joinpath("run.yaml").unlink()
    refers = References(OUTPUT)
    (thing,), _ = collect.garbage(OUTPUT, refers, unfinished=False)
    rename = Path.rename

    def meanwhile(path: Path, target: Path) -> Path:
        if target.suffix == ".removed":
            (OUTPUT / "runs" / "other-1").mkdir()
            (OUTPUT / "runs" / "other-1" / "run.yaml").write_text("a: [", encoding="utf-8")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", meanwhile)
    assert collect.remove(thing, refers, unfinished=False) is not None
    assert (thing.path / "manifest.json").is_file()


def test_a_lock_is_not_shared_with_one_whose_file_was_removed(empty_folder: Path) -> None:
    """Who opened the file before it was removed must not believe that the lock is his."""
    place = OUTPUT / "artifacts" / "sft-ab"
    place.parent.mkdir(parents=True)
    old = place.with_name("sft-ab.lock")
    opened = Path.open
    removed = False

    def late(path: Path, *args: Any) -> Any:
        nonlocal removed
        file = opened(path, *args)
        if path == old and not removed:
            removed = True
            path.unlink()  # as a garbage collection does, between open and lock
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", late)
        with artifacts.locked(place):
            assert old.is_file()
            patch.undo()
            with pytest.raises(BusyError), artifacts.locked(place):
                raise AssertionError("two hold one lock")


def test_what_cannot_be_removed_is_told(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made.run(cfg, "model").joinpath("run.yaml").unlink()

    def refuses(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ftpipe.runs.collect.shutil.rmtree", refuses)
    assert gc("--yes") == 1
    (name,) = {name for name in left() if not name.endswith(".lock")}
    assert name.endswith(".removed")


def test_a_run_that_did_not_change_is_not_read_again(cfg: RunConfig) -> None:
    folder = made.run(cfg, "prepare")
    refers = References(OUTPUT)
    names = refers.names()
    assert names >= set(made.names(folder).values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftpipe.runs.collect.referred", None)
        assert refers.names() == names
        pipeline.record(folder, pipeline.plan(cfg))
        with pytest.raises(TypeError):
            refers.names()
    assert refers.names() >= names
    collect.drop(find.run(folder.name, OUTPUT))
    assert refers.names() == set()


def test_no_such_run_removes_none(cfg: RunConfig) -> None:
    folder = made.run(cfg, "model")
    with pytest.raises(UserError):
        find.run("other", OUTPUT)
    assert cli.main(["runs", "remove", folder.name, "other", "--yes"]) == 2
    assert folder.is_dir()
