"""Paths below the user's home: recorded with ``~``, so that a record names nobody; expanded where read.

A shell expands ``output=~/x`` before ftpipe sees it, so a record may be shorter than what came in.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    from ftpipe.config import RunConfig

HOME = "FTPIPE_HOME"  # environment variable of a rank: its driver's home; a container may have another


def folder() -> str | None:
    """Return the home that ``~`` stands for, or None where there is none to speak of."""
    home = (os.environ.get(HOME) or os.path.expanduser("~")).rstrip("/")
    return home if home.startswith("/") else None


def short(text: str) -> str:
    """Write ``~`` for the home wherever a text names it, such as in the words of a command."""
    home = folder()
    if home is None:
        return text
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", text)


def long(text: str) -> str:
    """Undo ``short``: for words that are to be read once more."""
    home = folder()
    return text if home is None else re.sub(r"(?<![\w.~/-])~(?=/|$)", lambda _: home, text)


def short_path(path: str) -> str:
    """Write ``~`` for the home that a path begins with; ``full`` undoes it."""
    home = folder()
    if home is None or not f"{path}/".startswith(f"{home}/"):
        return path
    return "~" + path[len(home) :]


def from_here(path: str) -> str:
    """Return a path below the home as it is found from the working directory, if that is below it too.

    For files that other programs read, which take ``~`` for a name.
    """
    home, here = folder(), os.getcwd()
    if home is None or not all(f"{place}/".startswith(f"{home}/") for place in (path, here)):
        return path
    return os.path.relpath(path, here)


def full(path: str) -> str:
    """Replace a leading ``~``.

    Raises:
        ConfigError: for the home of somebody who does not exist.
    """
    home = folder()
    if home is not None and (path == "~" or path.startswith("~/")):
        return home + path[1:]
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such home folder.") from None


def expand(cfg: RunConfig) -> None:
    """Replace a leading ``~`` in paths, once, for everything that reads them.

    Raises:
        ConfigError: for the home of somebody who does not exist.
    """
    _change(cfg, full)
    _change_lines(cfg, long)


def shortened(cfg: RunConfig) -> RunConfig:
    """Return a copy of a configuration whose paths are as they are recorded."""
    recorded = copy.deepcopy(cfg)
    _change(recorded, short_path)
    _change_lines(recorded, short)
    return recorded


def _change_lines(cfg: RunConfig, change: Callable[[str], str]) -> None:
    """Change what names paths among other words: the lines of a job's script."""
    slurm = cfg.launch.slurm
    for lines in (slurm.setup, slurm.container, slurm.srun, slurm.extra):
        lines[:] = map(change, lines)


def _change(cfg: RunConfig, change: Callable[[str], str]) -> None:
    def changed(path: str | None) -> str | None:
        return change(path) if path else path

    cfg.output = change(cfg.output)
    cfg.model.path = changed(cfg.model.path)
    cfg.model.tokenizer = changed(cfg.model.tokenizer)
    cfg.evolve.seeds.path = changed(cfg.evolve.seeds.path)
    cfg.export.converter = changed(cfg.export.converter)
    cfg.export.quantizer = changed(cfg.export.quantizer)
    cfg.launch.sharding.nvme = changed(cfg.launch.sharding.nvme)
    cfg.launch.slurm.venv = changed(cfg.launch.slurm.venv)
    for source in cfg.data.sources.values():
        source.path = change(source.path)
    for questions in cfg.data.decontaminate.values():
        questions.path = change(questions.path)
    judge = cfg.evaluate.judge
    judge.reward_model = changed(judge.reward_model)
    for texts in (*cfg.evaluate.prompts.values(), *cfg.evaluate.answers.values()):
        texts.path = change(texts.path)
    cfg.evaluate.mmlu.path = changed(cfg.evaluate.mmlu.path)
    for task in cfg.evaluate.harness.tasks.values():
        task.files = {split: change(file) for split, file in task.files.items()}
