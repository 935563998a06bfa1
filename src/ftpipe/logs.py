"""Lines for the person who watches: what a stage does, on a terminal or in a log file."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Print a line from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def on_terminal() -> bool:
    """Say whether progress bars make sense: they turn a log file into noise."""
    return sys.stderr.isatty()


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, showing a bar on a terminal and, in a log, a line now and then.

    Args:
        total: how many they are, where the items do not say so themselves.
    """
    if on_terminal():
        from rich.progress import track

        yield from track(items, description=what, total=total, transient=True)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    of = f" of {total:,}" if total is not None else ""
    started = said = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said > SECONDS_BETWEEN_LINES:
            said = now
            say(f"{count:,}{of} {what}, {pace(count, now - started)}")


def pace(count: int, seconds: float) -> str:
    """Return how fast so many went in so many seconds: the slow ones by what each took."""
    return (
        f"{count / seconds:,.0f} a second" if count >= 2 * seconds else f"{seconds / count:,.1f} s each"
    )


def quiet_libraries() -> None:
    """Keep libraries to warnings, once each, and bars to terminals."""
    if not on_terminal():
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for category in (
        DeprecationWarning,
        FutureWarning,
    ):  # between libraries; not the user's to mend
        warnings.simplefilter("ignore", category)
    for name in ("bitsandbytes", "datasets", "httpx", "huggingface_hub", "lm_eval", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
