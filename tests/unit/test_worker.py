"""What a rank runs: the stage of its job file, with the configuration of its run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftpipe import artifacts, launch, pipeline, schema, worker
from ftpipe.choices import Device
from ftpipe.config import RunConfig


@pytest.fixture
def job(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the job file of a preparation with a tokenizer made by code, and its empty folder."""
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
    return write(cfg)


def write(cfg: RunConfig, stage: str = "prepare") -> Path:
    run = pipeline.write_run(cfg, schema.dump(cfg))
    Path("out").mkdir(exist_ok=True)
    file = run / "job.json"
    file.write_text(
        json.dumps({"stage": stage, "run": str(run), "inputs": {}, "out": "out"}), encoding="utf-8"
    )
    return file


def test_a_rank_runs_the_stage_of_its_job(job: Path) -> None:
    assert worker.main([str(job)]) == 0
    result = json.loads((Path("out") / launch.RESULT).read_text(encoding="utf-8"))
    # three rows, of which one is held out
    assert (result["metrics"]["train_rows"], result["metrics"]["validation_rows"]) == (2, 1)
    assert result["peak_memory_kib"] > 1024
    assert result["environment"]["device"] == "cpu"
    assert (Path("out") / "demonstrations/train.arrow").is_file()
    assert not (Path("out") / launch.ERROR).exists()


def test_only_the_first_rank_reports(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert worker.main([str(job)]) == 0
    assert not (Path("out") / launch.RESULT).exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_any_rank_tells_a_users_error(
    job: Path, rows: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    rows.write_text('[{"instruction": 3}]', encoding="utf-8")
    # 0: torch's launcher prints a page about each rank that ends otherwise
    assert worker.main([str(job)]) == 0
    error = json.loads((Path("out") / launch.ERROR).read_text(encoding="utf-8"))["error"]
    assert "rows.json, row 1" in error
    assert not (Path("out") / launch.RESULT).exists()


def test_a_full_disk_is_a_sentence(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        with open("/dev/full", "w") as disk:
            disk.write("x")

    monkeypatch.setattr("ftpipe.stages.prepare.run", full)
    assert worker.main([str(job)]) == 1
    assert capsys.readouterr().out.startswith("no room is left where out lies; ")
    assert not list(Path("out").iterdir())


def test_our_own_bug_is_not_dressed_up_as_the_users(cfg: RunConfig, job: Path) -> None:
    file = write(cfg, stage="no_such_stage")
    with pytest.raises(ModuleNotFoundError):
        worker.main([str(file)])
    assert not (Path("out") / launch.ERROR).exists()


def test_inputs_are_opened_by_kind(
    cfg: RunConfig, job: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with artifacts.building(empty_folder, "model", "ab") as partial:
        (partial / "x").touch()
        base = artifacts.publish(partial, {"kind": "base_model", "stage": "model", "fingerprint": "ab"})
    written = json.loads(job.read_text(encoding="utf-8"))
    job.write_text(json.dumps({**written, "inputs": {"base_model": str(base.path)}}), encoding="utf-8")
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "ftpipe.stages.prepare.run", lambda cfg, inputs, out: seen.update(inputs, cfg=cfg) or {}
    )
    assert worker.main([str(job)]) == 0
    assert seen == {"base_model": base, "cfg": cfg}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
@pytest.mark.parametrize("alive", [True, False])
def test_a_rank_whose_driver_is_gone_ends_before_it_does_anything(cfg: RunConfig, alive: bool) -> None:
    command = [sys.executable, "-m", "ftpipe.worker", str(write(cfg))]
    # this process is in the launcher's place, so the driver is its parent
    env = {**os.environ, launch.DRIVER: str(os.getppid()) if alive else "999999999"}
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr) == ((0 if alive else 1), b"")
    assert (Path("out") / launch.RESULT).exists() == alive
    assert bool(list(Path("out").iterdir())) == alive


def test_ranks_never_import_hydra(cfg: RunConfig) -> None:
    file = write(cfg)
    code = (
        "import sys; from ftpipe import worker; assert worker.main(sys.argv[1:]) == 0; "
        "print('hydra' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(("device", "chosen"), [(Device.cuda, [1]), (Device.cpu, [])])
def test_a_rank_takes_its_own_gpu_before_it_loads_anything(
    cfg: RunConfig, job: Path, device: Device, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    when: list[list[int]] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.set_device", taken.append)

    def run(*_: object) -> dict[str, float]:
        when.append(list(taken))
        return {}

    monkeypatch.setattr("ftpipe.stages.prepare.run", run)
    cfg.launch.device = device
    assert worker.main([str(write(cfg))]) == 0
    assert when == [chosen]
