"""Where two files, two traces or two records part, said in words that find the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from ftpipe.data import table
from ftpipe.trace import INITIAL, TRACE
from ftpipe.verify import files, record, traces
from ftpipe.verify.findings import Finding, Layer, Report


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "recorded", tmp_path / "made"
    for folder in folders:
        folder.mkdir()
    return folders


def rows(path: Path, *values: list[int]) -> None:
    schema = pa.schema([pa.field("input_ids", pa.list_(pa.int32())), pa.field("source", pa.string())])
    writer = table.Writer(path, schema)
    for start in range(0, len(values), 2):  # several batches
        some = [{"input_ids": ids, "source": "s"} for ids in values[start : start + 2]]
        writer.write(pa.RecordBatch.from_pylist(some, schema=schema))
    writer.close()


def test_the_row_and_the_token_that_differ_are_named(both: tuple[Path, Path]) -> None:
    known = [[1, 2], [3], [4, 5, 6]]
    one, other = both[0] / "a.arrow", both[1] / "a.arrow"
    rows(one, *known)
    rows(other, [1, 2], [3], [4, 9, 6])
    assert files.where(one, other) == "row 3, input_ids[1]: 5 is recorded, 9 made"
    rows(other, *known[:2])
    assert files.where(one, other) == "row 3 is missing here"
    rows(other, *known, [7])
    assert files.where(one, other) == "row 4 is new here"
    rows(other, [1, 2], [3], [4, 5])
    assert files.where(one, other) == "row 3, input_ids: 3 recorded, 2 made"


def test_the_tensor_that_differs_is_named_with_how_far(both: tuple[Path, Path]) -> None:
    one, other = (folder / "w.safetensors" for folder in both)
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, str(one))
    save_file({"a": torch.zeros(3), "b": torch.tensor([1.0, 1.5])}, str(other))
    assert files.where(one, other) == "b: 1 numbers by up to 0.5"
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.ones(2)}, str(other))
    assert files.where(one, other).startswith("a: torch.float32 (3,) is recorded, torch.bfloat16")
    save_file({"a": torch.zeros(3)}, str(other))
    assert files.where(one, other) == "b was not made"
    save_file({"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(1)}, str(other))
    assert files.where(one, other) == "c is new here"


@pytest.mark.parametrize(
    ("name", "recorded", "made", "says"),
    [
        ("l.json", '{"a": {"b": 1}}', '{"a": {"b": 2}}', "a.b: 1 is recorded, 2 made"),
        ("l.json", '{"a": {"b": 1}}', '{"a": {}}', "a.b is missing here"),
        ("l.json", '{"a": 1}', '{"a":1}', "its keys are equal, their layout differs"),
        ("l.json", '{"a": 1', "{}", "its bytes differ"),
        ("l.jsonl", "1\n2\n", "1\n3\n", 'line 2: "2" is recorded, "3" made'),
        ("l.jinja", "x\n", "x\r\n", "its line ends differ"),
        ("l.png", "1", "2", "its bytes differ"),
    ],
)
def test_text_says_where_it_differs(
    both: tuple[Path, Path], name: str, recorded: str, made: str, says: str
) -> None:
    for folder, text in zip(both, (recorded, made), strict=True):
        (folder / name).write_text(text, newline="")
    assert files.where(both[0] / name, both[1] / name) == says


def test_files_that_hold_times_are_left_out_and_missing_ones_are_not(both: tuple[Path, Path]) -> None:
    for name in ("metrics.jsonl", "ledger.json", "part/rows.json"):
        for folder in both:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("1")
    (both[1] / "metrics.jsonl").write_text("2")
    assert files.compare(*both, "prepare", Layer.data) == ("2 files", [])
    (both[1] / "part/rows.json").unlink()
    _, (finding,) = files.compare(*both, "prepare", Layer.data)
    assert finding == Finding(Layer.data, "prepare", "part/rows.json was not made")


def test_where_an_adapters_base_lies_is_no_difference(both: tuple[Path, Path]) -> None:
    for folder, base, rank in zip(both, ("../model", "/tmp/x/model"), (8, 8), strict=True):
        stated = {"base_model_name_or_path": base, "r": rank}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
    assert files.compare(*both, "sft", Layer.result)[1] == []
    (both[1] / "adapter_config.json").write_text('{"base_model_name_or_path": "../model", "r": 9}')
    assert len(files.compare(*both, "sft", Layer.result)[1]) == 1


STEP: dict[str, Any] = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "data": "aa"}


def write(folder: Path, *steps: dict[str, Any]) -> None:
    lines = [json.dumps({"step": at, **STEP, **step}) for at, step in enumerate(steps, start=1)]
    (folder / TRACE).write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ([{}, {}, {}], None),
        (
            [{}, {"loss": 2.0000001}, {"loss": 9.0}],
            "step 2: loss 2.0 is recorded, 2.0000001 made (5.0e-08",
        ),
        ([{}, {}, {"data": "bb", "loss": 3.0}], "step 3: its rows aa is recorded, bb made"),
        ([{"learning_rate": 0.2, "loss": 3.0}], "step 1: learning rate 0.1 is recorded, 0.2 made"),
        ([{}, {"grad_norm": float("nan")}], "step 2: gradient norm 1.0 is recorded, nan made"),
        ([{}], "step 2 was not made"),
    ],
)
def test_the_first_step_that_differs_is_named_by_its_cause(
    both: tuple[Path, Path], made: list[dict[str, Any]], says: str | None
) -> None:
    write(both[0], {}, {}, {})
    write(both[1], *made)
    what, found = traces.steps(*both, "sft", most=None, tolerance=0.0)
    assert what == "3 on record from step 1 to 3"
    if says is None:
        assert found == []
    else:
        assert found[0].says.startswith(says)
        assert len({one.says.split(":")[0] for one in found}) == 1  # of the first step alone


def test_equal_nans_are_equal(both: tuple[Path, Path]) -> None:
    for folder in both:
        write(folder, {"loss": float("nan")})
    assert traces.steps(*both, "sft", None, 0.0)[1] == []


def test_only_what_is_within_the_tolerance_is_let_pass(both: tuple[Path, Path]) -> None:
    write(both[0], {}, {}, {})
    write(both[1], {"loss": 2.001}, {"loss": 2.1}, {"loss": 5.0})
    _, found = traces.steps(*both, "sft", None, tolerance=0.01)
    assert [(one.says.split(",")[0], one.tolerated) for one in found] == [
        ("step 1: loss 2.0 is recorded", True),
        ("step 2: loss 2.0 is recorded", False),
    ]
    for other in ({"data": "bb"}, {"learning_rate": 0.1001}):  # neither is rounding
        write(both[1], other)
        assert not traces.steps(*both, "sft", 1, tolerance=0.5)[1][0].tolerated


def test_weights_that_begin_otherwise_are_named(both: tuple[Path, Path]) -> None:
    (both[0] / INITIAL).write_text('{"a": "1", "b": "2", "c": "3"}')
    (both[1] / INITIAL).write_text('{"a": "1", "b": "5", "d": "4"}')
    what, found = traces.initial(*both, "sft")
    assert what == "3 weights"
    assert [one.says for one in found] == [
        "b is other (2, now 5)",
        "c is missing here",
        "d is new here",
    ]


def test_the_first_layer_is_named_whatever_was_found_first() -> None:
    report = Report()
    report.look(Layer.steps, "sft", "10", [Finding(Layer.steps, "sft", "step 1")])
    report.look(Layer.code, "", "3", [Finding(Layer.code, "", "a.py is other")])
    report.look(Layer.environment, "", "", [Finding(Layer.environment, "", "x", tolerated=True)])
    assert report.first is not None and report.first.says == "a.py is other"
    assert report.lines()[-1] == "the first layer that differs is code: a.py is other"
    assert not report.equal


def test_many_differences_are_counted() -> None:
    report = Report()
    names = [Finding(Layer.weights, "sft", f"w{at}") for at in range(9)]
    report.look(Layer.weights, "sft", "9 weights", names)
    shown = "\n".join(report.lines())
    assert "w2" in shown and "w3" not in shown and "and 6 more" in shown


def test_what_is_within_the_tolerance_is_equal_and_said() -> None:
    report = Report()
    report.look(Layer.steps, "sft", "", [Finding(Layer.steps, "sft", "loss", tolerated=True)])
    assert report.equal and report.lines()[-1].startswith("equal, within what other hardware")
    assert Report().lines() == ["equal"]


PROVENANCE: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "peft": "0.21.2"},
    "hardware": {"platform": "Linux x86_64", "cpu": "a", "cores": 2, "gpus": []},
    "world_size": 1,
    "environment": {"blas_threads": 2},
    "launch": {"micro_batch_size": 4},
}


@pytest.mark.parametrize(
    ("change", "says", "rounds"),
    [
        ({}, None, False),
        ({"python": "3.12.0"}, "python 3.11.7 is recorded, 3.12.0 here", False),
        ({"packages": {"torch": "2.13.0"}}, "peft 0.21.2 is recorded, none here", False),
        ({"packages": {**PROVENANCE["packages"], "trl": "1"}}, "trl none is recorded, 1 here", False),
        (
            {"hardware": {**PROVENANCE["hardware"], "gpus": ["H100"]}},
            "gpus none is recorded, H100",
            True,
        ),
        ({"hardware": {**PROVENANCE["hardware"], "cpu": "b"}}, "cpu a is recorded, b here", True),
        ({"hardware": {**PROVENANCE["hardware"], "cores": 64}}, None, False),
        ({"packages": {**PROVENANCE["packages"], "platformdirs": "4"}}, "platformdirs none", False),
        ({"world_size": 2}, "ranks 1 is recorded, 2 here", True),
        ({"environment": {"blas_threads": 4}}, "threads 2 is recorded, 4 here", True),
        ({"launch": {"micro_batch_size": 1}}, "launch.micro_batch_size 4 is recorded, 1 here", True),
        ({"launch": {"strategy": "fsdp"}}, None, False),  # the old record does not say
        ({"environment": {}}, None, False),
    ],
)
def test_what_surrounds_a_run_is_compared(
    change: dict[str, Any], says: str | None, rounds: bool
) -> None:
    found = record.environment(PROVENANCE, PROVENANCE | change, "sft")
    assert [one.says for one in found if not one.says.startswith(says or "-")] == []
    assert len(found) == (says is not None)
    assert record.other_hardware(found) is rounds
