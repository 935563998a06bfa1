"""No secret on disk, no code from data, no weights that can run code."""

from __future__ import annotations

import ast
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ftpipe
from ftpipe import cli

ROOT = Path(ftpipe.__file__).parent
SECRETS = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTEDplanted012345",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/0123456789",
    "PASSWORD": "planted-password-0123456789",
}
FLAG = "planted-flag-0123456789"


@pytest.mark.slow
@pytest.mark.usefixtures("in_process", "empty_folder", "own_wandb")
def test_a_run_leaves_no_secret_on_disk(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    # wandb would record the program's words
    monkeypatch.setattr(sys, "argv", ["ftpipe", "sft", f"--token={FLAG}"])
    words = ["sft", "recipe=tiny", "sft.max_steps=2", "tracking=offline", "sft.sample_tokens=2"]
    assert cli.main(words) == 0
    wandb.teardown()  # its service writes until then
    files = [path for path in Path.cwd().rglob("*") if path.is_file()]
    names = {path.name for path in files}
    # else nothing was looked at
    assert {"manifest.json", "run.yaml", "metrics.jsonl", "model.safetensors", "debug.log"} <= names
    assert any(path.suffix == ".wandb" for path in files)
    printed = "".join(capfd.readouterr())
    for secret in (*SECRETS.values(), FLAG):
        assert secret not in printed
        for path in files:
            assert secret.encode() not in path.read_bytes(), f"{path} holds a secret"
    pickles = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    assert not [path for path in files if path.suffix in pickles]


NAME, HOST = "ada-lovelace-planted", "planted-host-of-ada"


@pytest.fixture
def home_of_ada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of a user who has a name, a host, rows of her own, tokens and a tokenizer."""
    home = tmp_path / "home" / NAME
    (home / "project").mkdir(parents=True)
    monkeypatch.chdir(home / "project")
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, str(home) if name == "HOME" else NAME)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    system, *known = os.uname()
    named = os.uname_result((system, HOST, *known[1:]))
    monkeypatch.setattr(os, "uname", lambda: named)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(60)]
    question = "Which of the nine planets is said to be the largest of them all today?"
    # and for each way in which a row is left out one that is
    bad: list[dict[str, object]] = [
        {"instruction": question, "output": "x"},
        {"instruction": 3},
        dict(rows[0]),
        {"instruction": "Go on.", "output": "on and " * 400},
    ]
    (home / "rows.json").write_text(json.dumps([*rows, *bad]), encoding="utf-8")
    (home / "asked.txt").write_text(f"{question}\n", encoding="utf-8")
    return home


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("output", ["outputs", "'~/kept'", "HOME/kept"])
def test_nothing_that_a_run_leaves_names_its_user_or_machine(
    output: str, home_of_ada: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a run leaves is to be given away: artifacts, the run's folder, a lock."""
    words = [
        "recipe=tiny",
        # a shell expands ~ before ftpipe sees it
        f"output={output.replace('HOME', str(home_of_ada))}",
        "data=own",
        "data.sources.mine={format: alpaca, path: '~/rows.json'}",
        f"data.decontaminate.asked={{format: text, path: {home_of_ada}/asked.txt}}",
        "data.validation=2",
        "data.on_bad_row=skip",
        "data.over_length=drop",
        "data.max_lost=1",
        f"tracking.tags=['password={FLAG} and more']",
    ]
    assert cli.main(["prepare", *words[:-1]]) == 0
    refused = [*words, f"--password={FLAG}"]
    assert cli.main(["prepare", *refused]) == 2
    root = home_of_ada / "project" / "outputs" if output == "outputs" else home_of_ada / "kept"
    files = [path for path in root.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    # else nothing was looked at
    assert {"manifest.json", "run.yaml", "origins.json", "prepare.job.json", "train.arrow"} <= names
    assert {path.suffix for path in files} >= {".lock", ".json", ".yaml", ".arrow", ".safetensors"}
    (removed,) = root.rglob("removed.jsonl")
    assert len(removed.read_text(encoding="utf-8").splitlines()) == 4
    assert "~/rows.json" in removed.read_text(encoding="utf-8")
    unsaid = {
        "the user": NAME,
        "the home": str(home_of_ada),
        "the working directory": str(Path.cwd()),
        "the folder of temporary files": str(home_of_ada.parents[1]),
        "the host": HOST,
        "the interpreter": sys.prefix,
        "the source": str(ROOT.parents[1]),
        "a password": FLAG,
        **SECRETS,
    }
    for path in files:
        for what, text in unsaid.items():
            assert text.encode() not in path.read_bytes(), f"{path} holds {what}"
    # and what is recorded is read back: the same command has nothing to do
    capfd.readouterr()
    assert cli.main(["prepare", *words[:-1]]) == 0
    assert "everything was made already" in capfd.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_a_secret_among_the_words_is_not_in_the_command(home_of_ada: Path) -> None:
    words = ["model", "recipe=tiny", f"tracking.tags=['key={FLAG} more']"]
    assert cli.main(words) == 0
    (manifest,) = Path("outputs/artifacts").glob("model-*/manifest.json")
    command = json.loads(manifest.read_text(encoding="utf-8"))["provenance"]["command"]
    assert command.startswith("ftpipe model recipe=tiny ")
    assert FLAG not in command and "more" not in command


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking.tags", f"['password={FLAG} more']"),
        ("tracking.tags", f"[a, {SECRETS['HF_TOKEN']}]"),
        ("name", "sk-proj-0123456789abcdefghijABCDEFGHIJ0123"),
        ("output", "/tmp/ghp_0123456789abcdefghijABCDEFGHIJ012345"),
        ("launch.slurm.setup", f"['export WANDB_API_KEY={SECRETS['WANDB_API_KEY']}']"),
    ],
)
def test_a_secret_among_the_values_is_refused_and_not_repeated(
    key: str, value: str, home_of_ada: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["model", "recipe=tiny", f"{key}={value}"]) == 2
    said = "".join(capfd.readouterr())
    assert f"{key} holds what looks like a secret" in said
    assert not any(part in said for part in value.strip("[]'").split() if len(part) > 9)
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("in_process")
def test_what_only_sounds_like_a_secret_is_taken(home_of_ada: Path) -> None:
    for tag in ("tokens=8", "sk-learn-with-many-words", "token=$HF_TOKEN", "key=3", "a-task-of-secrets"):
        assert cli.main(["plan", "recipe=tiny", f"tracking.tags=['{tag}']"]) == 0


# --- the source ---


def calls() -> Iterator[tuple[str, ast.FunctionDef | None, ast.Call]]:
    """Yield every call in the source, with its file and the function it is in."""
    for file in sorted(ROOT.rglob("*.py")):
        yield from _calls(file.name, None, ast.parse(file.read_text(encoding="utf-8")))


def _calls(
    file: str, function: ast.FunctionDef | None, node: ast.AST
) -> Iterator[tuple[str, ast.FunctionDef | None, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield file, function, child
        yield from _calls(file, child if isinstance(child, ast.FunctionDef) else function, child)


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


@pytest.mark.parametrize(
    "banned",
    [
        *(
            "torch.load",
            "eval",
            "exec",
            "compile",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
        ),
        *(
            "yaml.unsafe_load",
            "yaml.full_load",
            "marshal.loads",
            "joblib.load",
            "hydra.utils.instantiate",
        ),
        *("instantiate", "_call_", "numpy.load", "np.load", "tempfile.mktemp"),
    ],
)
def test_nothing_calls_what_runs_code_from_data(banned: str) -> None:
    assert [file for file, _, call in calls() if name_of(call) == banned] == []


def test_yaml_is_read_by_loaders_that_make_no_objects() -> None:
    found = [call for _, _, call in calls() if name_of(call) == "yaml.load"]
    from yaml import SafeLoader

    from ftpipe import compose

    assert [ast.unparse(call.args[1]) for call in found] == ["Loader"]
    assert issubclass(compose.Loader, SafeLoader)
    assert compose.Loader.yaml_constructors is SafeLoader.yaml_constructors


def test_no_pickle_is_imported() -> None:
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not imported & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, file


def test_no_shell_is_started() -> None:
    for file, _, call in calls():
        for keyword in call.keywords:
            assert keyword.arg != "shell", f"{file}, line {call.lineno}"


def defaults(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Yield each parameter of a function that has a default, with the default."""
    positional = [*function.args.posonlyargs, *function.args.args]
    given = function.args.defaults
    for argument, value in zip(positional[len(positional) - len(given) :], given, strict=True):
        yield argument.arg, ast.unparse(value)
    for argument, maybe in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        yield argument.arg, ast.unparse(maybe) if maybe is not None else ""


def test_code_of_a_model_runs_only_where_the_recipe_says_so() -> None:
    """``trust_remote_code`` is passed on from the configuration and never switched on."""
    seen = 0
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            pairs: list[tuple[object, ast.expr]] = []
            if isinstance(node, ast.keyword):
                pairs = [(node.arg, node.value)]
            elif isinstance(node, ast.Dict):
                pairs = [
                    (key.value if isinstance(key, ast.Constant) else None, value)
                    for key, value in zip(node.keys, node.values, strict=True)
                ]
            for name, value in pairs:
                if name == "trust_remote_code":
                    seen += 1
                    passed_on = ast.unparse(value)
                    from_config = passed_on.endswith("model.trust_remote_code")
                    assert from_config or passed_on == "trust_remote_code", file
            if isinstance(node, ast.FunctionDef):  # what a caller leaves out is off
                assert dict(defaults(node)).get("trust_remote_code", "False") == "False", file
    assert seen >= 3
    assert ftpipe.config.ModelConfig().trust_remote_code is False


def test_weights_are_loaded_from_safetensors_alone() -> None:
    """Each loading of a model asks for safetensors, or names a GGUF file, which is no pickle either."""
    loading = [
        (file, function)
        for file, function, call in calls()
        if name_of(call).endswith(".from_pretrained")
        and "ModelFor" in name_of(call)
        # as an example in a message
        and call.args
    ]
    assert loading
    for file, function in loading:
        assert function is not None
        text = ast.unparse(function)
        assert "'use_safetensors': True" in text or "'gguf_file': " in text, f"{file}: {function.name}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_loaded_even_past_the_plan(name: str, tmp_path: Path) -> None:
    import torch

    from ftpipe.choices import Device, Init, Precision
    from ftpipe.config import LaunchConfig, ModelConfig, RunConfig
    from ftpipe.errors import ModelError
    from ftpipe.modeling import load_base, random_model
    from ftpipe.tokenizer import byte_level

    tiny = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    cfg = RunConfig(
        model=ModelConfig(init=Init.random, architecture=tiny),
        launch=LaunchConfig(device=Device.cpu, precision=Precision.fp32),
    )
    model = random_model(cfg.model, byte_level(), seed=0)
    model.save_pretrained(str(tmp_path))
    assert load_base(cfg, tmp_path).num_parameters() == model.num_parameters()
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(cfg, tmp_path)
