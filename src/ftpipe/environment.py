"""What a stage computed with, as its first rank knows it; the driver, which loads no torch, records it.

Loads nothing itself: what a stage did not load did not decide its result.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from ftpipe.choices import Device
from ftpipe.config import RunConfig
from ftpipe.launch_settings import in_force
from ftpipe.pins import hub_inputs


def of_rank(cfg: RunConfig) -> dict[str, Any]:
    """Return devices, threads, libraries and strategy of this rank, and the hub's files that were read.

    ``blas_threads`` is OMP_NUM_THREADS, which torch's and numpy's BLAS obey.
    """
    strategy, ranks = in_force(cfg.launch)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    told: dict[str, Any] = {
        "device": str(cfg.launch.device),
        "strategy": str(strategy) if ranks > 1 else None,
        "blas_threads": int(threads) if threads.isdigit() else None,
        "hub": hub_files(cfg),
    }
    if "torch" in sys.modules:
        told |= _torch(cfg)
    return told


def _torch(cfg: RunConfig) -> dict[str, Any]:
    import torch

    told: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if cfg.launch.device is Device.cuda and torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
        told["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return told


def hub_files(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Return the digest of each file that the hub's cache holds of the run's inputs, by id and commit.

    The cache calls a file's content by its SHA-256 where the hub stores it apart (LFS), else by the
    SHA-1 that git gives it (huggingface_hub, "Understand caching"). So nothing is read for it.
    """
    if "huggingface_hub" not in sys.modules:
        return {}
    from huggingface_hub.constants import HF_HUB_CACHE

    found = {}
    for kind, id_, commit in hub_inputs(cfg):
        folder = Path(HF_HUB_CACHE) / f"{kind}s--{id_.replace('/', '--')}" / "snapshots" / commit
        files = {
            path.relative_to(folder).as_posix(): digest
            for path in sorted(folder.rglob("*"))
            if path.is_symlink() and (digest := _digest(path.readlink().name))
        }
        if files:
            found[f"{id_}@{commit}"] = files
    return found


def _digest(name: str) -> str | None:
    """Return a blob's name with the kind of digest that it is.

    >>> _digest("ab" * 20)[:8]
    'git:abab'
    """
    if not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", name):
        return None
    return f"{'sha256' if len(name) == 64 else 'git'}:{name}"
