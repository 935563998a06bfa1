"""Slurm's commands, and what they say of a job."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from ftpipe.errors import ConfigError, UserError

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "STOPPED", "SIGNALING", "RESIZING")


@dataclass(frozen=True)
class State:
    """What Slurm says of a job.

    Attributes:
        word: its state, such as RUNNING.
        reason: why it waits or has ended; empty where there is nothing to say.
        code: how it ended, such as ``code 1`` or ``signal 9``; empty where it ended well.
        attempt: from 1.
    """

    word: str
    reason: str = ""
    code: str = ""
    nodes: str = ""
    attempt: int = 1

    @property
    def alive(self) -> bool:
        return self.word in WAITING or self.word in RUNNING


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def check(script: str, what: str) -> None:
    """Ask Slurm whether it would take a job; nothing is submitted.

    Raises:
        ConfigError: with Slurm's reason.
    """
    done = _run(["sbatch", "--test-only"], script)
    if done.returncode:
        raise ConfigError(f"Slurm refuses the job of '{what}': {reason_of(done.stderr)}.")


def submit(script: str, what: str, dependency: str = "") -> str:
    """Submit a script; return the job's id.

    Args:
        dependency: as ``--dependency`` takes it.

    Raises:
        UserError: with Slurm's reason.
    """
    after = [f"--dependency={dependency}"] if dependency else []
    done = _run(["sbatch", "--parsable", *after], script)
    if done.returncode:
        raise UserError(f"Slurm refuses the job of '{what}': {reason_of(done.stderr)}.")
    return done.stdout.strip().split(";")[0]  # id;cluster


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are left as they are."""
    _run(["scancel", "--quiet", *ids])


def state(job: str) -> State | None:
    """Return what Slurm says of a job, its controller or its accounting; None where neither knows it."""
    shown = _run(["scontrol", "--oneliner", "show", "job", job])
    if shown.returncode == 0:
        return from_scontrol(shown.stdout)
    if shutil.which("sacct") is None:
        return None
    fields = "State,ExitCode,NodeList"
    kept = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "-o", fields])
    return from_sacct(kept.stdout) if kept.returncode == 0 else None


def from_scontrol(text: str) -> State | None:
    """Read ``scontrol --oneliner show job``.

    >>> from_scontrol("JobId=7 JobName=x JobState=PENDING Reason=Priority Restarts=1 ExitCode=0:0").word
    'PENDING'
    """
    found = re.findall(r"(?:^|\s)(\w+)=(\S*)", text.splitlines()[0]) if text.strip() else []
    said = dict(reversed(found))  # the first of each name: a path that comes later may hold others
    if "JobState" not in said:
        return None
    return State(
        word=said["JobState"],
        reason=_unless(said.get("Reason", ""), ("None", "(null)")),
        code=_code(said.get("ExitCode", "")),
        nodes=_unless(said.get("NodeList", ""), ("(null)",)),
        attempt=int(said.get("Restarts", "0")) + 1,
    )


def from_sacct(text: str) -> State | None:
    """Read one line of ``State|ExitCode|NodeList``; ``CANCELLED by 0`` is CANCELLED."""
    if not text.strip():
        return None
    word, code, nodes = text.splitlines()[0].split("|")
    return State(word.split()[0], code=_code(code), nodes=_unless(nodes, ("None assigned",)))


def reason_of(stderr: str) -> str:
    """Return the last thing that a command of Slurm complained of, without its name."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else "it does not say why"


def _code(code: str) -> str:
    """Return ``code 1`` or ``signal 9`` of Slurm's ``1:0`` or ``0:9``; nothing of success."""
    number, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return f"signal {signal}"
    return "" if number in ("", "0") else f"code {number}"


def _unless(word: str, nothing: Sequence[str]) -> str:
    return "" if word in nothing else word


def _run(words: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    except OSError:
        raise UserError(f"{words[0]} is not here; this needs a machine that submits to Slurm.") from None
