"""What a submitted job runs: one stage of a run whose configuration is frozen in ``run.yaml``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic, sleep

from ftpipe import artifacts, home, pipeline, schema
from ftpipe.artifacts import Artifact
from ftpipe.cluster.record import Record
from ftpipe.errors import BusyError, UserError
from ftpipe.launch import StageFailed, run_stage

PATIENCE, PAUSE = 300.0, 2.0  # seconds: in all, and between two looks


def run(folder: Path, stage: str) -> tuple[Artifact, bool]:
    """Make a stage's artifact, or find that it is made; return it and whether it had to be built.

    Where an earlier attempt of the job still ends on a node that was lost, this waits for it.

    Args:
        folder: of the run.

    Raises:
        UserError: if there is no such run, or the stage refuses its input.
        Stopped: if it was asked to stop, and has saved its state.
        StageFailed: if what it needs was not made, or it ends in any other way.
    """
    if not (folder / "run.yaml").is_file():
        raise UserError(f"{folder} holds no run.yaml; give the folder of a run.")
    cfg = schema.load(folder / "run.yaml")
    steps = pipeline.plan(cfg, stage)
    step, root = steps[-1], Path(cfg.output)
    if step.artifact is not None:
        return step.artifact, False
    inputs = {}
    for kind, maker in step.inputs.items():
        before = next(one for one in steps if one.stage.name == maker)
        made = artifacts.find(root, maker, before.fingerprint)
        if made is None:
            raise StageFailed(
                f"'{stage}' needs {before.place}, which is not there: '{maker}' has not made it, or its "
                "data changed after the run was submitted."
            )
        inputs[kind] = made
    print(f"{stage}: {step.stage.does}", flush=True)
    command = [home.long(word) for word in Record.read(folder).command]
    since = monotonic()
    waits = False
    while True:
        try:
            return run_stage(cfg, step, inputs, folder, command)
        except BusyError as error:
            if monotonic() - since > PATIENCE:
                raise
            if not waits:
                print(f"{error} This job waits {PATIENCE / 60:.0f} minutes for that.", flush=True)
            waits = True
            sleep(PAUSE)
