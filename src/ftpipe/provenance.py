"""Where a result came from: code, packages, machine, command. Never a secret or a user's name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftpipe import home
from ftpipe.artifacts import digest

# What can change a result.
PACKAGES = (
    "ftpipe",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "safetensors",
    "pyarrow",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "gguf",
    "liger-kernel",
    "lm-eval",
)
# Not model.tokenizer= nor sft.sample_tokens=.
NAMED = r"((?<![a-z])(?:token|api_?key|key|secret|password|passwd)(?![a-z])[^=\s]*=)"
SECRET = re.compile(rf"(?i){NAMED}\S+|hf_[^\W_]{{8,}}")
# The same in one word of a command, whose value may have spaces.
SECRET_WORD = re.compile(rf"(?is){NAMED}.*")
# In a configuration, where folders may be called key=3: keys as Hugging Face, OpenAI, GitHub, AWS and
# Slack make them, or a value that is said to be secret.
KEY = re.compile(
    r"hf_[^\W_]{20,}|\bsk-[\w-]{32,}|\bgh[opusr]_[^\W_]{30,}|\bgithub_pat_\w{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bxox[abprs]-[\w-]{10,}|(?i:\b\w*(?:token|api_?key|secret|password|passwd)=(?![$`])\S{8,})"
)
# In a diff, key=lambda is code, and losing it would make the diff useless: a value with a digit.
SECRET_IN_CODE = re.compile(
    r"(?i)((?:token|key|secret|password|passwd)\w*[\"']?\s*[=:]\s*[\"']?)(?=[\w+/-]*\d)[\w+/-]{16,}"
    r"|hf_[^\W_]{30,}"
)
CODE = Path(__file__).resolve().parent
SOURCE = CODE.parents[1]  # of the checkout, where ftpipe runs from one
LOCK = "requirements.lock"  # what every machine has; requirements-cuda.lock is for some
DIGITS = 16  # of a source file's SHA-256


def collect(typed: Sequence[str]) -> dict[str, Any]:
    """Return what can be known before a stage runs: code, packages, hardware, command."""
    have = installed()
    return {
        "command": command(typed),
        "git": git(),
        "source": source(),
        "lock": lock(have),
        "python": platform.python_version(),
        "packages": have,
        "hardware": hardware(),
    }


def command(typed: Sequence[str]) -> str:
    """Return a command as a shell takes it, without secrets and without the user's name."""
    return home.short(redact(shlex.join(SECRET_WORD.sub(r"\1x", word) for word in typed)))


def words(typed: Sequence[str]) -> list[str]:
    """Return the words of a command to be kept until it is read once more, by ``home.long``."""
    return [home.short(redact(SECRET_WORD.sub(r"\1x", word))) for word in typed]


def source() -> dict[str, str]:
    """Return the first digits of the SHA-256 of each file of ftpipe's code, by relative path."""
    files = sorted(CODE.rglob("*.py"))
    return {file.relative_to(CODE).as_posix(): digest(file)[:DIGITS] for file in files}


def redact(text: str, secret: re.Pattern[str] = SECRET) -> str:
    """Remove values that look like secrets, so that ``--token=abc`` leaves no trace."""
    return secret.sub(lambda match: f"{match.group(1) or ''}<removed>", text)


def holds_secret(line: str) -> bool:
    """Say whether a line of a script gives a secret itself, not where the shell finds it.

    >>> holds_secret("export HF_TOKEN=abc"), holds_secret("export HF_TOKEN=$(cat ~/.token)")
    (True, False)
    """
    return any(
        not match[0].partition("=")[2].lstrip("\"'").startswith(("$", "`"))
        for match in SECRET.finditer(line)
    )


def holds_key(value: str) -> bool:
    """Say whether a value of a configuration is, or holds, the key to somebody's account.

    >>> holds_key("password=abcdefgh"), holds_key("rows/key=abcdefgh.jsonl")
    (True, False)
    """
    return KEY.search(value) is not None


def git() -> dict[str, Any] | None:
    """Return the checkout's commit and whether it was changed, or None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(_git("status", "--porcelain"))}


def uncommitted() -> str:
    """Return the checkout's changes against its commit as a diff; untracked files by name."""
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    new = _git("ls-files", "--others", "--exclude-standard") or ""
    listed = "".join(f"untracked: {name}\n" for name in new.splitlines())
    return redact(listed + diff, SECRET_IN_CODE)


def packages() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    return _versions(PACKAGES)


def installed() -> dict[str, str]:
    """Return the versions of those, and of all others of the lock files, as far as they are here."""
    listed = {name for path in _locks() for name in _listed(path)}
    return _versions(sorted(listed | set(PACKAGES)))


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lock(have: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the digest of each lock file of the checkout, and under ``differs`` what is not as locked.

    None where ftpipe was installed without one.

    Args:
        have: as ``installed`` has it.
    """
    files = {path.name: digest(path) for path in _locks()}
    return {**files, "differs": differs(have)} if files else None


def differs(have: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """Return each package of another version than the lock files say: ``locked`` and ``installed``.

    torch's ``+cpu`` is a build of the same version. Of packages that are not installed, those count
    that every machine has and that can change a result.
    """
    found: dict[str, dict[str, str | None]] = {}
    for path in _locks():
        for name, (locked, condition) in _listed(path).items():
            if name in have:
                off = public(have[name]) != public(locked)
            else:
                here = condition in ("", f"sys_platform == '{sys.platform}'")
                off = path.name == LOCK and name in PACKAGES and here
            if off:
                found[name] = {"locked": locked, "installed": have.get(name)}
    return found


def public(version: str) -> str:
    """Return a version without what says for which device it was built: ``2.13.0+cpu`` is ``2.13.0``."""
    return version.partition("+")[0]


def _locks() -> list[Path]:
    return sorted(SOURCE.glob("requirements*.lock"))


def _listed(path: Path) -> dict[str, tuple[str, str]]:
    """Return the version that a lock file has of each package, and the condition; names normalised."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pins = [line.rstrip(" \\") for line in lines if "==" in line and not line.startswith((" ", "#"))]
    found = {}
    for pin in pins:
        wanted, _, condition = pin.partition(";")
        name, _, version = wanted.partition("==")
        # packaging.python.org: names that differ in case, and in which of - _ . they have, are the same
        found[re.sub(r"[-_.]+", "-", name.strip()).lower()] = (version.strip(), condition.strip())
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory (GiB) and GPUs (with driver)."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Return each visible GPU as ``name, driver, memory``, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = done.stdout.strip().splitlines() if done.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # nvidia-smi lists them all
    if visible is None or not found:
        return found
    by_index = {str(index): gpu for index, gpu in enumerate(found)}
    names = [name.strip() for name in visible.split(",")]
    # a name that is no index is a UUID, perhaps of a part of a GPU
    return [by_index.get(name, name) for name in names if name in by_index or not name.isdigit()]


def _git(*args: str) -> str | None:
    if not (SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(SOURCE), *args]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # a diff may hold text in any encoding
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
