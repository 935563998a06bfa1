"""Make a stage of a run again, from the artifacts it had, in a folder of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

from ftpipe import pipeline, schema, stopping
from ftpipe.artifacts import Artifact
from ftpipe.config import RunConfig
from ftpipe.launch import run_stage
from ftpipe.pipeline import Step
from ftpipe.stopping import Stopped

LOG = "rebuild.log"  # what the stages print


def again(
    cfg: RunConfig, step: Step, inputs: Mapping[str, Artifact], scratch: Path, steps: int | None
) -> Path:
    """Make a stage again; return the folder with what it made.

    Args:
        cfg: of the recorded run, with what this machine asks for.
        step: as it would be made here and now.
        inputs: the recorded artifacts that it had.
        scratch: an empty folder, or that of the stage before.
        steps: optimiser steps (or rollouts) after which it ends, with nothing saved; None: to its end.

    Raises:
        UserError: if the stage refuses its input here.
        Stopped: if it was asked to stop.
        StageFailed: if it ends in any other way.
    """
    here = replace(cfg, output=str(scratch))
    run = pipeline.write_run(here, schema.dump(here))
    place = scratch / "artifacts" / step.place.name
    with printing_to(scratch / LOG), _limited(steps):
        try:
            return run_stage(here, step, inputs, run, ["ftpipe", "verify"])[0].path
        except Stopped:
            if steps is None or stopping.driver_asked():  # it was not the number of steps that ended it
                raise
            return place.with_name(f"{place.name}.partial")


@contextmanager
def _limited(steps: int | None) -> Iterator[None]:
    if steps is None:
        yield
        return
    os.environ[stopping.STEPS] = str(steps)
    try:
        yield
    finally:
        del os.environ[stopping.STEPS]


@contextmanager
def printing_to(log: Path) -> Iterator[None]:
    """Let this process and those it starts print into a file."""
    sys.stdout.flush()
    kept = os.dup(1)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            file.flush()
            os.dup2(kept, 1)
            os.close(kept)
