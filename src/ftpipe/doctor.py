"""What this machine has, and what of it can be used: one line each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ftpipe import provenance
from ftpipe.logs import quiet_libraries

Finding = tuple[bool, str]  # whether it can be used, and what was seen


def main() -> int:
    """Print every finding; return 0 if a training can run here, else 1."""
    quiet_libraries()
    checks: dict[str, Callable[[], Finding]] = {
        "python": lambda: (sys.version_info >= (3, 11), sys.version.split()[0]),
        "processor": _processor,
        "disk": _disk,
        "torch": _torch,
        "gpu": _gpu,
        "libraries": _libraries,
        "bitsandbytes": _bitsandbytes,
        "deepspeed": _deepspeed,
        "slurm": _slurm,
        "hub": _hub,
        "wandb": _wandb,
        "lock": _lock,
    }
    usable = True
    for name, check in checks.items():
        try:
            fine, seen = check()
        except Exception as error:  # a broken install must not hide the other findings
            fine, seen = False, f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{'yes' if fine else 'no ':4} {name:13} {seen}")
        usable &= fine or name not in ("python", "torch", "libraries")
    return 0 if usable else 1


def _processor() -> Finding:
    found = provenance.hardware()
    return True, f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return free > 1, f"{free:.0f} GiB free here"


def _torch() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return True, f"{torch.__version__}, {built}, {torch.get_num_threads()} threads"


def _gpu() -> Finding:
    import torch

    found = provenance.gpus()
    if not found:
        return False, "none; trainings run on the CPU"
    if not torch.cuda.is_available():
        return False, f"{'; '.join(found)}, but torch cannot use it: run `make setup` again"
    own = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = "bf16" if own else "no bf16: set launch.precision=fp16"
    return True, f"{'; '.join(found)}; {bf16}"


def _libraries() -> Finding:
    needed = ("transformers", "trl", "peft", "accelerate", "datasets")
    versions = provenance.packages()
    lacking = [name for name in needed if name not in versions]
    seen = ", ".join(f"{name} {versions[name]}" for name in needed if name in versions)
    return not lacking, seen + (f"; lacking: {', '.join(lacking)}" if lacking else "")


def _bitsandbytes() -> Finding:
    """Quantise a small matrix to NF4 and back: the version alone does not say that it works."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    code, state = quantize_4bit(weight, quant_type="nf4")
    error = (dequantize_4bit(code, state) - weight).abs().max().item()
    version = provenance.packages()["bitsandbytes"]
    return error < 0.2, f"{version}, NF4 works on {device} (largest error {error:.3f} of 1)"


def _deepspeed() -> Finding:
    if importlib.util.find_spec("deepspeed") is None:
        return False, "not installed; needed only for ZeRO"
    code = "import deepspeed; print(deepspeed.__version__)"
    env = {**os.environ, "DS_ACCELERATOR": "cuda" if provenance.gpus() else "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"import ended with code {done.returncode}"


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return False, "no sbatch here; jobs can be run, not submitted"
    done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=False)
    nodes = subprocess.run(["sinfo", "-h", "-o", "%D"], capture_output=True, text=True, check=False)
    if nodes.returncode:
        return False, f"{done.stdout.strip()}, but no controller answers"
    return True, f"{done.stdout.strip()}, {sum(map(int, nodes.stdout.split()))} nodes"


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN"
    return not offline, f"{'offline (HF_HUB_OFFLINE)' if offline else 'online'}, {token}"


def _wandb() -> Finding:
    mode = os.environ.get("WANDB_MODE", "online")
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()
    version = provenance.packages().get("wandb")
    if version is None:
        return False, "not installed; metrics go to metrics.jsonl"
    return key or mode != "online", f"{version}, mode {mode}, {'key found' if key else 'no key'}"


def _lock() -> Finding:
    """Compare the installed packages with the lock files of the checkout."""
    lock = provenance.lock(provenance.installed())
    if lock is None:
        return False, "no requirements.lock beside this installation"
    off = [
        f"{name} {off['installed']} != {off['locked']}"
        if off["installed"]
        else f"{name} is not installed, {off['locked']} is locked"
        for name, off in lock["differs"].items()
    ]
    return not off, "; ".join(off) if off else "installed versions are the locked ones"
