"""One stage as one process: where it runs, with which settings, and what is left when it ends."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from ftpipe import artifacts, home, launch, origins, pipeline, schema
from ftpipe.artifacts import Artifact
from ftpipe.choices import Device, EvalFormat, Precision, Strategy
from ftpipe.config import EvalSetConfig, RunConfig
from ftpipe.errors import BusyError, ConfigError, DataError, UserError
from ftpipe.launch import StageFailed, environment, launch_command, resolve_device, run_stage
from ftpipe.pipeline import Step
from ftpipe.slurm_config import StageJobConfig


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in the way that answers as nvidia-smi does on a machine with two GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA A100, 560.1, 81920 MiB'\necho 'NVIDIA A100, 560.1, 81920 MiB'\n",
        encoding="utf-8",
    )
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def auto(cfg: RunConfig, device: Device = Device.auto, precision: Precision = Precision.auto) -> None:
    cfg.launch.device, cfg.launch.precision = device, precision


# --- device and precision ---


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_processor_in_full_precision(cfg: RunConfig) -> None:
    auto(cfg)
    resolve_device(cfg)
    assert (cfg.launch.device, cfg.launch.precision) == (Device.cpu, Precision.fp32)


@pytest.mark.usefixtures("two_gpus")
def test_with_a_gpu_it_is_the_gpu_in_bfloat16(cfg: RunConfig) -> None:
    auto(cfg)
    resolve_device(cfg)
    assert (cfg.launch.device, cfg.launch.precision) == (Device.cuda, Precision.bf16)


@pytest.mark.usefixtures("two_gpus")
def test_what_was_asked_for_is_kept(cfg: RunConfig) -> None:
    auto(cfg, Device.cpu, Precision.bf16)
    resolve_device(cfg)
    assert (cfg.launch.device, cfg.launch.precision) == (Device.cpu, Precision.bf16)
    auto(cfg, Device.cuda, Precision.fp16)
    resolve_device(cfg)
    assert (cfg.launch.device, cfg.launch.precision) == (Device.cuda, Precision.fp16)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("visible", "found"), [(None, 2), ("0", 1), ("1", 1), ("0,1", 2), ("1, 7", 1)])
def test_each_rank_needs_a_gpu_that_is_visible(
    cfg: RunConfig, visible: str | None, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    auto(cfg)
    cfg.launch.processes = found
    resolve_device(cfg)
    cfg.launch.processes = found + 1
    with pytest.raises(ConfigError) as refused:
        resolve_device(cfg)
    assert str(refused.value) == (
        f"launch.processes={found + 1} needs as many GPUs, but this machine shows {found}."
    )


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused(cfg: RunConfig) -> None:
    auto(cfg, Device.cuda)
    with pytest.raises(ConfigError, match=r"^launch\.processes=1 needs as many GPUs, .* shows 0\.$"):
        resolve_device(cfg)


def test_half_precision_needs_a_gpu(cfg: RunConfig) -> None:
    auto(cfg, Device.cpu, Precision.fp16)
    with pytest.raises(ConfigError, match=r"^launch\.precision=fp16 needs a GPU; "):
        resolve_device(cfg)


def test_any_number_of_ranks_fits_on_a_processor(cfg: RunConfig) -> None:
    auto(cfg, Device.cpu)
    cfg.launch.processes = 64
    resolve_device(cfg)


# --- the command and its settings ---


@pytest.mark.parametrize(
    ("device", "precision", "processes", "settings"),
    [
        (Device.cpu, Precision.fp32, 2, ("MULTI_GPU", "no", True)),
        (Device.cpu, Precision.bf16, 2, ("MULTI_GPU", "bf16", True)),
        (Device.cuda, Precision.bf16, 3, ("MULTI_GPU", "bf16", False)),
        (Device.cuda, Precision.fp16, 4, ("MULTI_GPU", "fp16", False)),
    ],
)
def test_the_settings_say_where_it_runs(
    cfg: RunConfig,
    tmp_path: Path,
    device: Device,
    precision: Precision,
    processes: int,
    settings: tuple[str, str, bool],
) -> None:
    cfg.launch.device, cfg.launch.precision = device, precision
    file, job = tmp_path / "accelerate.yaml", tmp_path / "job.json"
    command = launch_command(cfg, processes, file, job)
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = (said["distributed_type"], said["mixed_precision"], said["use_cpu"])
    assert found == settings
    assert (said["num_processes"], said["num_machines"]) == (processes, 1)
    assert command[0] == sys.executable
    assert command[command.index("--config_file") + 1] == str(file)
    assert command[-3:] == ["--module", "ftpipe.worker", str(job)]


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_one_rank_needs_no_launcher(cfg: RunConfig, tmp_path: Path, precision: Precision) -> None:
    cfg.launch.device, cfg.launch.precision = Device.cpu, precision
    file, job = tmp_path / "accelerate.yaml", tmp_path / "job.json"
    assert launch_command(cfg, 1, file, job) == [sys.executable, "-m", "ftpipe.worker", str(job)]
    assert not file.exists()
    told = (
        "from accelerate import PartialState, Accelerator\n"
        "print(Accelerator().mixed_precision, PartialState().device, PartialState().num_processes)"
    )
    said = subprocess.run(
        [sys.executable, "-c", told], env=environment(cfg, 1), stdout=subprocess.PIPE, text=True
    )
    assert said.stdout.split() == ["no" if precision is Precision.fp32 else "bf16", "cpu", "1"]


def test_the_settings_are_ones_that_accelerate_takes(cfg: RunConfig, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    cfg.launch.precision = Precision.bf16
    launch_command(cfg, 2, tmp_path / "accelerate.yaml", tmp_path / "job.json")
    read = load_config_from_file(str(tmp_path / "accelerate.yaml"))
    assert (str(read.mixed_precision), read.num_processes, read.use_cpu) == ("bf16", 2, True)
    assert str(read.distributed_type).endswith("MULTI_GPU")


def test_threads_are_shared_out_between_ranks(cfg: RunConfig) -> None:
    cores = len(os.sched_getaffinity(0))
    assert environment(cfg, 1)["OMP_NUM_THREADS"] == str(cores)
    assert environment(cfg, cores)["OMP_NUM_THREADS"] == "1"
    assert environment(cfg, 99 * cores)["OMP_NUM_THREADS"] == "1"
    cfg.launch.threads = 7
    assert environment(cfg, 2)["OMP_NUM_THREADS"] == "7"


def test_ranks_get_what_repeatable_numbers_need(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    monkeypatch.setenv("MINE", "kept")
    ranks = environment(cfg, 1)
    # docs.nvidia.com/cuda/cublas, "Results Reproducibility"
    assert ranks["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert ranks["PYTHONHASHSEED"] == "0"
    assert ranks["MINE"] == "kept"


def test_a_stage_on_the_processor_sees_no_gpu(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert environment(cfg, 1)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the keys are glibc's")
def test_a_stage_on_the_processor_keeps_the_memory_that_it_frees(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launch.MALLOC:
        monkeypatch.delenv(name, raising=False)
    cfg.launch.device = Device.cpu
    # what a layer needs, taken and given back a hundred times; faults are the pages that are cleared
    told = (
        "import resource\n"
        "for _ in range(100):\n"
        "    layer = [bytearray(20 << 20) for _ in range(4)]\n"
        "    del layer\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() >> 20)"
    )
    command = [sys.executable, "-c", told]
    kept, plain = (
        int(subprocess.check_output(command, env=env)) for env in (environment(cfg, 1), dict(os.environ))
    )
    assert kept < 200  # 80 of one round, and Python's own
    assert plain > 2000  # else glibc does so by itself by now, and launch.MALLOC can go


def test_the_users_own_settings_of_memory_stand(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg.launch.device = Device.cpu
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert environment(cfg, 1)["MALLOC_TRIM_THRESHOLD_"] == "131072"
    cfg.launch.device = Device.cuda
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert "MALLOC_TRIM_THRESHOLD_" not in environment(cfg, 1)


# --- what becomes of the process ---


def first_step(cfg: RunConfig) -> tuple[Step, Path]:
    return pipeline.plan(cfg)[0], pipeline.write_run(cfg, schema.dump(cfg))


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a real process of a few lines take the worker's place; it gets the job file as argument."""
    head = "import json, os, pathlib, sys, time\njob = json.load(open(sys.argv[1]))\n"
    head += "out = pathlib.Path(job['out'])\n"

    def command(cfg: RunConfig, processes: int, settings: Path, job: Path) -> list[str]:
        return [sys.executable, "-c", head + code, str(job)]

    monkeypatch.setattr(launch, "launch_command", command)


ENVIRONMENT = {"threads": 7}
# half a GiB
RESULT = {"metrics": {"loss": 0.5}, "peak_memory_kib": 2**19, "environment": ENVIRONMENT}
DONE = f"(out / {launch.RESULT!r}).write_text(json.dumps({RESULT}))\n"


def build(cfg: RunConfig, words: Sequence[str] = ("ftpipe", "run")) -> tuple[Artifact, bool]:
    step, run = first_step(cfg)
    return run_stage(cfg, step, {}, run, words)


def test_a_finished_stage_is_an_artifact_with_its_provenance(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "(out / 'weights').write_text('abc')\n" + DONE)
    step, run = first_step(cfg)
    origins.write(run, {"seed": "recipe mine"})
    made, fresh = run_stage(cfg, step, {}, run, ["ftpipe", "run", "recipe=mine", "--token=abc"])
    assert fresh
    assert (made.kind, made.stage, made.fingerprint) == ("base_model", "model", step.fingerprint)
    assert made.metrics == {"loss": 0.5}
    manifest = made.manifest
    assert manifest["decided_by"] == step.facts
    assert artifacts.fingerprint(manifest["decided_by"]) == made.fingerprint
    assert manifest["config"] == yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    assert manifest["origins"] == {"seed": "recipe mine"}
    provenance = manifest["provenance"]
    assert provenance["environment"] == ENVIRONMENT
    assert provenance["command"] == "ftpipe run recipe=mine --token=<removed>"
    assert (provenance["world_size"], provenance["seed"]) == (1, cfg.seed)
    assert provenance["peak_memory_gib"] == 0.5
    assert {"python", "packages", "hardware", "lock", "git", "wall_seconds"} <= set(provenance)
    assert json.loads((run / "model.job.json").read_text(encoding="utf-8"))["stage"] == "model"


@pytest.mark.parametrize(("all_ranks", "world_size"), [(True, 2), (False, 1)])
def test_ranks_are_for_the_stages_that_use_them(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, all_ranks: bool, world_size: int
) -> None:
    cfg.launch.processes = 2
    step, run = first_step(cfg)
    step = dataclasses.replace(step, stage=dataclasses.replace(step.stage, all_ranks=all_ranks))
    asked: list[int] = []
    stand_in(monkeypatch, DONE)
    stand = launch.launch_command

    def command(cfg: RunConfig, processes: int, settings: Path, job: Path) -> list[str]:
        asked.append(processes)
        return stand(cfg, processes, settings, job)

    monkeypatch.setattr(launch, "launch_command", command)
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert (asked, made.manifest["provenance"]["world_size"]) == ([world_size], world_size)


@pytest.mark.parametrize(("stage", "strategy"), [("reference", "ddp"), ("sft", "zero2")])
def test_only_what_trains_is_shared_out(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, stage: str, strategy: str
) -> None:
    cfg.launch.processes, cfg.launch.strategy = 2, Strategy.zero2
    step, run = first_step(cfg)
    step = dataclasses.replace(step, stage=dataclasses.replace(step.stage, name=stage, all_ranks=True))
    asked: list[str] = []
    stand_in(monkeypatch, DONE)
    stand = launch.launch_command

    def command(cfg: RunConfig, processes: int, settings: Path, job: Path) -> list[str]:
        asked.append(cfg.launch.strategy)
        return stand(cfg, processes, settings, job)

    monkeypatch.setattr(launch, "launch_command", command)
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert asked == [strategy]
    assert made.manifest["config"]["launch"]["strategy"] == "zero2"  # as it was asked for


def test_paths_below_the_home_are_not_in_the_job_and_the_rank_finds_them(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg.output = str(tmp_path / "kept")
    cfg.data.sources["mine"].path = str(tmp_path / "rows.json")
    stand_in(monkeypatch, "out = pathlib.Path(os.environ['FTPIPE_HOME'] + job['out'][1:])\n" + DONE)
    step, run = first_step(cfg)
    made, _ = run_stage(cfg, step, {"dataset": made_before(tmp_path)}, run, ["ftpipe"])
    text = (run / "model.job.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    job = json.loads(text)
    assert home.full(job["run"]) == str(run)
    assert home.full(job["inputs"]["dataset"]) == str(tmp_path / "before")
    assert made.manifest["config"]["output"] == "~/kept"
    assert str(tmp_path) not in (made.path / "manifest.json").read_text(encoding="utf-8")


def made_before(folder: Path) -> Artifact:
    return Artifact("dataset", "prepare", "0" * 16, folder / "before", {"files": {}})


def test_ranks_are_those_of_all_nodes(cfg: RunConfig) -> None:
    cfg.launch.processes, cfg.launch.nodes = 4, 2
    cfg.launch.slurm.stages = {"dpo": StageJobConfig(nodes=3), "merge": StageJobConfig(nodes=3)}
    stages = pipeline.STAGES
    found = {name: launch.ranks_of(cfg, stages[name]) for name in ("prepare", "sft", "dpo", "merge")}
    assert found == {"prepare": 1, "sft": 8, "dpo": 12, "merge": 1}


def test_a_stage_that_is_made_already_is_not_built_again(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, DONE)
    made, _ = build(cfg)
    stand_in(monkeypatch, "sys.exit('must not run')")
    assert build(cfg) == (made, False)
    assert not list(Path("outputs/artifacts").glob("*.partial"))


@pytest.mark.parametrize("which", ["data.sources.mine", "data.decontaminate.asked"])
def test_data_that_changes_while_it_is_read_is_no_artifact(
    cfg: RunConfig, rows: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    questions = Path("questions.txt")
    questions.write_text("Who?\n", encoding="utf-8")
    cfg.data.decontaminate = {"asked": EvalSetConfig(EvalFormat.text, str(questions))}
    changes = rows if which == "data.sources.mine" else questions
    run = pipeline.write_run(cfg, schema.dump(cfg))
    step = next(step for step in pipeline.plan(cfg) if step.stage.name == "prepare")
    stand_in(monkeypatch, f"open({str(changes)!r}, 'a').write(' ')\n" + DONE)
    with pytest.raises(DataError, match=rf"^{which}: the file changed while 'prepare' read it"):
        run_stage(cfg, step, {}, run, ["ftpipe"])
    assert [path.suffix for path in step.place.parent.iterdir() if path.is_file()] == [".lock"]
    assert not step.place.exists()
    # one that is gone was open until then
    step = next(step for step in pipeline.plan(cfg) if step.stage.name == "prepare")
    stand_in(monkeypatch, f"os.remove({str(changes)!r})\n" + DONE)
    assert run_stage(cfg, step, {}, run, ["ftpipe"])[0].path == step.place


def test_a_users_error_is_its_sentence_and_leaves_nothing(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        f"launch_error = {launch.ERROR!r}\n"
        "(out / 'half').write_text('x')\n"
        "(out / launch_error).write_text(json.dumps({'error': 'row 3: no.'}))",
    )
    with pytest.raises(UserError, match=r"^row 3: no\.$"):
        build(cfg)
    assert [path.suffix for path in Path("outputs/artifacts").iterdir()] == [".lock"]


def test_a_users_error_on_the_way_back_costs_no_checkpoint(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # such as a hub that is out of reach when a killed training is continued
    step, run = first_step(cfg)
    step = dataclasses.replace(step, stage=dataclasses.replace(step.stage, resumes=True))
    stand_in(monkeypatch, "(out / 'checkpoint').touch()\nsys.exit(3)")
    with pytest.raises(StageFailed):
        run_stage(cfg, step, {}, run, ["ftpipe"])
    stand_in(monkeypatch, f"(out / {launch.ERROR!r}).write_text(json.dumps({{'error': 'no hub.'}}))")
    with pytest.raises(UserError, match=r"^no hub\.$"):
        run_stage(cfg, step, {}, run, ["ftpipe"])
    stand_in(monkeypatch, DONE)
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert set(made.manifest["files"]) - {"uncommitted.diff"} == {"checkpoint"}


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -9),
        (DONE + "sys.exit(1)", 1),  # a result alone is no success
        ("", 0),  # nor is a good end without a result
    ],
)
def test_a_crash_keeps_the_scratch_and_makes_no_artifact(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, code: str, number: int
) -> None:
    stand_in(monkeypatch, "(out / 'checkpoint').write_text('x')\n" + code)
    with pytest.raises(StageFailed) as failed:
        build(cfg)
    assert str(failed.value) == f"stage 'model' ended with code {number}; its output above says why."
    (partial,) = Path("outputs/artifacts").glob("*.partial")
    assert (partial / "checkpoint").is_file()
    assert artifacts.find(Path("outputs"), *partial.stem.split("-")) is None


def test_an_error_of_an_earlier_attempt_is_forgotten(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, _ = first_step(cfg)
    partial = step.place.with_name(f"{step.place.name}.partial")
    partial.mkdir(parents=True)
    (partial / launch.ERROR).write_text('{"error": "old"}', encoding="utf-8")
    stand_in(monkeypatch, DONE)
    made, _ = build(cfg)
    assert not (made.path / launch.ERROR).exists()


def test_what_a_driver_killed_while_publishing_left_is_published(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, run = first_step(cfg)
    step = dataclasses.replace(step, stage=dataclasses.replace(step.stage, resumes=True))
    partial = step.place.with_name(f"{step.place.name}.partial")
    partial.mkdir(parents=True)
    (partial / "weights").write_text("trained for days", encoding="utf-8")
    (partial / launch.RESULT).write_text(json.dumps(RESULT), encoding="utf-8")
    (partial / "manifest.json").write_text("{", encoding="utf-8")
    stand_in(monkeypatch, "sys.exit('must not run')")
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert made.metrics == {"loss": 0.5}
    assert set(made.manifest["files"]) - {"uncommitted.diff"} == {"weights"}
    assert not (made.path / launch.RESULT).exists()


@pytest.mark.parametrize("resumes", [True, False])
def test_only_a_stage_that_resumes_finds_what_an_attempt_left(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    step, run = first_step(cfg)
    step = dataclasses.replace(step, stage=dataclasses.replace(step.stage, resumes=resumes))
    stand_in(monkeypatch, "(out / 'checkpoint').touch()\nsys.exit(3)")
    with pytest.raises(StageFailed):
        run_stage(cfg, step, {}, run, ["ftpipe"])
    stand_in(monkeypatch, DONE)
    made, _ = run_stage(cfg, step, {}, run, ["ftpipe"])
    assert (made.path / "checkpoint").is_file() == resumes


def test_a_second_build_at_the_same_time_is_refused(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, run = first_step(cfg)
    stand_in(monkeypatch, "sys.exit('must not run')")
    with (
        artifacts.building(Path(cfg.output), "model", step.fingerprint),
        pytest.raises(BusyError, match=f"is being built by process {os.getpid()} on "),
    ):
        run_stage(cfg, step, {}, run, ["ftpipe"])


def test_an_interruption_ends_the_process_before_it_goes_on(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "(out / 'pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    step, _ = first_step(cfg)
    pid = step.place.with_name(f"{step.place.name}.partial") / "pid"

    def interrupt(*_: object) -> None:
        if not (pid.is_file() and pid.read_text()):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(cfg)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not psutil.pid_exists(int(pid.read_text(encoding="utf-8")))


PARENT = """
import subprocess, sys
from ftpipe.launch import die_with_parent
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, preexec_fn=die_with_parent)
print(child.pid, flush=True)
child.wait()
"""


def gone(pid: int, seconds: float = 30) -> bool:
    """Wait until a process has ended, or is only waited for by nobody."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    assert gone(child)


def marked(mark: str) -> list[psutil.Process]:
    """Return every living process that carries a mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("FTPIPE_TEST_MARK") == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_killing_the_driver_leaves_no_process_and_no_harm(empty_folder: Path) -> None:
    """Kill the driver as soon as its worker is there; then run the same again."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "ftpipe.cli", "model", "recipe=tiny"]
    env = {**os.environ, "FTPIPE_TEST_MARK": mark}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as driver:
        until = time.monotonic() + 60
        while len(found := marked(mark)) < 2:
            assert time.monotonic() < until and driver.poll() is None
            time.sleep(0.01)
        driver.kill()
    assert all(gone(process.pid) for process in found)
    time.sleep(1)
    assert marked(mark) == []
    # nor did one live on to the stage's end
    assert not list(Path("outputs/artifacts").glob(f"*/{launch.RESULT}"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (manifest,) = Path("outputs/artifacts").glob("*/manifest.json")
    assert manifest.parent.suffix != ".partial"


def test_the_configuration_is_left_as_it_was(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(cfg)
    stand_in(monkeypatch, DONE)
    build(cfg)
    assert cfg == before
