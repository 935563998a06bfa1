"""Where a result came from: what is recorded must be true, whole, and hold no secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import ftpipe
from ftpipe import home, provenance
from ftpipe.provenance import redact


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("--token=abc", "--token=<removed>"),
        ("HF_TOKEN=abc run", "HF_TOKEN=<removed> run"),
        ("WANDB_API_KEY=0123 ftpipe", "WANDB_API_KEY=<removed> ftpipe"),
        ("--api-key=x y", "--api-key=<removed> y"),
        ("my_password=x", "my_password=<removed>"),
        ("secret.name=x", "secret.name=<removed>"),
        ("name=hf_abcdefgh", "name=<removed>"),
        ("HF_abcdefgh", "<removed>"),
    ],
)
def test_what_looks_like_a_secret_is_removed(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "ftpipe sft recipe=tiny",
        "model.tokenizer=bytes",
        "model.tokenizer_revision=4782ad278652c7c71b72204d462d6d01eaaf7549",
        "sft.sample_tokens=8",
        "data.template=tokenizer",
    ],
)
def test_the_words_of_a_recipe_are_kept(text: str) -> None:
    assert redact(text) == text


def test_the_command_is_recorded_as_a_shell_takes_it() -> None:
    words = ["ftpipe", "sft", "name=two words", "--token=abc"]
    assert provenance.collect(words)["command"] == "ftpipe sft 'name=two words' --token=<removed>"


def test_packages_are_those_installed() -> None:
    found = provenance.packages()
    for name in ("torch", "transformers", "trl", "peft", "hydra-core"):
        assert found[name] == importlib.metadata.version(name)
    assert set(found) <= set(provenance.PACKAGES)
    everything = provenance.installed()
    assert everything == everything | found
    for name in ("huggingface-hub", "pyyaml", "regex", "jinja2"):  # of requirements.lock alone
        assert everything[name] == importlib.metadata.version(name)
    assert list(everything) == sorted(everything)


def test_hardware_is_that_of_the_machine() -> None:
    found = provenance.hardware()
    assert found["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert found["cores"] == len(psutil.Process().cpu_affinity() or [])
    assert found["platform"] == f"{platform.system()} {platform.machine()}"
    assert found["cpu"]


def test_nothing_recorded_names_the_user_or_the_host() -> None:
    recorded = str(provenance.collect(["ftpipe", "run"]))
    assert platform.node() not in recorded
    assert str(Path.home()) not in recorded


def test_no_gpu_where_none_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver'\nexit 9\n", encoding="utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert provenance.gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert provenance.gpus() == []


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["A, 1, 80 MiB", "B, 1, 80 MiB"]),
        ("", []),
        ("-1", []),
        ("1", ["B, 1, 80 MiB"]),
        ("1,0", ["B, 1, 80 MiB", "A, 1, 80 MiB"]),
        ("0, 5", ["A, 1, 80 MiB"]),
        ("GPU-8932f937", ["GPU-8932f937"]),
    ],
)
def test_only_visible_gpus_count(
    visible: str | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # docs.nvidia.com/cuda: CUDA_VISIBLE_DEVICES; nvidia-smi itself ignores it
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'A, 1, 80 MiB'\necho 'B, 1, 80 MiB'\n", encoding="utf-8")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert provenance.gpus() == found


# --- the checkout ---


def git(folder: Path, *words: str) -> str:
    who = {f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.strip()


CODE = "rows = [3, 1, 2]\nlongest = max(rows, key=lambda row: row)\ntoken = rows[0]\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout of one commit, which ftpipe takes for its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "code.py")
    git(folder, "commit", "-q", "-m", "one")
    monkeypatch.setattr(provenance, "SOURCE", folder)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert provenance.git() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    assert provenance.uncommitted() == ""


def test_without_a_checkout_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)
    assert provenance.git() is None
    assert provenance.uncommitted() == ""
    assert provenance.collect(["x"])["lock"] is None
    assert set(provenance.installed()) == set(provenance.packages())


def test_the_diff_gives_the_code_that_ran(checkout: Path, tmp_path: Path) -> None:
    changed = CODE.replace("row: row", "row: -row").replace("rows[0]", "sorted(rows, key=max)")
    changed += "from huggingface_hub import hf_hub_download\nkey=operator.itemgetter(10)\n"
    (checkout / "code.py").write_text(changed, encoding="utf-8")
    (checkout / "new file").touch()
    diff = provenance.uncommitted()
    assert provenance.git() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": True}
    assert diff.startswith("untracked: new file\n")
    # git applies it to the commit, and the code is there again
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    (tmp_path / "diff").write_text(diff, encoding="utf-8")
    git(again, "apply", str(tmp_path / "diff"))
    assert (again / "code.py").read_text(encoding="utf-8") == changed


@pytest.mark.parametrize(
    "line",
    [
        "HF_TOKEN = 'hf_{}'",
        "export WANDB_API_KEY={}",
        'api_key: "{}"',
        "password={}",
        'headers = {{"secret": "{}"}}',
    ],
)
def test_the_diff_holds_no_secret(checkout: Path, line: str) -> None:
    secret = "0123456789abcdefABCDEF0123456789abcdef01"
    (checkout / "code.py").write_text(CODE + line.format(secret) + "\n", encoding="utf-8")
    diff = provenance.uncommitted()
    assert secret not in diff
    assert "<removed>" in diff


def test_a_diff_in_another_encoding_is_no_error(checkout: Path) -> None:
    (checkout / "code.py").write_bytes(CODE.encode() + "# café\n".encode("latin-1"))
    assert "+# caf\ufffd" in provenance.uncommitted()


def test_lock_files_are_recorded_by_digest(checkout: Path) -> None:
    (checkout / "requirements.lock").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert provenance.collect(["x"])["lock"] == {
        "requirements.lock": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "differs": {},
    }


def version(name: str) -> str:
    return importlib.metadata.version(name)


def locked(checkout: Path, *lines: str, file: str = "requirements.lock") -> None:
    text = "".join(f"{line} \\\n    --hash=sha256:{'0' * 64}\n" for line in lines)
    (checkout / file).write_text(f"# made by == a machine\n{text}", encoding="utf-8")


def test_packages_as_locked_differ_in_nothing(checkout: Path) -> None:
    torch = version("torch").partition("+")[0]
    locked(checkout, f"trl=={version('trl')}", f"torch=={torch}", f"PyYAML=={version('pyyaml')}")
    assert provenance.differs(provenance.installed()) == {}
    locked(checkout, f"torch=={torch}+cpu ; sys_platform == 'linux'")
    assert provenance.differs(provenance.installed()) == {}
    assert provenance.installed()["torch"] == version("torch")  # with its build


@pytest.mark.parametrize(
    ("line", "locked_", "installed"),
    [
        ("trl==0.0.1", {"trl": "0.0.1"}, True),
        ("PyYAML==1.0 ; python_version > '3'", {"pyyaml": "1.0"}, True),
        ("typing_extensions==1.0", {"typing-extensions": "1.0"}, True),
        ("torch==2.0.0", {"torch": "2.0.0"}, True),
        # of those that are missing, what can change a result, on the machines that it is for
        ("flash-attn==2.8", {}, False),
        ("gguf==0.19.0", {"gguf": "0.19.0"}, False),
        (f"gguf==0.19.0 ; sys_platform == '{sys.platform}'", {"gguf": "0.19.0"}, False),
        ("gguf==0.19.0 ; sys_platform == 'elsewhere'", {}, False),
    ],
)
def test_a_package_that_is_not_as_locked_is_recorded(
    line: str, locked_: dict[str, str], installed: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def of(name: str) -> str:
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", of)
    locked(checkout, line)
    here = {
        name: {"locked": v, "installed": real(name) if installed else None}
        for name, v in locked_.items()
    }
    assert provenance.differs(provenance.installed()) == here
    lock = provenance.collect(["x"])["lock"]
    assert lock is not None and lock["differs"] == here


def test_what_only_a_gpu_needs_may_be_missing_but_not_other(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-thing", "trl"))
    locked(checkout, "no-such-thing==1", "trl==0.0.1", file="requirements-cuda.lock")
    assert set(provenance.differs(provenance.installed())) == {"trl"}


def test_the_code_is_recorded_file_by_file(checkout: Path) -> None:
    # no git is needed, as in a wheel
    found = provenance.collect(["x"])["source"]
    package = Path(ftpipe.__file__).parent
    done = subprocess.run(
        ["sha256sum", "cli.py", "stages/sft.py"], cwd=package, capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        digest, name = line.split()
        assert digest.startswith(found[name]) and len(found[name]) == 16
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert set(found) == files and "__init__.py" in files


def test_a_file_of_the_code_that_changes_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/one.py", "two.py", "data.json"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    before = provenance.source()
    assert list(before) == ["a/one.py", "two.py"]
    (tmp_path / "a/one.py").write_text("x", encoding="utf-8")
    after = provenance.source()
    assert {name for name in after if after[name] != before[name]} == {"a/one.py"}


def test_a_command_names_no_home_and_no_secret_of_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    typed = ["ftpipe", "sft", "output=/home/ada/x", "tracking.tags=['password=one two']"]
    said = provenance.command(typed)
    assert said.startswith("ftpipe sft output=~/x ")
    assert "one" not in said and "two" not in said
    kept = provenance.words(typed)
    assert kept[2] == "output=~/x" and "two" not in kept[3]
    assert provenance.command([home.long(word) for word in kept]) == said
