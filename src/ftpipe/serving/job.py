"""An answer that is asked for, and what is told of it while it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ftpipe.choices import Ended
from ftpipe.data.prompt import Endings, Prompt
from ftpipe.serving.sampling import Sampling


@dataclass(frozen=True)
class Said:
    """Some more of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        tokens: that were generated, with the one that ended it.
    """

    why: Ended
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of an answer that cannot be given."""

    why: str


Event = Said | Done | Failed


class Job:
    """An answer that is asked for. ``tell`` is called from the engine's thread."""

    def __init__(
        self, prompt: Prompt, sampling: Sampling, endings: Endings, tell: Callable[[Event], None]
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.endings = endings
        self.tell = tell
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask for its end: before it begins, or after the token that is being computed."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()
