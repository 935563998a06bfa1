"""Metrics of a run: always ``metrics.jsonl``, and wandb where asked. The only importer of wandb.

A missing or failing wandb never stops a training: it is said once, and the lines go on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftpipe.artifacts import write_atomic
from ftpipe.choices import WandbMode
from ftpipe.config import RunConfig
from ftpipe.logs import say
from ftpipe.schema import recorded


class Tracker:
    """Writes a stage's metrics. Use from the first rank only.

    Args:
        done: the step a resumed run continues from; later lines of the interrupted run are dropped.
    """

    def __init__(self, cfg: RunConfig, stage: str, out: Path, done: int = 0) -> None:
        self._stage = stage
        path = out / "metrics.jsonl"
        write_atomic(path, "".join(f"{line}\n" for line in _lines_upto(path, done)))
        self._lines = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(cfg, stage, out.name.removesuffix(".partial"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step, under the stage's name: ``sft/loss``."""
        named = {f"{self._stage}/{key}": value for key, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **named}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())  # a checkpoint counts on the lines before it
        self._to_wandb(lambda run: run.log(named, step=step))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._to_wandb(lambda run: run.finish())
        self._lines.close()

    def summary(self, summary: Mapping[str, float]) -> None:
        """Record the final metrics."""
        named = {f"{self._stage}/{key}": value for key, value in summary.items()}
        self._to_wandb(lambda run: run.summary.update(named))

    def images(self, files: Mapping[str, Path], step: int | None = None) -> None:
        """Show pictures in wandb, under the stage's name; without wandb their files are enough.

        Args:
            files: PNGs by name.
            step: None: the last one logged.
        """

        def send(run: Any) -> None:
            import wandb

            named = {f"{self._stage}/{name}": wandb.Image(str(path)) for name, path in files.items()}
            run.log(named, step=step)

        self._to_wandb(send)

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # whatever wandb raises: tracking must not end a training
            _complain(error)
            self._wandb = None


def _lines_upto(path: Path, step: int) -> list[str]:
    """Return the whole lines of metrics up to a step."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):  # cut off by the kill
            continue
    return kept


def _start_wandb(cfg: RunConfig, stage: str, artifact: str) -> Any:
    """Return a wandb run: project, group = run, job type = stage, tags, the full configuration."""
    mode = _mode(cfg)
    if mode is WandbMode.disabled:
        return None
    folder = Path(cfg.output)
    try:
        import wandb

        return wandb.init(
            project=cfg.tracking.project,
            entity=cfg.tracking.entity,
            group=cfg.name,
            job_type=stage,
            name=f"{cfg.name}-{artifact}",
            tags=list(cfg.tracking.tags) or None,
            config=recorded(cfg),
            dir=str(folder),
            mode="online" if mode is WandbMode.online else "offline",
            # wandb would record the user, the host, the program's path and the console
            settings=wandb.Settings(
                host="",
                x_disable_meta=True,
                x_disable_machine_info=True,
                disable_git=True,
                disable_code=True,
                console="off",
                silent=True,
                init_timeout=30,
            ),
        )
    except Exception as error:  # no package, no network, no key: none of them is a reason to stop
        _complain(error)
        return None


def _mode(cfg: RunConfig) -> WandbMode:
    """Return the configured mode, or what wandb's own WANDB_MODE makes of it."""
    asked = os.environ.get("WANDB_MODE", "")
    if cfg.tracking.wandb is not WandbMode.disabled and asked in list(WandbMode):
        return WandbMode(asked)
    return cfg.tracking.wandb


def _complain(error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    say(f"wandb: {reason.rstrip('.')}; the training goes on, metrics are in metrics.jsonl")
