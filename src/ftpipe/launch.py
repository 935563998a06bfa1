"""Run one stage as one subprocess, and turn its folder into an artifact.

One rank is that process; several are started by ``accelerate launch``, in a job of Slurm by ``srun``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

from ftpipe import (
    artifacts,
    attempts,
    determinism,
    home,
    launch_settings,
    origins,
    pipeline,
    provenance,
    stopping,
)
from ftpipe.artifacts import Artifact
from ftpipe.choices import Device, Precision, Strategy
from ftpipe.cluster import ranks
from ftpipe.combinations import TRAIN
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError, DataError, UserError
from ftpipe.orphans import end_with_parent
from ftpipe.pipeline import Stage, Step
from ftpipe.schema import recorded
from ftpipe.stopping import Stopped

RESULT = ".result.json"  # metrics, peak memory, environment: written by rank 0 when the stage is done
DRIVER = "FTPIPE_DRIVER"  # environment variable of a rank: the process that waits for it
ERROR = ".error.json"  # a user error's sentence, in place of RESULT
STOPPED = ".stopped.json"  # where a stage was that stopped because it was asked to, in place of RESULT
STOP = ".stop"  # what asks a stage to stop, unless a job has another name for it
WORDS = ".rank-{}.log"  # what a rank other than the first prints; gone when it has ended well
LAST = 12  # lines of them that are shown
# glibc gives what is freed at the heap's end back to the kernel, which clears the same pages again for
# the next layer: up to half of a forward pass on a CPU. Both, since to set one ends its own adjustment
# of the other, which would come to the same 32 MiB (mallopt(3)).
MALLOC = {"MALLOC_TRIM_THRESHOLD_": 2**40, "MALLOC_MMAP_THRESHOLD_": 2**25}  # bytes


class StageFailed(RuntimeError):
    """A stage ended without finishing; its own output says why."""


def resolve_device(cfg: RunConfig, elsewhere: bool = False) -> None:
    """Replace ``auto`` by what this machine has, so that run.yaml states what ran.

    Args:
        elsewhere: it runs on machines that a job asks for; what this one has is of no account.

    Raises:
        ConfigError: if a GPU is asked for and there is none, or there are too few; if several nodes
            are asked for here, or ``auto`` is left to somewhere else.
    """
    launch = cfg.launch
    if elsewhere:
        if launch.device is Device.auto:
            raise ConfigError(
                "launch.device=auto: a job has to say whether it wants GPUs; choose cuda or cpu, or a "
                "profile such as launch=slurm-1gpu."
            )
        found = launch.processes
    else:
        nodes = max([launch.nodes, *map(launch.nodes_of, cfg.stages)])
        if nodes > 1:
            raise ConfigError(
                f"launch.nodes={nodes} needs a job of Slurm; submit it with `ftpipe submit`."
            )
        found = len(visible_gpus())
    if launch.device is Device.auto:
        launch.device = Device.cuda if found else Device.cpu
    if launch.device is Device.cuda and launch.processes > found:
        raise ConfigError(
            f"launch.processes={launch.processes} needs as many GPUs, but this machine shows {found}."
        )
    if launch.precision is Precision.auto:
        on_gpu = launch.device is Device.cuda
        launch.precision = Precision.bf16 if on_gpu else Precision.fp32
    if launch.precision is Precision.fp16 and launch.device is Device.cpu:
        raise ConfigError("launch.precision=fp16 needs a GPU; on a CPU use fp32 or bf16.")


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    found = provenance.gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or chosen is None:
        return [str(at) for at in range(len(found))]
    return [name.strip() for name in chosen.split(",")][: len(found)]


def run_stage(
    cfg: RunConfig, step: Step, inputs: Mapping[str, Artifact], run: Path, command: Sequence[str]
) -> tuple[Artifact, bool]:
    """Build the artifact of one step; return it and whether it had to be built.

    Args:
        cfg: the resolved configuration, already written as ``run/run.yaml``.
        inputs: finished artifacts by kind.
        command: what the user typed, for the record.

    Raises:
        BusyError: if another process builds the same artifact.
        UserError: if an input is damaged, or the stage refuses it; nothing is left behind but what it
            ``keeps``.
        Stopped: if it was asked to, and has saved its state.
        StageFailed: if it ends in any other way; its scratch folder stays for a resume.
    """
    with artifacts.building(Path(cfg.output), step.stage.name, step.fingerprint) as partial:
        done = artifacts.find(Path(cfg.output), step.stage.name, step.fingerprint)
        if done is not None:  # finished by another process between the plan and the lock
            artifacts.discard(partial)
            return done, False
        for artifact in inputs.values():
            _check_whole(artifact)
        record = provenance.collect(command)
        # now, not after the stage: the checkout may change while it runs
        diff = provenance.uncommitted() if (record["git"] or {}).get("dirty") else None
        started = time.monotonic()
        if (partial / artifacts.MANIFEST).is_file() and not (partial / RESULT).is_file():
            return artifacts.complete(partial), True  # killed in the last instant, when all was written
        if not step.stage.resumes:  # what an interrupted build left is of no use
            artifacts.clear(partial)
        ranks_here = ranks_of(cfg, step.stage)
        now = attempts.facts(record, recorded(cfg)["launch"], ranks_here)
        if not (partial / RESULT).is_file():
            _warn(step.stage.name, attempts.begin(partial, now, step.stage.keeps), now)
        # a driver killed while it published left a whole result: publish that
        result = _result(partial) or _spawn(cfg, step, inputs, run, partial)
        changed = pipeline.changed_data(cfg, step)
        if changed:
            artifacts.discard(partial)
            raise DataError(
                f"{', '.join(changed)}: the file changed while '{step.stage.name}' read it; "
                "repeat the command when it is whole."
            )
        record |= {
            "wall_seconds": round(time.monotonic() - started, 2),
            "peak_memory_gib": round(result["peak_memory_kib"] / 2**20, 3),
            "world_size": ranks_here,
            "seed": cfg.seed,
            "earlier_attempts": attempts.conclude(partial),
            "environment": result.get("environment", {}),
        }
        if diff is not None:
            (partial / "uncommitted.diff").write_text(diff, encoding="utf-8")
        manifest = {
            "kind": step.stage.makes,
            "stage": step.stage.name,
            "fingerprint": step.fingerprint,
            "decided_by": step.facts,
            "inputs": {kind: artifact.path.name for kind, artifact in inputs.items()},
            "metrics": result["metrics"],
            "config": recorded(cfg),
            "origins": origins.read(run),
            "provenance": record,
        }
        return artifacts.publish(partial, manifest, drop=RESULT), True


def _warn(stage: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what the attempt that is continued had otherwise: the result will be of both."""
    if before:
        told = [f"{name} {value} then, {now.get(name)} now" for name, value in before.items()]
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        print(f"WARNING: '{stage}' goes on from an attempt that had {'; '.join(told[:3])}{more}")


def _check_whole(artifact: Artifact) -> None:
    """Refuse an input that is not as it was written: what is learned from it would be another thing.

    Raises:
        DataError: naming the file, and what to do.
    """
    for wrong in artifacts.damage(artifact.path, artifact.manifest["files"]):
        raise DataError(
            f"{artifact.path} is damaged ({wrong}); delete the folder, and the same command makes it "
            "again."
        )


def _spawn(
    cfg: RunConfig, step: Step, inputs: Mapping[str, Artifact], run: Path, partial: Path
) -> dict[str, Any]:
    """Run the stage to its end and return what its first rank reports."""
    name = step.stage.name
    for left in (ERROR, RESULT, STOPPED, STOP):
        (partial / left).unlink(missing_ok=True)
    forget_words(partial)
    resumed = any(path.name != attempts.FILE for path in partial.iterdir())
    settings = run / f"{name}.accelerate.yaml"
    job = {
        "stage": name,
        "run": home.short_path(str(run)),
        "inputs": {kind: home.short_path(str(artifact.path)) for kind, artifact in inputs.items()},
        "out": home.short_path(str(partial)),
        "settings": home.short_path(str(settings)),
    }
    artifacts.write_atomic(run / f"{name}.job.json", json.dumps(job, indent=1) + "\n")
    processes = ranks_of(cfg, step.stage)
    if name not in TRAIN:  # there is nothing to share out
        cfg = replace(cfg, launch=replace(cfg.launch, strategy=Strategy.ddp))
    stop = Path(os.environ.get(stopping.FILE) or partial.absolute() / STOP)
    with stopping.passed_on(stop, name, step.stage.stops):
        process = Popen(
            launch_command(cfg, processes, settings, run / f"{name}.job.json"),
            env=environment(cfg, processes) | {stopping.FILE: str(stop)},
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C or a signal: the launcher passes it on; wait for its ranks
            process.terminate()
            process.wait()
            raise
    if (partial / ERROR).is_file():
        sentence = json.loads((partial / ERROR).read_text())["error"]
        found = partial.glob(step.stage.keeps) if step.stage.keeps else ()
        kept = any(path.stat().st_size for path in found)
        # else a hub that is out of reach for a minute would cost the checkpoints, or the calls
        if not resumed and not kept:
            artifacts.discard(partial)
        raise UserError(sentence)
    if (partial / STOPPED).is_file():
        where = json.loads((partial / STOPPED).read_text())["where"]
        raise Stopped(f"stage '{name}' stopped as it was asked to, {where}; the same command goes on.")
    if code != 0 or not (partial / RESULT).is_file():
        for line in last_words(partial):
            print(line, file=sys.stderr)
        raise StageFailed(f"stage '{name}' ended with code {code}; its output above says why.")
    forget_words(partial)
    (partial / STOP).unlink(missing_ok=True)  # it was asked to stop, but was done by then
    result = _result(partial)
    assert result is not None
    return result


def ranks_of(cfg: RunConfig, stage: Stage) -> int:
    """Return how many ranks run a stage, on all nodes."""
    return cfg.launch.nodes_of(stage.name) * cfg.launch.processes if stage.all_ranks else 1


def forget_words(partial: Path) -> None:
    for left in partial.glob(WORDS.format("*")):
        left.unlink()


def last_words(partial: Path) -> list[str]:
    """Return the last lines of the ranks, other than the first, that did not end well."""
    lines = []
    for file in sorted(partial.glob(WORDS.format("*"))):
        head, *said = file.read_text(encoding="utf-8", errors="replace").splitlines() or [file.name]
        lines += [f"{head} {'ended after these lines:' if said else 'ended without a word'}"]
        lines += [f"  {line}" for line in said[-LAST:]]
    return lines


def _result(partial: Path) -> dict[str, Any] | None:
    """Return what a finished stage left for its driver, if it finished."""
    if not (partial / RESULT).is_file():
        return None
    result: dict[str, Any] = json.loads((partial / RESULT).read_text())
    return result


def launch_command(cfg: RunConfig, processes: int, settings: Path, job: Path) -> list[str]:
    """Return the command that starts a stage's ranks: ``accelerate launch``, or ``srun`` in a job.

    To a rank that is alone a launcher would add nothing but the seconds that its imports take. The
    settings of several are written to a file, which keeps a default configuration in the user's home
    from changing the launch; ranks of ``srun`` read them from it.
    """
    if processes == 1:
        alone = [sys.executable, "-m", "ftpipe.worker", str(job)]
        return ranks.command(cfg.launch.slurm, 1, job) if ranks.by_srun() else alone
    launch = cfg.launch
    lines: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # with a CPU, MULTI_GPU is what starts ranks that find each other through gloo
        "distributed_type": "MULTI_GPU",
        "mixed_precision": f"'{mixed(launch.precision)}'",
        "num_machines": 1,
        "num_processes": processes,
        "use_cpu": str(launch.device is Device.cpu).lower(),
        "main_process_port": 0,
        "main_training_function": "main",
    }
    lines |= launch_settings.shared_out(cfg, processes, settings.parent)
    told = {key: value for key, value in lines.items() if value is not None}
    # YAML takes dicts as Python prints them
    artifacts.write_atomic(settings, "".join(f"{key}: {value}\n" for key, value in told.items()))
    if ranks.by_srun():
        return ranks.command(launch.slurm, processes, job)
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(settings), "--quiet"),
        *("--module", "ftpipe.worker", str(job)),
    ]


def mixed(precision: Precision) -> str:
    """Return accelerate's word for a number format."""
    return "no" if precision is Precision.fp32 else precision.value


def environment(cfg: RunConfig, processes: int) -> dict[str, str]:
    """Return the environment of the ranks: threads shared out, hashing and cuBLAS repeatable."""
    in_job = ranks.by_srun()
    here = min(processes, cfg.launch.processes) if in_job else processes  # on this node
    threads = cfg.launch.threads or max(1, len(os.sched_getaffinity(0)) // here)
    fixed: dict[str, Any] = {
        **determinism.environment(cfg.determinism),
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": 1,
        "ACCELERATE_MIXED_PRECISION": mixed(cfg.launch.precision),
        home.HOME: home.folder() or "",
    }
    if not in_job:
        fixed[DRIVER] = os.getpid()
    elif processes > 1:
        fixed |= ranks.meeting_point()
    if cfg.launch.device is Device.cpu:
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        fixed |= {name: size for name, size in MALLOC.items() if name not in os.environ}
        if processes == 1 or cfg.launch.strategy not in launch_settings.STAGES:
            fixed["ACCELERATE_USE_CPU"] = "true"  # accelerate leaves DeepSpeed out where it reads this
    elif not in_job:  # one a rank: a process that sees several would spread one batch over them
        fixed["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[:processes])
    return {**os.environ, **{key: str(value) for key, value in fixed.items()}}


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, so that no rank is orphaned.

    A rank whose driver ended before it could ask ends here: its lock may be another's by now.
    """
    if sys.platform == "linux":
        end_with_parent()
        driver = os.environ.get(DRIVER)
        if driver is not None and driver not in _elders():
            sys.exit(1)


def _elders() -> tuple[str, ...]:
    """Return the ids of this process's parent and, behind a launcher, of the parent's parent."""
    parent = str(os.getppid())
    try:
        # proc(5): pid (name) state ppid; the name may hold anything
        return parent, Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return (parent,)
