"""A disk that fills up at any moment costs a sentence, and nothing that was finished."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftpipe import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process", "empty_folder")]

WORDS = (
    "sft",
    "recipe=tiny",
    "sft.samples=0",
    "sft.max_steps=6",
    "sft.save_every=2",
    "launch.threads=1",
)
# kilobytes: too few for the base model, for the rows, for the first checkpoint, for a later one
SIZES = (200, 1100, 1400, 1800, 2000)


def mount(*words: str) -> bool:
    tool = shutil.which("mount")
    return tool is not None and not subprocess.run([tool, *words], capture_output=True).returncode


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a size that can be changed."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={SIZES[0]}k", "tmpfs", str(folder)):
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def adapter(root: Path) -> bytes:
    (found,) = root.glob("artifacts/sft-*/adapter_model.safetensors")
    return found.read_bytes()


def test_a_disk_that_fills_up_costs_nothing_that_was_finished(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = small / "outputs"
    done: set[str] = set()
    ended = []
    for size in SIZES:
        assert mount("-o", f"remount,size={size}k", str(small))
        assert cli.main([*WORDS, f"output={root}"]) == 1
        told = capfd.readouterr()
        assert "no room is left" in told.out and "Traceback" not in told.out + told.err
        ended.append(told.err.split("'")[1])  # stage 'sft' ended with code 1
        whole = {path.parent.name for path in root.glob("artifacts/*/manifest.json")}
        assert done <= whole and all(".partial" not in name for name in whole)
        done = whole
    assert ended[0] == "model" and "prepare" in ended and ended[-1] == "sft"
    assert mount("-o", "remount,size=20m", str(small))
    assert cli.main([*WORDS, f"output={root}"]) == 0
    assert cli.main([*WORDS, "output=elsewhere"]) == 0
    assert adapter(root) == adapter(Path("elsewhere"))
