"""What an interrupted attempt had otherwise than the one that ended it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftpipe import attempts
from ftpipe.checkpoints import SEAL

RECORD: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "peft": "0.21.2"},
    "source": {"trainer.py": "aa"},
    "hardware": {"cpu": "c", "gpus": [], "cores": 2},
}
LAUNCH = {"micro_batch_size": 4, "strategy": "ddp", "threads": 1}


def of(ranks: int = 1, **packages: str) -> attempts.Facts:
    return attempts.facts({**RECORD, "packages": RECORD["packages"] | packages}, LAUNCH, ranks)


def checkpoint(partial: Path) -> None:
    (partial / "checkpoints/checkpoint-2").mkdir(parents=True, exist_ok=True)
    (partial / "checkpoints/checkpoint-2" / SEAL).touch()


def test_what_an_earlier_attempt_had_otherwise_is_told(tmp_path: Path) -> None:
    assert attempts.begin(tmp_path, of(), "") == {}
    checkpoint(tmp_path)
    assert attempts.begin(tmp_path, of(ranks=2), "") == {"ranks": 1}
    assert attempts.begin(tmp_path, of(ranks=2, peft="0.22.0", trl="1"), "") == {
        "packages.peft": "0.21.2",
        "packages.trl": None,
    }
    assert attempts.conclude(tmp_path) == [
        {"ranks": 1, "packages.peft": "0.21.2", "packages.trl": None},
        {"packages.peft": "0.21.2", "packages.trl": None},
    ]
    assert not (tmp_path / attempts.FILE).exists()


def test_attempts_that_left_nothing_are_of_no_account(tmp_path: Path) -> None:
    attempts.begin(tmp_path, of(peft="0.1"), "")
    assert attempts.begin(tmp_path, of(), "") == {}
    assert attempts.conclude(tmp_path) == []
    attempts.begin(tmp_path, of(peft="0.1"), "journal.jsonl")
    (tmp_path / "journal.jsonl").touch()  # evolve keeps its answers
    assert attempts.begin(tmp_path, of(), "journal.jsonl") == {"packages.peft": "0.1"}


def test_an_attempt_like_the_last_differs_in_nothing(tmp_path: Path) -> None:
    attempts.begin(tmp_path, of(), "")
    checkpoint(tmp_path)
    assert attempts.begin(tmp_path, of(), "") == {}
    assert attempts.conclude(tmp_path) == [{}]
    assert attempts.conclude(tmp_path / "none") == []
