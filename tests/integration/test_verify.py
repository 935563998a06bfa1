"""A run made again from its record: equal, or the one thing that was changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora.layer as lora
import pytest
import torch

from ftpipe import cli, launch, provenance, sequences, worker
from ftpipe.data import templates
from tests.conftest import InProcess

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]

ROWS = [
    {"instruction": f"Name a number above {number}.", "input": "", "output": f"{number + 1} is."}
    for number in range(40)
]
WORDS = (
    *("sft", "recipe=tiny", "data=own", "data.template=alpaca", "data.validation=4"),
    "data.sources={rows: {format: alpaca, path: rows.json}}",
    *("sft.samples=0", "sft.max_steps=12", "sft.save_every=4", "launch.threads=1"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a finished run of three stages."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(launch, "Popen", InProcess)
        patched.setattr(worker, "die_with_parent", lambda: None)
        patched.setattr(worker, "quiet_libraries", lambda: None)
        assert cli.main(list(WORDS)) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the run's folder, in a copy of all that it needs, to be spoilt."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (found,) = Path("outputs/runs").iterdir()
    return found


def verified(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = cli.main(["verify", str(run), "--json", *words])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, report


def artifact(stage: str) -> Path:
    (found,) = Path("outputs/artifacts").glob(f"{stage}-*/manifest.json")
    return found.parent


def test_an_untouched_run_is_equal_to_its_last_weight(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in Path("outputs").rglob("*") if path.is_file())
    code, report = verified(capsys, run, "--full")
    assert (code, report["equal"], report["findings"]) == (0, True, [])
    compared = {(one["layer"], one["stage"]) for one in report["compared"]}
    assert compared >= {
        *(("record", ""), ("environment", ""), ("code", ""), ("config", ""), ("data", "")),
        *(("data", "prepare"), ("initial weights", "sft"), ("steps", "sft"), ("result", "sft")),
    }
    assert sorted(path for path in Path("outputs").rglob("*") if path.is_file()) == before


def manifest(stage: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = artifact(stage) / "manifest.json"
    read = json.loads(path.read_text())
    change(read)
    path.write_text(json.dumps(read))


def other_package(patched: pytest.MonkeyPatch, run: Path) -> None:
    manifest("sft", lambda read: read["provenance"]["packages"].update(peft="0.1.0"))


def other_python(patched: pytest.MonkeyPatch, run: Path) -> None:
    patched.setattr("ftpipe.provenance.platform.python_version", lambda: "3.99.0")


def more_threads(patched: pytest.MonkeyPatch, run: Path) -> None:
    manifest("prepare", lambda read: read["provenance"]["environment"].update(blas_threads=2))


def more_ranks(patched: pytest.MonkeyPatch, run: Path) -> None:
    manifest("sft", lambda read: read["provenance"].update(world_size=2))


def other_source(patched: pytest.MonkeyPatch, run: Path) -> None:
    known = provenance.source()
    patched.setattr(provenance, "source", lambda: known | {"stages/sft.py": "0" * 16})


def other_seed(patched: pytest.MonkeyPatch, run: Path) -> None:
    text = (run / "run.yaml").read_text()
    assert "\nseed: 0\n" in text
    (run / "run.yaml").write_text(text.replace("\nseed: 0\n", "\nseed: 1\n"))


def other_byte(patched: pytest.MonkeyPatch, run: Path) -> None:
    Path("rows.json").write_text(Path("rows.json").read_text().replace("18 is.", "19 is."))


def other_template(patched: pytest.MonkeyPatch, run: Path) -> None:
    known = templates.ALPACA_NO_INPUT
    patched.setattr(templates, "ALPACA_NO_INPUT", known.replace("Below", "below"))


def other_init(patched: pytest.MonkeyPatch, run: Path) -> None:
    known: Any = lora.LoraLayer.reset_lora_parameters

    def reset(self: Any, adapter: str, *given: Any) -> None:
        known(self, adapter, *given)
        if self.in_features != self.out_features:
            self.lora_A[adapter].weight.data *= 1.001

    patched.setattr(lora.LoraLayer, "reset_lora_parameters", reset)


def other_rate(patched: pytest.MonkeyPatch, run: Path) -> None:
    known = torch.optim.lr_scheduler.LambdaLR.get_lr

    def rates(self: Any) -> list[Any]:
        return [rate * (1.5 if self.last_epoch == 9 else 1) for rate in known(self)]

    patched.setattr(torch.optim.lr_scheduler.LambdaLR, "get_lr", rates)


def other_order(patched: pytest.MonkeyPatch, run: Path) -> None:
    known = sequences.Order.__iter__
    patched.setattr(sequences.Order, "__iter__", lambda self: iter(list(known(self))[::-1]))


def other_gradient(patched: pytest.MonkeyPatch, run: Path) -> None:
    known = torch.optim.AdamW.step
    patched.setattr(
        torch.optim.AdamW, "step", lambda self, *given: None if _seen(self) == 6 else known(self)
    )


def _seen(optimizer: Any) -> int:
    """Return how often it was asked to step."""
    optimizer.asked = getattr(optimizer, "asked", 0) + 1
    return int(optimizer.asked)


def flipped_weight(patched: pytest.MonkeyPatch, run: Path) -> None:
    path = artifact("sft") / "adapter_model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)


# what is changed, the layer and the words that name it, the stage that is made again
FAULTS = [
    (other_package, "environment", "peft 0.1.0 is recorded, ", "prepare"),
    (other_python, "environment", "3.99.0 here", "prepare"),
    (more_threads, "environment", "threads 2 is recorded, 1 here", "prepare"),
    (more_ranks, "environment", "ranks 2 is recorded, 1 here", "prepare"),
    (other_source, "code", "stages/sft.py is other", "prepare"),
    (other_seed, "config", "seed=0 is recorded, 1 here", "prepare"),
    (other_byte, "data", "data/0/rows: sha256 ", "prepare"),
    (other_template, "data", "row 1, ", "prepare"),
    (other_init, "initial weights", "lora_A", "sft"),
    (other_rate, "steps", "step 10: learning rate ", "sft"),
    (other_order, "steps", "step 1: its rows ", "sft"),
    (other_gradient, "steps", "step 7: loss ", "sft"),
    (flipped_weight, "record", "adapter_model.safetensors is not as it was written", "prepare"),
]


@pytest.mark.parametrize(("fault", "layer", "says", "stage"), FAULTS)
def test_what_was_changed_is_named(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch, Path], None],
    layer: str,
    says: str,
    stage: str,
) -> None:
    fault(monkeypatch, run)
    code, report = verified(capsys, run, "--stage", stage)
    assert code == 1 and not report["equal"]
    assert report["first"]["layer"] == layer
    assert says in report["first"]["says"]


def test_a_run_is_found_by_the_beginning_of_its_name(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = verified(capsys, Path("tiny"), "--stage", "prepare")
    assert (code, report["equal"]) == (0, True)


def test_a_changed_byte_is_found_in_its_row_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_byte(pytest.MonkeyPatch(), run)
    _, report = verified(capsys, run, "--stage", "prepare")
    rows = [one["says"] for one in report["findings"] if one["stage"] == "prepare"]
    assert any("row " in says and "input_ids[" in says for says in rows)


def test_other_hardware_may_round_otherwise_and_no_more(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(share: float) -> None:
        path = artifact("sft") / "trace.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[4]["loss"] *= 1 + share
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    trace(1e-5)
    manifest("sft", lambda read: read["provenance"]["hardware"].update(cpu="another"))
    _, report = verified(capsys, run, "--stage", "sft")
    steps = [one for one in report["findings"] if one["layer"] == "steps"]
    assert steps and all(one["tolerated"] for one in steps)
    assert "step 5: loss" in steps[0]["says"]
    trace(1e-2)
    _, report = verified(capsys, run, "--stage", "sft")
    steps = [one for one in report["findings"] if one["layer"] == "steps"]
    assert not steps[0]["tolerated"]


def test_a_run_verifies_from_its_archive_in_another_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["runs", "export", str(run), "--to", "run.tar"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path("run.tar").rename(elsewhere / "run.tar")
    Path("rows.json").unlink()  # they are in the archive
    shutil.rmtree("outputs")
    monkeypatch.chdir(elsewhere)
    code, report = verified(capsys, Path("run.tar"), "--full")
    assert (code, report["findings"]) == (0, [])
    assert [path.name for path in elsewhere.iterdir()] == ["run.tar"]


RECIPE = """\
defaults: [tiny]
sft: {samples: 0, max_steps: 6}
launch: {threads: 1}
"""


def test_a_recipe_is_held_to_the_trace_that_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text(RECIPE)
    assert cli.main(["verify", "recipe=mine"]) == 2
    assert "ships no trace" in capsys.readouterr().err
    assert cli.main(["verify", "recipe=mine", "--write"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", "recipe=mine", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert {one["layer"] for one in report["compared"]} >= {"initial weights", "steps"}

    shipped = Path("recipes/mine.trace.json")
    told = json.loads(shipped.read_text())
    line = json.loads(told["stages"]["sft"]["steps"][3])
    told["stages"]["sft"]["steps"][3] = json.dumps({**line, "loss": line["loss"] * (1 + 1e-5)})
    shipped.write_text(json.dumps(told))
    assert cli.main(["verify", "recipe=mine"]) == 1  # here it is the same to the last bit
    assert "step 4: loss" in capsys.readouterr().out
    told["stages"]["sft"]["provenance"]["hardware"]["cpu"] = "another"
    shipped.write_text(json.dumps(told))
    assert cli.main(["verify", "recipe=mine"]) == 0  # elsewhere it may round otherwise
    assert "equal, within what other hardware may do" in capsys.readouterr().out


def test_the_trace_that_the_tiny_recipe_ships_holds_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", "recipe=tiny"]) == 0, capsys.readouterr().out
