"""The command line: verbs, exit codes, and what it must not load or write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ftpipe
from ftpipe import cli, compose, schema
from ftpipe.choices import Device, Init, Precision
from ftpipe.errors import ConfigError
from ftpipe.pipeline import STAGES

pytestmark = pytest.mark.usefixtures("empty_folder")

HEAVY = ("torch", "transformers", "datasets", "trl", "wandb", "peft", "accelerate", "pyarrow", "numpy")


def out_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the sentence of a command that must be refused and must print nothing else."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ftpipe: ")
    assert list(Path.cwd().iterdir()) == []
    return said.err.removeprefix("ftpipe: ").rstrip("\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "--version") == f"{ftpipe.__version__}\n"
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert f'version = "{ftpipe.__version__}"' in pyproject.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["run", "--help"], ["plan", "x", "-h"]])
def test_help_explains_every_verb_and_every_recipe(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = out_of(capsys, *words)
    assert said.startswith(f"ftpipe {ftpipe.__version__}: ")
    for stage in STAGES.values():
        assert f"  {stage.name:9} up to this stage: {stage.does}\n" in said
    for verb in (
        "run",
        "plan",
        "submit",
        "status",
        "verify",
        "lock",
        "diff",
        "runs",
        "chat",
        "serve",
        "recipes",
        "doctor",
    ):
        assert f"\n  {verb} " in said
    for file in compose.shipped("recipes").glob("*.yaml"):
        assert f"\n  {file.stem} " in said


def test_nothing_said_is_help_and_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: ftpipe VERB" in capsys.readouterr().out


def test_the_words_are_those_of_the_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ftpipe", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out == f"{ftpipe.__version__}\n"


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, "recipes").splitlines()
    files = sorted(compose.shipped("recipes").glob("*.yaml"))
    assert [line.split()[0] for line in lines] == [file.stem for file in files]
    for line, file in zip(lines, files, strict=True):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert line.endswith(f"  {first.removeprefix('# ')}")


def test_a_recipe_that_cannot_be_read_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/broken.yaml").write_bytes(b"# caf\xe9\n")
    Path("recipes/folder.yaml").mkdir()
    names = [line.split()[0] for line in out_of(capsys, "recipes").splitlines()]
    assert {"broken", "tiny"} <= set(names)
    assert "folder" not in names


@pytest.mark.parametrize("verb", ["run", "plan", *STAGES])
def test_no_recipe_lists_all_recipes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, verb).splitlines()
    assert lines[0] == "choose a recipe with recipe=NAME:"
    assert [line.split()[0] for line in lines[1:]] == [
        file.stem for file in sorted(compose.shipped("recipes").glob("*.yaml"))
    ]
    assert all(len(line.split()) > 3 for line in lines[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rn"], "no verb 'rn'. Did you mean 'run'? Known: run, "),
        (["stf", "recipe=tiny"], "no verb 'stf'. Did you mean 'sft'? "),
        (["recipe=tiny", "plan"], "no verb 'recipe=tiny'."),
        (["recipe=tiny"], "no verb 'recipe=tiny'."),
        (["plan", "tiny"], "choose a recipe with recipe=NAME:"),
        (["plan", "recipe=tiny", "tiny"], "cannot read the override: "),
        (["plan", "recipe=tiny", "--fast"], "no option '--fast'. "),
        (["plan", "recipe=tiny", "--multirn"], "no option '--multirn'. Did you mean '--multirun'? "),
        (["plan", "recipe=tiny", "-x"], "no option '-x'. "),
        (["recipes", "tiny"], "recipes takes no words, but got 'tiny'."),
        (["doctor", "--fast"], "doctor takes no words, but got '--fast'."),
        (["plan", "recipe=tinny"], "no recipe 'tinny'. Did you mean 'tiny'? "),
        (["plan", "recipe=tiny", "lr=1"], "unknown key 'lr'. Did you mean 'sft.learning_rate'?"),
        (["plan", "recipe=tiny", "seed=0,1"], "seed=0,1 asks for several runs; add -m "),
        (
            ["plan", "recipe=tiny", "stages=[prepare,stf]"],
            "stages: no stage 'stf'. Did you mean 'sft'? ",
        ),
        (["plan", "recipe=tiny", "sft.epochs=0"], "sft.epochs=0.0 is out of range; allowed: above 0."),
        (["model", "recipe=alpaca-7b"], "the recipe 'alpaca-7b' has no stage 'model'; its stages are "),
        (["plan", "recipe=tiny", "stages=[sft]"], "stages: 'sft' needs a dataset, "),
        (["run", "recipe=tiny,tinny", "-m"], "no recipe 'tinny'. Did you mean 'tiny'? "),
    ],
)
def test_a_wrong_word_is_one_sentence_and_exit_code_two(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *words).startswith(said)


def test_a_secret_given_as_a_flag_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refusal(capsys, "run", "recipe=tiny", "--token=abc").startswith("no option '--token=abc'.")


def test_plan_shows_each_stage_its_place_and_the_resolved_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = out_of(capsys, "plan", "recipe=tiny", "seed=3")
    head, needs, text = said.split("\n\n", 2)
    assert "at the peak" in needs
    lines = head.splitlines()
    assert lines[0] == "tiny: 3 stages"
    for line, name in zip(lines[1:], ("model", "prepare", "sft"), strict=True):
        state, stage, place = line.split()
        assert (state, stage) == ("run", name)
        assert Path(place).parent == Path("outputs/artifacts")
        assert Path(place).name.startswith(f"{name}-")
    (cfg,) = cli.configurations(["recipe=tiny", "seed=3"])
    assert yaml.safe_load(text) == schema.plain(cfg)
    assert cfg.seed == 3
    assert list(Path.cwd().iterdir()) == []


def test_plan_of_a_sweep_shows_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    said = out_of(capsys, "plan", "recipe=tiny", "seed=3,4", "-m")
    assert said.count("tiny: 3 stages") == 2
    assert [line.split()[1] for line in said.splitlines() if line.startswith("  seed: ")] == ["3", "4"]
    assert "--multirun" not in said
    assert said == out_of(capsys, "plan", "--multirun", "recipe=tiny", "seed=3,4")


def test_a_finished_artifact_is_reused(capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, "plan", "recipe=tiny").splitlines()
    place = Path(lines[1].split()[-1])
    place.mkdir(parents=True)
    manifest = {"kind": "base_model", "stage": "model", "fingerprint": place.name.split("-")[1]}
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    states = [line.split()[0] for line in out_of(capsys, "plan", "recipe=tiny").splitlines()[1:4]]
    assert states == ["reuse", "run", "run"]


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (cfg,) = cli.configurations(
        [
            "recipe=tiny",
            "output='~/out'",
            "model.path='~/base'",
            "model.tokenizer='~/base'",
            "data.sources.mine={format: alpaca, path: '~/rows.json'}",
        ]
    )
    paths = (cfg.output, cfg.model.path, cfg.model.tokenizer, cfg.data.sources["mine"].path)
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("out", "base", "base", "rows.json"))
    with pytest.raises(ConfigError, match=r"^~nobody-of-this-name/x: there is no such home folder\.$"):
        cli.configurations(["recipe=tiny", "output='~nobody-of-this-name/x'"])


def test_values_left_to_the_machine_are_stated(capsys: pytest.CaptureFixture[str]) -> None:
    (cfg,) = cli.configurations(["recipe=tiny", "launch=auto"])
    assert cfg.launch.device is not Device.auto
    assert cfg.launch.precision is not Precision.auto


def test_smoke_stands_in_for_a_model_of_seven_billion() -> None:
    (cfg,) = cli.configurations(["recipe=qlora-llama7b", "smoke=true"])
    assert cfg.model.init is Init.random
    assert cfg.model.architecture["hidden_size"] == 32
    assert all(source.path.startswith("sample:") for source in cfg.data.sources.values())


def test_all_plans_are_made_before_any_run(capsys: pytest.CaptureFixture[str]) -> None:
    # the second run of the sweep cannot work, so the first must not start
    sentence = refusal(
        capsys, "run", "recipe=tiny", "data.sources.alpaca.path=sample:alpaca.json,no.json", "-m"
    )
    assert sentence.startswith("no file no.json; ")


def test_a_stage_that_ends_badly_is_one_line_and_exit_code_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a real process, which ends without a word in place of the worker
    monkeypatch.setattr("ftpipe.launch.launch_command", lambda *_: [sys.executable, "-c", "exit(7)"])
    assert cli.main(["model", "recipe=tiny"]) == 1
    assert capsys.readouterr().err == (
        "ftpipe: stage 'model' ended with code 7; its output above says why.\n"
    )
    left = {path.suffix for path in Path("outputs/artifacts").iterdir() if path.is_dir()}
    assert left == {".partial"}  # kept for a resume; no artifact


def test_an_interruption_is_one_line_and_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("ftpipe.launch.launch_command", interrupted)
    assert cli.main(["model", "recipe=tiny"]) == 130
    assert capsys.readouterr().err == (
        "ftpipe: interrupted; the same command goes on, from the last checkpoint if there is one\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(unbuffered: str) -> None:
    # as `ftpipe --help | head -0`
    command = [sys.executable, "-m", "ftpipe.cli", "--help"]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["plan", "recipe=tiny"],
        ["plan", "recipe=qlora-llama7b"],
        ["submit", "recipe=tiny", "launch=slurm-cpu", "--dry-run"],
        ["status"],
        ["diff", "recipe=tiny", "recipe=tiny-dpo"],
        ["runs"],
        ["runs", "lineage", "x"],
        ["recipes"],
        ["run", "recipe=tiny", "lr=1"],
    ],
    ids=" ".join,
)
def test_what_answers_at_once_loads_no_library_and_writes_nothing(words: list[str]) -> None:
    code = (
        "import sys; from ftpipe import cli; cli.main(sys.argv[1:]); "
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "loaded []"
    assert os.listdir() == []


def test_help_needs_no_hydra() -> None:
    code = "import sys; from ftpipe import cli; print('hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_flags_mean_several_runs_only_where_they_say_so() -> None:
    with pytest.raises(ConfigError, match="add -m"):
        cli.configurations(["recipe=tiny", "seed=1,2"])
    assert [cfg.seed for cfg in cli.configurations(["-m", "recipe=tiny", "seed=1,2"])] == [1, 2]


def test_a_plan_of_jobs_needs_nothing_of_this_machine(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "recipe=tiny", "launch=slurm-8gpu", "sft.batch_size=64"]) == 0
    assert "sft" in capsys.readouterr().out
