"""What two runs, artifacts or recipes have not in common, and what of it decides."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftpipe import artifacts, cli, pipeline, schema
from ftpipe.config import RunConfig
from ftpipe.diff import command, sides
from ftpipe.errors import ConfigError
from ftpipe.trace import INITIAL, Trace
from tests.unit.runs import made


def diff(
    capsys: pytest.CaptureFixture[str], *words: object, code: int = 1, table: bool = True
) -> dict[str, Any]:
    """Return the difference as data; the table for people must say whether there is one as well."""
    capsys.readouterr()
    if table:
        assert cli.main(["diff", *map(str, words)]) == code
        assert ("\nno difference\n" in capsys.readouterr().out) is (code == 0)
    assert cli.main(["diff", *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["same"] is (code == 0)
    return found


def rows(found: dict[str, Any], section: str) -> dict[str, tuple[Any, Any]]:
    return {row.get("key") or row["stage"]: (row["a"], row["b"]) for row in found[section]["rows"]}


def differing(found: dict[str, Any]) -> set[str]:
    sections = ("stages", "config", "data", "environment", "code", "trace", "results")
    return {name for name in sections if found[name]["rows"]}


def at(cfg: RunConfig, output: str, **told: Any) -> Path:
    """Make the run of a configuration in an output folder of its own."""
    return made.run(made.changed(cfg, "output", output), **told)


def test_a_run_is_no_other_than_itself(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.run(cfg)
    found = diff(capsys, folder, folder.name, code=0)
    assert differing(found) == set()
    assert found["a"] == {"kind": "run", "name": str(folder), "notes": []}


def test_the_same_made_twice_differs_in_speed_alone(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"loss_last": 1.5, "broken": float("nan")}
    speed = {"tokens_per_second": 1.0, "seconds_update": 2.0, "peak_gpu_gib": 3.0}
    one = at(cfg, "one", metrics=same | speed)
    two = at(cfg, "two", metrics=same | {name: 9.0 for name in speed}, wall_seconds=9)
    found = diff(capsys, one, two)
    assert differing(found) == {"config"}
    (row,) = found["config"]["rows"]
    assert (row["key"], row["decides"], row["matters"]) == ("output", [], "no")


def test_the_key_that_decides_is_told_from_those_that_do_not(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("rows.json", "moved.json")
    other = made.changed(made.changed(cfg, "sft.learning_rate", 9e-4), "sft.log_every", 3)
    other = made.changed(made.changed(other, "tracking.tags", ["x"]), "launch.precision", "bf16")
    other = made.changed(other, "data.sources.mine.path", "moved.json")
    other = schema.from_composed(schema.plain(other))
    found = diff(capsys, made.run(cfg), made.run(other))
    decides = {row["key"]: (row["decides"], row["matters"]) for row in found["config"]["rows"]}
    assert decides == {
        "sft.learning_rate": (["sft"], "value"),
        "launch.precision": (["sft"], "value"),
        "sft.log_every": ([], "no"),
        "tracking.tags": ([], "no"),
        "data.sources.mine.path": ([], "content"),
    }
    (stage,) = found["stages"]["rows"]
    assert stage["stage"] == "sft"
    assert set(stage["because"]) == {"config sft.learning_rate", "config launch.precision"}
    assert rows(found, "config")["sft.learning_rate"] == (cfg.sft.learning_rate, 9e-4)
    assert found["data"]["rows"] == []


def test_the_seed_decides_all_stages_and_inputs_carry_it_on(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diff(capsys, made.run(cfg), made.run(made.changed(cfg, "seed", 1)))
    (row,) = found["config"]["rows"]
    assert (row["key"], row["decides"]) == ("seed", ["model", "prepare", "sft"])
    because = {row["stage"]: row["because"] for row in found["stages"]["rows"]}
    assert {stage: set(why) for stage, why in because.items()} == {
        "model": {"seed"},
        "prepare": {"seed", "inputs base_model"},
        "sft": {"seed", "inputs base_model", "inputs dataset"},
    }
    assert found["results"]["rows"] == []  # that other stages have other files says nothing


def test_other_bytes_of_data_are_told_by_their_digests(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one = at(cfg, "one")
    before = hashlib.sha256(Path("rows.json").read_bytes()).hexdigest()
    Path("rows.json").write_text(Path("rows.json").read_text() + "\n", encoding="utf-8")
    after = hashlib.sha256(Path("rows.json").read_bytes()).hexdigest()
    found = diff(capsys, one, at(cfg, "two"))
    (row,) = found["data"]["rows"]
    assert row == {"key": "data/0/mine", "a": before, "b": after, "stages": ["prepare"]}
    because = {row["stage"]: row["because"] for row in found["stages"]["rows"]}
    assert because == {"prepare": ["pins data/0/mine"], "sft": ["inputs dataset"]}


def test_environment_and_code(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = at(cfg, "one", source={"ftpipe/a.py": "aa", "ftpipe/b.py": "bb"})
    two = at(
        cfg,
        "two",
        git={"commit": "f" * 40, "dirty": True},
        python="3.12.1",
        packages={"torch": "2.14.0", "trl": "1.16"},
        hardware={"cpu": "A Processor", "cores": 8, "gpus": ["H100"]},
        world_size=2,
        lock={"requirements.lock": "bb" * 32},
        source={"ftpipe/a.py": "aa", "ftpipe/b.py": "cc"},
    )
    found = diff(capsys, one, two)
    assert rows(found, "environment") == {
        "python": ("3.11.7", "3.12.1"),
        "packages.torch": ("2.13.0", "2.14.0"),
        "packages.numpy": ("2.1.0", None),
        "packages.trl": (None, "1.16"),
        "hardware.cores": (2, 8),
        "hardware.gpus": ([], ["H100"]),
        "world_size": (1, 2),
    }
    assert rows(found, "code") == {
        "git.commit": (made.COMMIT, "f" * 40),
        "git.dirty": (False, True),
        "lock.requirements.lock": ("aa" * 32, "bb" * 32),
        "source.ftpipe/b.py": ("bb", "cc"),
    }
    assert all(
        row["stages"] == ["model", "prepare", "sft"]
        for section in ("environment", "code")
        for row in found[section]["rows"]
    )


def test_what_differs_in_one_stage_alone_names_it(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = at(cfg, "one")
    stage = pipeline.STAGES["sft"]
    raised = pipeline.Stage(**{**vars(stage), "version": stage.version + 1})
    monkeypatch.setitem(pipeline.STAGES, "sft", raised)
    found = diff(capsys, one, at(cfg, "two"))
    (row,) = found["code"]["rows"]
    assert row == {
        "key": "version",
        "a": stage.version,
        "b": stage.version + 1,
        "stages": ["sft"],
    }
    assert [row["because"] for row in found["stages"]["rows"]] == [["version"]]


def test_results_with_their_difference(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = at(cfg, "one", metrics={"loss_last": 1.5, "gone": 1.0, "equal": 3})
    two = at(cfg, "two", metrics={"loss_last": 1.25, "new": 2.0, "equal": 3})
    results = {row["key"]: row for row in diff(capsys, one, two)["results"]["rows"]}
    row = results["sft/loss_last"]
    assert (row["a"], row["b"], row["difference"]) == (1.5, 1.25, -0.25)
    row = results["sft/gone"]
    assert (row["a"], row["b"], row["difference"]) == (1.0, None, None)
    assert "sft/equal" not in results
    assert cli.main(["diff", str(one), str(two)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sft/loss_last" in line]
    assert line.split() == ["sft/loss_last", "1.5", "1.25", "-0.25"]


def test_one_fingerprint_with_other_files_is_told(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"metrics.jsonl": "1", "a.json": "x"}
    one = at(cfg, "one", files=same | {"adapter.safetensors": "one"})
    two = at(cfg, "two", files=same | {"adapter.safetensors": "two", "metrics.jsonl": "2"})
    results = diff(capsys, one, two)["results"]["rows"]
    assert [row["key"] for row in results] == [
        f"{stage}: adapter.safetensors" for stage in ("model", "prepare", "sft")
    ]
    assert results[0]["a"] == hashlib.sha256(b"one").hexdigest()


def test_uncommitted_changes_are_a_matter_of_the_code(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one = at(cfg, "one", files={"uncommitted.diff": "-a"})
    two = at(cfg, "two", files={"uncommitted.diff": "-b"})
    found = diff(capsys, one, two)
    assert differing(found) == {"config", "code"}
    assert list(rows(found, "code")) == ["uncommitted.diff"]


# --- traces ---

STEPS = [
    {"step": 1, "loss": 5.545177444479562, "grad_norm": 1.0, "data": "ab"},
    {"step": 2, "loss": 5.1, "grad_norm": 0.9, "data": "cd"},
    {"step": 3, "loss": 4.9, "grad_norm": float("nan"), "data": "ef"},
]


def trace(*steps: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(step)}\n" for step in steps)


def sft_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["trace"]["rows"] if row["stage"] == "sft"]


def test_the_first_step_that_differs(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    other = [STEPS[0], STEPS[1] | {"loss": 5.1000000000000005}, STEPS[2] | {"loss": 1.0}]
    one = at(cfg, "one", files={"trace.jsonl": trace(*STEPS)})
    two = at(cfg, "two", files={"trace.jsonl": trace(*other)})
    found = diff(capsys, one, two)
    (row,) = sft_rows(found)
    assert (row["what"], row["step"], row["ended"]) == ("step", 2, None)
    assert row["values"] == [{"key": "loss", "a": 5.1, "b": 5.1000000000000005}]
    assert {row["stage"] for row in found["trace"]["rows"]} == {"sft"}  # no other stage has steps
    cli.main(["diff", str(one), str(two)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sft, step 2" in line]
    assert line.split() == ["sft,", "step", "2", "loss", "5.1", "5.1000000000000005"]


def test_equal_traces_differ_in_nothing(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    # as far as their values go: another order of keys is no other value, and NaN is NaN
    turned = [dict(reversed(step.items())) for step in STEPS]
    one = at(cfg, "one", files={"trace.jsonl": trace(*STEPS)})
    two = at(cfg, "two", files={"trace.jsonl": trace(*turned)})
    assert sft_rows(diff(capsys, one, two)) == []


def test_a_trace_that_ends_earlier(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = at(cfg, "one", files={"trace.jsonl": trace(*STEPS[:2])})
    two = at(cfg, "two", files={"trace.jsonl": trace(*STEPS)})
    (row,) = sft_rows(diff(capsys, one, two))
    assert (row["step"], row["ended"]) == (3, "a")
    (row,) = sft_rows(diff(capsys, two, one))
    assert (row["step"], row["ended"]) == (3, "b")


def test_a_line_that_cannot_be_read_is_told(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = at(cfg, "one", files={"trace.jsonl": trace(*STEPS)})
    two = at(cfg, "two", files={"trace.jsonl": trace(STEPS[0]) + '{"step": 2, "lo'})
    (row,) = sft_rows(diff(capsys, one, two))
    assert {"key": "line", "a": None, "b": '{"step": 2, "lo'} in row["values"]


def first_weights(folder: Path, weights: dict[str, str]) -> str:
    """Return the file as a training writes it."""
    Trace(folder, first=1, every=1, writes=True).initial(weights)
    return (folder / INITIAL).read_text()


def test_the_first_initial_weight_that_differs(
    cfg: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = first_weights(tmp_path, {"b.weight": "aa", "rank 1: a.weight": "bb", "c": "dd"})
    second = first_weights(tmp_path, {"b.weight": "aa", "rank 1: a.weight": "cc", "c": "ee"})
    one = at(cfg, "one", files={"initial.json": first})
    two = at(cfg, "two", files={"initial.json": second})
    (row,) = sft_rows(diff(capsys, one, two))
    assert row["what"] == "initial weights"
    assert row["values"] == [{"key": "rank 1: a.weight", "a": "bb", "b": "cc"}]


def test_a_weight_too_many(cfg: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = at(cfg, "one", files={"initial.json": first_weights(tmp_path, {"a": "x"})})
    two = at(cfg, "two", files={"initial.json": first_weights(tmp_path, {"a": "x", "b": "y"})})
    (row,) = sft_rows(diff(capsys, one, two))
    assert row["values"] == [{"key": "b", "a": None, "b": "y"}]


def test_what_was_not_recorded_is_told_and_is_no_difference(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one = at(cfg, "one", files={"trace.jsonl": trace(*STEPS)})
    two = at(cfg, "two")
    found = diff(capsys, one, two)
    assert found["trace"]["not_recorded"] == [
        "sft: steps of B",
        "sft: initial weights of A and B",
    ]
    assert found["trace"]["rows"] == []


# --- sides ---


def test_a_run_that_is_not_made_is_compared_as_far_as_it_goes(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = made.run(cfg), made.run(made.changed(cfg, "sft.epochs", 7.0), "prepare")
    pipeline.record(two, pipeline.plan(schema.load(two / "run.yaml")))
    found = diff(capsys, one, two)
    (stage,) = found["stages"]["rows"]
    assert (stage["stage"], stage["because"]) == ("sft", [])
    assert found["results"]["not_recorded"] == ["sft: not made in B"]
    cli.main(["diff", str(one), str(two)])
    assert capsys.readouterr().out.endswith(
        "\nnot recorded: data, environment, code, trace, results of sft (not made in B)\n"
    )
    assert [row["decides"] for row in found["config"]["rows"]] == [["sft"]]


def test_artifacts_are_compared_with_all_they_were_made_from(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made.place(made.run(cfg), "sft")
    two = made.place(made.run(made.changed(cfg, "data.max_length", 512)), "sft")
    found = diff(capsys, one, two)
    assert found["a"]["kind"] == "artifact"
    because = {row["stage"]: row["because"] for row in found["stages"]["rows"]}
    assert because == {"prepare": ["config data.max_length"], "sft": ["inputs dataset"]}
    dataset = made.place(made.run(cfg), "prepare")
    found = diff(capsys, one, dataset)
    assert [row["stage"] for row in found["stages"]["rows"]] == ["sft"]
    assert found["stages"]["rows"][0]["there"] == [True, False]


def test_a_damaged_artifact_is_one_sentence(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    place = made.place(made.run(cfg), "sft")
    (place / "manifest.json").write_text("{", encoding="utf-8")
    assert cli.main(["diff", str(place), "mine"]) == 2
    assert capsys.readouterr().err.startswith(f"ftpipe: {place}/manifest.json is damaged (")


def test_recipes_are_compared_by_their_plans(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diff(capsys, "recipe=tiny", "recipe=tiny", "sft.learning_rate=1e-3", "seed=0", table=False)
    assert found["a"] == {"kind": "recipe", "name": "recipe=tiny", "notes": []}
    assert found["b"]["name"] == "recipe=tiny sft.learning_rate=1e-3 seed=0"
    (row,) = found["config"]["rows"]
    assert (row["key"], row["a"], row["b"], row["decides"]) == (
        *("sft.learning_rate", 5e-3, 1e-3),
        ["sft"],
    )
    prints = [
        {step.stage.name: step.fingerprint for step in pipeline.plan(cfg)}
        for words in (["recipe=tiny"], ["recipe=tiny", "sft.learning_rate=1e-3"])
        for cfg in cli.configurations(words)
    ]
    (stage,) = found["stages"]["rows"]
    assert (stage["a"], stage["b"]) == (prints[0]["sft"], prints[1]["sft"])
    assert found["results"]["not_recorded"] == [
        f"{stage}: not made in A and B" for stage in ("model", "prepare", "sft")
    ]
    assert list(empty_folder.iterdir()) == []


def test_two_recipes_with_other_stages_and_sources(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["diff", "recipe=tiny", "recipe=tiny-dpo"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    # an entry that one side lacks is a line, with what is not its default (recipes/tiny-dpo.yaml)
    assert [
        "data.sources.alpaca",
        "{format: alpaca, path: sample:alpaca.json, license: apache-2.0}",
        "-",
        "prepare",
    ] in cells
    (dpo,) = [line for line in cells if line[:1] == ["data.sources.ultrafeedback"]]
    assert dpo[1] == "-" and dpo[2].endswith("use: [demonstrations, preferences], ties: drop}")
    (because,) = [line[3] for line in cells if line[:1] == ["prepare"]]
    assert because.startswith("config data.sources.alpaca, config data.sources.oasst1, ")
    found = diff(capsys, "recipe=tiny", "recipe=tiny-dpo", table=False)
    assert rows(found, "config")["data.sources.alpaca.format"] == ("alpaca", None)
    assert rows(found, "config")["data.sources.alpaca.revision"] == (None, None)  # null, and not there
    there = {row["stage"]: row["there"] for row in found["stages"]["rows"]}
    assert there["dpo"] == [False, True]
    assert "name" in rows(found, "config")


def test_a_recipe_whose_plan_fails_is_still_compared_by_its_values(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = diff(capsys, "recipe=tiny", "recipe=tiny", "data.sources.alpaca.path=no.json", table=False)
    assert found["b"]["notes"] == [
        f"its fingerprints cannot be planned: no file no.json; it was looked for from {empty_folder}."
    ]
    assert list(rows(found, "config")) == ["data.sources.alpaca.path"]
    broken = "data.sources.alpaca.path=no.json"
    longer = ["recipe=tiny", broken, "stages=[prepare,sft,merge]"]
    found = diff(capsys, "recipe=tiny", broken, *longer, table=False)
    assert found["stages"]["rows"] == [
        {"stage": "merge", "a": None, "b": None, "there": [False, True], "because": []}
    ]


def test_a_run_is_compared_with_its_recipe(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cfg,) = cli.configurations(["recipe=tiny", "seed=3"])
    folder = made.run(cfg)
    found = diff(capsys, folder.name, "recipe=tiny", "seed=3", code=0, table=False)
    assert found["environment"]["not_recorded"] == []  # it is made, so the recipe has it as well
    found = diff(capsys, folder.name, "recipe=tiny", table=False)
    assert [row["key"] for row in found["config"]["rows"]] == ["seed"]


def test_where_runs_are_looked_up(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = at(cfg, "away"), at(made.changed(cfg, "seed", 1), "away")
    assert cli.main(["diff", one.name, two.name]) == 2
    diff(capsys, "output=away", one.name, two.name)


def test_origins_stand_beside_the_values(cfg: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made.run(cfg), made.run(made.changed(cfg, "seed", 1))
    (one / "origins.json").write_text(json.dumps({"seed": "recipe mine"}), encoding="utf-8")
    found = diff(capsys, one, two)
    assert found["config"]["rows"][0]["origin"] == ["recipe mine", None]
    cli.main(["diff", str(one), str(two)])
    assert "  seed  0 (recipe mine)  1  model, prepare, sft\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "diff compares two, but got 0; each is a run, an artifact, or recipe=NAME with "),
        (["a"], "diff compares two, but got 1; "),
        (["a", "b", "c"], "diff compares two, but got 3; "),
        (["recipe=tiny", "seed=1"], "diff compares two, but got 1; "),
        (["seed=1", "recipe=tiny", "a"], "seed=1 overrides a recipe; put it after recipe=NAME."),
        (["a", "seed=1", "b"], "seed=1 overrides a recipe; put it after recipe=NAME."),
        (["a", "b", "--jsn"], "no option '--jsn'. Did you mean '--json'? Known: --json."),
        (["a", "b"], "there is no run a: outputs holds none; say where with output=PATH."),
        (["recipe=tinny", "recipe=tiny"], "no recipe 'tinny'. Did you mean 'tiny'? "),
        (["recipe=tiny", "recipe=tiny", "lr=1"], "unknown key 'lr'. Did you mean 'sft.learning_rate'?"),
        (["recipe=tiny", "recipe=tiny", "seed=1,2"], "seed=1,2 asks for several runs; "),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert cli.main(["diff", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"ftpipe: {said}")


def test_the_words_of_each_side() -> None:
    words = ["output=x", "./a=b", "recipe=tiny", "seed=1", "+data.sources.m={path: a}", "--json"]
    assert sides.parse(words) == (
        [["./a=b"], ["recipe=tiny", "seed=1", "+data.sources.m={path: a}"]],
        Path("x"),
        True,
    )
    # behind a recipe, output is one of its keys
    assert sides.parse(["recipe=a", "output=x", "b"]) == (
        [["recipe=a", "output=x"], ["b"]],
        Path("outputs"),
        False,
    )
    with pytest.raises(ConfigError):
        sides.parse(["~model.path", "b", "c"])


def test_long_values_are_whole_where_there_is_no_terminal(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made.run(cfg)
    two = made.run(made.changed(cfg, "tracking.tags", [f"word-{at}" for at in range(50)]))
    cli.main(["diff", str(one), str(two)])
    text = capsys.readouterr().out
    assert "word-0, " in text and ", word-49]" in text and "…" not in text
    found = diff(capsys, one, two)
    cut = command.shown(found, fit=80)
    assert max(map(len, cut[3:])) <= 80 and any("…" in line for line in cut)


def test_a_side_that_is_an_artifact_of_an_earlier_format_is_compared(
    cfg: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.run(cfg)
    place = made.place(folder, "sft")
    print_ = place.name.split("-")[1]
    manifest = {"kind": "policy", "stage": "sft", "fingerprint": print_}
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert artifacts.open_artifact(place).fingerprint == print_
    found = diff(capsys, place, "mine")
    assert found["data"]["not_recorded"] == ["sft: not made in A and B"]
