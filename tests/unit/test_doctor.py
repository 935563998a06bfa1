"""What the machine has: each finding is what another source says, and a broken one hides no other."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import psutil
import pytest

from ftpipe import doctor, provenance
from ftpipe.doctor import Finding


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process's warnings and loggers as they are."""
    monkeypatch.setattr(doctor, "quiet_libraries", lambda: None)


def test_the_processor_is_that_of_the_machine() -> None:
    fine, seen = doctor._processor()
    assert fine
    assert f", {len(psutil.Process().cpu_affinity() or [])} cores, " in seen
    assert seen.endswith(" GiB")


def test_the_disk_is_the_one_here(empty_folder: Path) -> None:
    done = subprocess.run(
        ["df", "-BG", "--output=avail", "."], capture_output=True, text=True, check=True
    )
    gib = int(done.stdout.split()[-1].rstrip("G"))
    fine, seen = doctor._disk()
    assert fine == (gib > 1)
    assert abs(int(seen.split()[0]) - gib) <= 1


def test_libraries_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, seen = doctor._libraries()
    assert fine
    for name in ("transformers", "trl", "peft", "accelerate", "datasets"):
        assert f"{name} {importlib.metadata.version(name)}" in seen
    monkeypatch.setattr(provenance, "PACKAGES", ("trl", "peft", "accelerate", "datasets"))
    fine, seen = doctor._libraries()
    assert not fine
    assert seen.endswith("; lacking: transformers")


@pytest.mark.parametrize(
    ("own", "said"), [(True, "V100; bf16"), (False, "V100; no bf16: set launch.precision=fp16")]
)
def test_bf16_that_is_emulated_is_none(own: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def supported(including_emulation: bool = True) -> bool:
        return own or including_emulation

    monkeypatch.setattr(provenance, "gpus", lambda: ["V100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert doctor._gpu() == (True, said)


@pytest.mark.parametrize(
    ("offline", "token", "finding"),
    [
        ("1", None, (False, "offline (HF_HUB_OFFLINE), no HF_TOKEN")),
        ("true", "planted", (False, "offline (HF_HUB_OFFLINE), a token is set")),
        ("0", "planted", (True, "online, a token is set")),
        (None, None, (True, "online, no HF_TOKEN")),
    ],
)
def test_the_hub_is_as_its_variables_say(
    offline: str | None, token: str | None, finding: Finding, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HUB_OFFLINE", offline), ("HF_TOKEN", token)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert doctor._hub() == finding


@pytest.mark.parametrize(
    ("key", "mode", "usable"),
    [(None, "online", False), (None, "offline", True), ("planted", "online", True)],
)
def test_wandb_needs_a_key_only_online(
    key: str | None, mode: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    fine, seen = doctor._wandb()
    assert fine is usable
    assert seen.startswith(importlib.metadata.version("wandb"))
    assert f"mode {mode}" in seen
    assert "planted" not in seen


def test_a_package_that_is_not_the_locked_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)
    assert doctor._lock() == (False, "no requirements.lock beside this installation")
    trl, torch = importlib.metadata.version("trl"), importlib.metadata.version("torch").split("+")[0]
    lock = f"# by uv\ntrl=={trl} \\\n    --hash=sha256:00\ntorch=={torch} ; python_version >= '3'\n"
    (tmp_path / "requirements.lock").write_text(lock, encoding="utf-8")
    assert doctor._lock() == (True, "installed versions are the locked ones")
    (tmp_path / "requirements.lock").write_text(lock.replace(trl, "0.0.1"), encoding="utf-8")
    assert doctor._lock() == (False, f"trl {trl} != 0.0.1")
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-thing",))
    (tmp_path / "requirements.lock").write_text("no-such-thing==1\n", encoding="utf-8")
    assert doctor._lock() == (False, "no-such-thing is not installed, 1 is locked")


def test_without_sbatch_jobs_cannot_be_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._slurm() == (False, "no sbatch here; jobs can be run, not submitted")
    for name, answer in (("sbatch", ""), ("sinfo", '[ "$1" = --version ] && echo slurm 23 || echo 4')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert doctor._slurm() == (True, "slurm 23, 4 nodes")


def test_four_bits_work_here() -> None:
    fine, seen = doctor._bitsandbytes()
    assert fine, seen
    assert importlib.metadata.version("bitsandbytes") in seen


@pytest.mark.parametrize(
    ("broken", "code"), [("_slurm", 0), ("_hub", 0), ("_torch", 1), ("_libraries", 1)]
)
def test_a_broken_finding_hides_no_other_and_only_some_stop_a_training(
    broken: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fine() -> Finding:
        return True, "seen"

    def raises() -> Finding:
        raise RuntimeError("broken install\nand more")

    names = [name for name in vars(doctor) if name.startswith("_") and name[1].isalpha()]
    for name in names:
        monkeypatch.setattr(doctor, name, raises if name == broken else fine)
    assert doctor.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) + 1  # and python itself
    (told,) = [line for line in lines if line.startswith("no ")]
    assert told.split()[1] == broken.removeprefix("_")
    assert told.endswith("RuntimeError: broken install")


@pytest.mark.slow
def test_the_machine_these_tests_run_on_can_train(capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    said = capfd.readouterr()
    lines = {line.split()[1]: line for line in said.out.splitlines()}
    for name in ("python", "processor", "disk", "torch", "libraries", "bitsandbytes"):
        assert lines[name].startswith("yes "), lines[name]
    assert importlib.metadata.version("torch") in lines["torch"]
