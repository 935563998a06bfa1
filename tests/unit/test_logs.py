"""Lines for a person: from the first rank, without the noise of libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import pytest

from ftpipe import logs


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give back the levels and variables that a call changes for the whole process."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
    levels = {name: logging.getLogger(name).level for name in ("datasets", "httpx", "bitsandbytes")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(("rank", "said"), [(None, "hello\n"), ("0", "hello\n"), ("1", ""), ("7", "")])
def test_only_the_first_rank_speaks(
    rank: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    logs.say("hello")
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(("terminal", "disabled"), [(True, ""), (False, "1")])
def test_bars_are_for_terminals(terminal: bool, disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    assert logs.on_terminal() is terminal
    with warnings.catch_warnings():
        logs.quiet_libraries()
    # tqdm and huggingface_hub read these
    assert os.environ["TQDM_DISABLE"] == disabled
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == disabled


def test_what_libraries_do_to_each_other_is_not_shown_but_the_rest_is() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        logs.quiet_libraries()
        for category in (DeprecationWarning, FutureWarning, UserWarning, RuntimeWarning):
            warnings.warn("x", category, stacklevel=1)
    assert [warning.category for warning in seen] == [UserWarning, RuntimeWarning]
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    assert logging.getLogger("httpx").isEnabledFor(logging.ERROR)


def test_progress_passes_every_item_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(logs.progress(iter(range(5)), "rows")) == [0, 1, 2, 3, 4]
    assert list(logs.progress([], "rows")) == []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(logs.progress(range(5), "rows")) == [0, 1, 2, 3, 4]


def test_progress_in_a_log_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(logs.progress(range(1000), "rows"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", -1.0)
    list(logs.progress(range(1000), "rows"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1000
    assert lines[-1].startswith("1,000 of 1,000 rows, ")
    assert lines[-1].endswith(" a second")
    list(logs.progress(iter("ab"), "rows"))
    assert capsys.readouterr().out.startswith("1 rows, ")  # nobody knows of how many


@pytest.mark.parametrize(
    ("count", "seconds", "said"),
    [
        (17, 68.0, "4.0 s each"),
        (3, 2.0, "0.7 s each"),
        (4, 2.0, "2 a second"),
        (9000, 2.0, "4,500 a second"),
    ],
)
def test_what_is_slow_is_told_by_what_each_takes(count: int, seconds: float, said: str) -> None:
    assert logs.pace(count, seconds) == said
