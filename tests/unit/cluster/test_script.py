"""Batch scripts: what they ask for, what they refuse, and that nothing in a value runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ftpipe import cli, compose
from ftpipe.choices import Device
from ftpipe.cluster import script
from ftpipe.config import RunConfig
from ftpipe.errors import ConfigError
from ftpipe.pipeline import STAGES
from ftpipe.slurm_config import StageJobConfig
from tests.unit.test_config import put

RUN = Path("outputs/runs/mine-0123abcd")
SFT, PREPARE, MERGE = STAGES["sft"], STAGES["prepare"], STAGES["merge"]


def asked(text: str) -> dict[str, str]:
    """Read the options of a script as sbatch does: lines of #SBATCH before the first command."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


@pytest.fixture
def gpus(cfg: RunConfig) -> RunConfig:
    cfg.launch.device, cfg.launch.processes, cfg.launch.nodes = Device.cuda, 4, 2
    return cfg


def test_a_training_gets_its_nodes_and_a_gpu_for_each_rank(gpus: RunConfig) -> None:
    said = asked(script.of_stage(gpus, SFT, [RUN]))
    assert (said["nodes"], said["ntasks-per-node"], said["gres"]) == ("2", "4", "gpu:4")
    assert said["job-name"] == "mine-sft"
    assert said["signal"] == "B:USR1@120"
    assert {"requeue", "kill-on-invalid-dep", "open-mode"} <= set(said)
    # nothing that is left to the cluster is asked for
    assert not {"partition", "account", "time", "mem", "cpus-per-task", "array"} & set(said)


def test_a_stage_of_one_rank_gets_one_and_one_without_use_for_a_gpu_none(gpus: RunConfig) -> None:
    merge = asked(script.of_stage(gpus, MERGE, [RUN]))
    assert (merge["nodes"], merge["ntasks-per-node"], merge["gres"]) == ("1", "1", "gpu:1")
    for name in ("prepare", "model"):
        assert "gres" not in asked(script.of_stage(gpus, STAGES[name], [RUN]))
    assert "gres" in asked(script.of_stage(gpus, STAGES["evolve"], [RUN]))
    gpus.evolve.url = "http://localhost:8000/v1"
    assert "gres" not in asked(script.of_stage(gpus, STAGES["evolve"], [RUN]))
    gpus.launch.slurm.gpus = 8  # more than ranks; a single one has no use for them
    found = {name: asked(script.of_stage(gpus, STAGES[name], [RUN])) for name in ("sft", "merge")}
    assert {name: said["gres"] for name, said in found.items()} == {"sft": "gpu:8", "merge": "gpu:1"}
    assert "gres" not in asked(script.of_stage(gpus, PREPARE, [RUN]))
    gpus.launch.slurm.gpus, gpus.launch.device = None, Device.cpu
    assert "gres" not in asked(script.of_stage(gpus, SFT, [RUN]))


OPTIONS: list[tuple[str, Any, str, str]] = [
    ("partition", "a100", "partition", "a100"),
    ("account", "team", "account", "team"),
    ("qos", "long", "qos", "long"),
    ("reservation", "maintenance_1", "reservation", "maintenance_1"),
    ("constraint", "a100&(rack1|rack2)", "constraint", "a100&(rack1|rack2)"),
    ("exclude", "n[3,7]", "exclude", "n[3,7]"),
    ("time", "1-12:00:00", "time", "1-12:00:00"),
    ("gpus", 8, "gres", "gpu:8"),
    ("gpu_type", "h100", "gres", "gpu:h100:4"),
    ("cpus", 6, "cpus-per-task", "6"),
    ("memory", "0", "mem", "0"),
    ("warning_seconds", 300, "signal", "B:USR1@300"),
    ("requeue", False, "no-requeue", ""),
    ("extra", ["--mail-type=FAIL", "--comment=a b"], "comment", "a b"),
]


@pytest.mark.parametrize(("key", "value", "option", "said"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_a_key_is_the_option_of_its_name(
    gpus: RunConfig, key: str, value: Any, option: str, said: str
) -> None:
    put(gpus, f"launch.slurm.{key}", value)
    gpus.launch.slurm.check()
    assert asked(script.of_stage(gpus, SFT, [RUN]))[option] == said


@pytest.mark.parametrize(
    ("key", "value", "option", "said"),
    [
        ("nodes", 3, "nodes", "3"),
        ("gpus", 5, "gres", "gpu:5"),
        ("cpus", 2, "cpus-per-task", "2"),
        ("memory", "9G", "mem", "9G"),
        ("time", "00:10:00", "time", "00:10:00"),
        ("partition", "own", "partition", "own"),
        ("constraint", "own", "constraint", "own"),
    ],
)
def test_a_stage_may_ask_otherwise(
    gpus: RunConfig, key: str, value: Any, option: str, said: str
) -> None:
    slurm = gpus.launch.slurm
    slurm.gpus, slurm.cpus, slurm.memory, slurm.time = 4, 1, "1G", "01:00:00"
    slurm.partition = slurm.constraint = "all"
    before = asked(script.of_stage(gpus, SFT, [RUN]))
    slurm.stages = {"sft": StageJobConfig(**{key: value})}
    gpus.launch.slurm.check()
    after = asked(script.of_stage(gpus, SFT, [RUN]))
    assert after.pop(option) == said
    assert before.pop(option) != said
    assert after == before
    other = asked(script.of_stage(gpus, STAGES["dpo"], [RUN]))
    assert other[option] != said


def test_a_limit_without_a_warning_sends_no_signal(cfg: RunConfig) -> None:
    cfg.launch.slurm.warning_seconds = 0
    assert "signal" not in asked(script.of_stage(cfg, SFT, [RUN]))


def test_threads_are_the_processors_of_a_rank(cfg: RunConfig) -> None:
    cfg.launch.threads = 3
    assert asked(script.of_stage(cfg, SFT, [RUN]))["cpus-per-task"] == "3"
    cfg.launch.slurm.cpus = 5
    assert asked(script.of_stage(cfg, SFT, [RUN]))["cpus-per-task"] == "5"


def test_ranks_on_gpus_need_one_each(gpus: RunConfig) -> None:
    gpus.launch.slurm.gpus = 3
    with pytest.raises(ConfigError, match=r"^'sft' runs 4 ranks on each node, .* asks for 3; "):
        script.of_stage(gpus, SFT, [RUN])
    gpus.launch.slurm.stages = {"sft": StageJobConfig(gpus=4)}
    script.of_stage(gpus, SFT, [RUN])


WRONG = [
    "",
    "two words",
    "a\nb",
    "a\n",
    "$(touch x)",
    "`touch x`",
    'a"b',
    "a'b",
    "a;b",
    "a#b",
    "a\\b",
    "é",
]
WORDS = ("partition", "account", "qos", "reservation", "constraint", "exclude", "gpu_type", "sync")


@pytest.mark.parametrize("key", [*WORDS, "stages.sft.partition", "stages.sft.constraint"])
@pytest.mark.parametrize("value", WRONG)
def test_a_word_that_says_more_is_refused(cfg: RunConfig, key: str, value: str) -> None:
    cfg.launch.slurm.stages = {"sft": StageJobConfig()}
    put(cfg, f"launch.slurm.{key}", value)
    with pytest.raises(ConfigError) as refused:
        cfg.check()
    assert str(refused.value).startswith(f"launch.slurm.{key}={value!r} ")


@pytest.mark.parametrize(
    "time", ["3600", "1h", "1:00:00 --wrap=x", "1:00:00\n#SBATCH --wrap=x", "", "-1:00", "1-"]
)
@pytest.mark.parametrize("key", ["time", "stages.sft.time"])
def test_a_time_is_written_so_that_yaml_makes_no_number_of_it(
    cfg: RunConfig, key: str, time: str
) -> None:
    cfg.launch.slurm.stages = {"sft": StageJobConfig()}
    put(cfg, f"launch.slurm.{key}", time)
    with pytest.raises(ConfigError, match=rf"^launch\.slurm\.{key}=.*HH:MM:SS"):
        cfg.check()


@pytest.mark.parametrize("time", ["00:01:00", "30:00", "1-0", "2-12:30", "7-00:00:00"])
def test_the_times_of_slurm_are_taken(cfg: RunConfig, time: str) -> None:
    cfg.launch.slurm.time, cfg.launch.slurm.warning_seconds = time, 59
    cfg.check()


@pytest.mark.parametrize(
    ("time", "limit"),
    [("00:02:00", 120), ("1:30", 90), ("0-1", 3600), ("1-00:00:10", 86_410), ("0-0:30", 1800)],
)
def test_the_warning_comes_after_the_job_begins(cfg: RunConfig, time: str, limit: int) -> None:
    cfg.launch.slurm.stages = {"sft": StageJobConfig(time=time)}
    cfg.launch.slurm.warning_seconds = limit - 1
    cfg.check()
    cfg.launch.slurm.warning_seconds = limit
    with pytest.raises(ConfigError, match=rf"^launch\.slurm\.warning_seconds={limit}.* {limit} s"):
        cfg.check()


@pytest.mark.parametrize("memory", ["", "64 G", "64GB", "G", "-1", "1.5G", "6\n4"])
def test_a_memory_is_a_number_with_a_unit(cfg: RunConfig, memory: str) -> None:
    cfg.launch.slurm.memory = memory
    with pytest.raises(ConfigError, match=r"^launch\.slurm\.memory="):
        cfg.check()


@pytest.mark.parametrize("line", ["", "mail-type=FAIL", "--a\n#SBATCH --b", "-", "--", "#SBATCH --a"])
def test_an_extra_line_is_one_option(cfg: RunConfig, line: str) -> None:
    cfg.launch.slurm.extra = ["--mail-type=FAIL", "-J x"]
    cfg.check()
    cfg.launch.slurm.extra = [line]
    with pytest.raises(ConfigError, match=r"^launch\.slurm\.extra="):
        cfg.check()


def test_a_stage_that_is_none_has_no_job(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    words = ["plan", "recipe=tiny", "launch.slurm.stages.stf.nodes=2"]
    assert cli.main(words) == 2
    assert "launch.slurm.stages: no stage 'stf'. Did you mean 'sft'?" in capsys.readouterr().err


def test_what_is_in_a_path_does_not_run(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a b'c$(touch ran)`touch ran`;touch ran"
    odd.mkdir()
    monkeypatch.chdir(odd)
    cfg.launch.slurm.venv = str(odd / "venv")
    (odd / "venv/bin").mkdir(parents=True)
    (odd / "venv/bin/python").write_text('#!/bin/bash\necho "$PWD|$*"\n', encoding="utf-8")
    (odd / "venv/bin/python").chmod(0o755)
    run = Path("outputs/r u$(touch ran)n")
    (run / "logs").mkdir(parents=True)
    text = script.of_stage(cfg, SFT, [run])
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash"], input=text, text=True, env=env, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    said = (run / "logs/sft-7.0.log").read_text(encoding="utf-8").splitlines()
    assert said[-1] == f"{odd}|-m ftpipe.cli job {run} sft"
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("letter", ["%", '"', "\\"])
def test_a_folder_that_slurm_would_misread_is_refused(
    cfg: RunConfig, letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / f"a{letter}x"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match="Slurm cannot write its logs there"):
        script.of_stage(cfg, SFT, [RUN])


def test_an_array_has_a_run_for_each_task(cfg: RunConfig, tmp_path: Path) -> None:
    runs = [Path(f"outputs/runs/mine-{at}") for at in range(3)]
    text = script.of_stage(cfg, SFT, runs)
    assert asked(text)["array"] == "0-2"
    assert asked(text)["output"].endswith('/outputs/runs/mine-0/logs/sft-%A_%a.slurm"')
    cfg.launch.slurm.venv = str(tmp_path / "venv")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text('#!/bin/bash\necho "$*"\n', encoding="utf-8")
    (tmp_path / "venv/bin/python").chmod(0o755)
    (runs[2] / "logs").mkdir(parents=True)
    env = {
        **{"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"},
        **{"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"},
    }
    text = script.of_stage(cfg, SFT, runs)
    subprocess.run(["bash"], input=text, text=True, env=env, capture_output=True, check=True)
    said = (runs[2] / "logs/sft-7_2.1.log").read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("job 7_2, attempt 2, on n1, ")
    assert said[-1] == f"-m ftpipe.cli job {runs[2]} sft"


def test_setup_is_done_before_the_stage_and_its_failure_ends_the_job(
    cfg: RunConfig, tmp_path: Path
) -> None:
    # as modules do, it reads a variable that is not set
    cfg.launch.slurm.setup = ["module() { export MODULE=$UNSET$1; }", "module cuda"]
    cfg.launch.slurm.venv = str(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text('#!/bin/bash\necho "python $MODULE"\n', encoding="utf-8")
    (tmp_path / "bin/python").chmod(0o755)
    (RUN / "logs").mkdir(parents=True)
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    log = RUN / "logs/sft-7.0.log"

    def ends() -> int:
        text = script.of_stage(cfg, SFT, [RUN])
        log.unlink(missing_ok=True)
        return subprocess.run(["bash"], input=text, text=True, env=env, check=False).returncode

    assert ends() == 0
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "python cuda"
    cfg.launch.slurm.setup.append("false")
    assert ends() == 1
    assert "python" not in log.read_text(encoding="utf-8")


# What stands in for the stage: it waits for the file that asks, saves for a while, and ends with a code.
DRIVER = """\
#!/bin/bash
for _ in $(seq 100); do
  [ -e "$FTPIPE_STOP" ] && sleep 0.4 && exit {code}
  sleep 0.05
done
exit 9
"""
SCONTROL = """\
#!/bin/bash
echo "$*" >>{calls}
[ "$1" = requeue ] || echo 'JobId=7 JobName=x JobState={state} Reason=None'
"""


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
@pytest.mark.parametrize(
    ("code", "state", "requeue", "ends", "requeued"),
    [
        (75, "RUNNING", True, 0, True),
        (75, "RUNNING", False, 75, False),  # the configuration says so
        (75, "CANCELLED", True, 75, False),  # who cancelled it does not want it back
        (75, "COMPLETING", True, 75, False),
        (0, "RUNNING", True, 0, False),  # it was done before it looked
        (1, "RUNNING", True, 1, False),
        (137, "RUNNING", True, 137, False),  # out of memory, say; no signal to bash
    ],
)
def test_a_job_that_is_told_to_stop_is_queued_again_if_its_stage_can_go_on(
    cfg: RunConfig,
    tmp_path: Path,
    signal: str,
    code: int,
    state: str,
    requeue: bool,
    ends: int,
    requeued: bool,
) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name, text in (
        ("venv/bin/python", DRIVER.format(code=code)),
        ("scontrol", SCONTROL.format(calls=tmp_path / "calls", state=state)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    cfg.launch.slurm.venv, cfg.launch.slurm.requeue = str(tmp_path / "venv"), requeue
    (RUN / "logs").mkdir(parents=True)
    (tmp_path / "calls").touch()
    file = tmp_path / "job.sh"
    file.write_text(script.of_stage(cfg, SFT, [RUN]), encoding="utf-8")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    with subprocess.Popen(["bash", str(file)], env=env) as job:
        log = RUN / "logs/sft-7.0.log"
        while not (log.is_file() and log.stat().st_size):
            assert job.poll() is None
        for number in (signal, signal, "USR1"):  # one more while it saves ends nothing
            time.sleep(0.12)
            subprocess.run(["kill", f"-{number}", str(job.pid)], check=True)
    assert job.returncode == ends
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert ("requeue 7" in calls) is requeued
    assert not list((RUN / "logs").glob("*.stop"))


def test_a_task_of_an_array_speaks_for_itself_and_output_may_be_anywhere(
    cfg: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name, text in (
        ("venv/bin/python", DRIVER.format(code=75)),
        ("scontrol", SCONTROL.format(calls=tmp_path / "calls", state="RUNNING")),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    cfg.launch.slurm.venv = str(tmp_path / "venv")
    run = tmp_path / "scratch/runs/tiny"
    (run / "logs").mkdir(parents=True)
    file = tmp_path / "job.sh"
    file.write_text(script.of_stage(cfg, SFT, [Path("other"), run]), encoding="utf-8")
    # the task whose own number is that of the array
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n1", **array}
    with subprocess.Popen(["bash", str(file)], env=env) as job:
        log = run / "logs/sft-7_1.0.log"
        while not (log.is_file() and log.stat().st_size):
            assert job.poll() is None
        for _ in range(3):
            time.sleep(0.12)
            subprocess.run(["kill", "-TERM", str(job.pid)], check=True)
    assert job.returncode == 0
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == ["--oneliner show job 7_1", "requeue 7_1"]


def test_bash_reads_every_script_before_slurm_does(cfg: RunConfig) -> None:
    script.lint(script.of_stage(cfg, SFT, [RUN]), "sft")
    cfg.launch.slurm.setup = ["if true; then"]
    with pytest.raises(ConfigError, match=r"^launch\.slurm\.setup: bash cannot read the job of 'sft': "):
        script.lint(script.of_stage(cfg, SFT, [RUN]), "sft")


def shellcheck(text: str) -> str:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    words = ["shellcheck", "--shell=bash", "-"]
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("name", sorted(path.name for path in compose.shipped("slurm").glob("*.sbatch")))
def test_shellcheck_has_nothing_to_say_about_a_template(name: str) -> None:
    assert shellcheck((compose.shipped("slurm") / name).read_text(encoding="utf-8")) == ""


PROFILES = sorted(path.stem for path in compose.shipped("conf").glob("launch/slurm-*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_shellcheck_has_nothing_to_say_about_what_a_profile_renders(
    profile: str, empty_folder: Path
) -> None:
    words = ["recipe=alpaca-7b", f"launch={profile}", "smoke=true", "launch.slurm.sync=login"]
    (cfg,) = cli.configurations(words, elsewhere=True)
    for name in ("prepare", "sft"):
        assert shellcheck(script.of_stage(cfg, STAGES[name], [RUN])) == ""
        assert shellcheck(script.of_stage(cfg, STAGES[name], [RUN, Path("other run")])) == ""
    assert shellcheck(script.of_sync(cfg, RUN)) == ""


def test_the_profiles_say_what_their_names_say(empty_folder: Path) -> None:
    found = {}
    for profile in PROFILES:
        words = ["recipe=alpaca-7b", "smoke=true", f"launch={profile}"]
        (cfg,) = cli.configurations(words, elsewhere=True)
        said = asked(script.of_stage(cfg, SFT, [RUN]))
        found[profile] = (said["nodes"], said["ntasks-per-node"], said.get("gres"))
    assert found == {
        "slurm-cpu": ("1", "1", None),
        "slurm-1gpu": ("1", "1", "gpu:1"),
        "slurm-8gpu": ("1", "8", "gpu:8"),
        "slurm-2x8gpu": ("2", "8", "gpu:8"),
    }


def test_offline_runs_are_sent_from_where_there_is_a_network(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.launch.slurm.sync, cfg.launch.slurm.account = "login", "team"
    cfg.launch.slurm.venv = str(tmp_path / "venv")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "venv/bin/python").chmod(0o755)
    cfg.output = "out put"
    text = script.of_sync(cfg, RUN)
    assert (asked(text)["partition"], asked(text)["account"]) == ("login", "team")

    def said() -> list[str]:
        done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=True)
        return done.stdout.splitlines()

    assert said() == ["there are no offline runs to send"]
    for at in (1, 2):
        Path(f"out put/wandb/offline-run-{at}").mkdir(parents=True)
    runs = [f"out put/wandb/offline-run-{at}" for at in (1, 2)]
    assert said() == ["-m", "wandb", "sync", *runs]


def test_every_place_of_a_template_is_filled(cfg: RunConfig) -> None:
    for text in (script.of_stage(cfg, SFT, [RUN]), script.of_sync(cfg, RUN)):
        assert not re.search("@@", text)
        assert text.startswith("#!/usr/bin/env bash\n")
