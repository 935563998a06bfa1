"""What every test may use: no hub, an empty folder to run in, stages without a process of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# as a stage has it without a terminal; tqdm reads it when it is imported
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("WANDB_API_KEY", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers are as many as the cores: torch takes one each
    os.environ["OMP_NUM_THREADS"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Return the folder of real data and models that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data (shared) beside the checkout")
    return SHARED


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move to an empty folder, as a new user would stand in one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class InProcess:
    """Stands in for the stage's process: runs the worker here, where torch is imported already."""

    def __init__(self, command: Sequence[str], env: dict[str, str], **_: Any) -> None:
        from ftpipe import worker

        saved = dict(os.environ)
        os.environ.update(env)
        try:
            self._code = worker.main([command[-1]])
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def wait(self) -> int:
        return self._code

    def terminate(self) -> None:
        raise AssertionError("a stage that has run already cannot be ended")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run stages in this process: all of the driver and the worker, without a launch of ten seconds."""
    from ftpipe import launch, worker

    monkeypatch.setattr(launch, "Popen", InProcess)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "quiet_libraries", lambda: None)
