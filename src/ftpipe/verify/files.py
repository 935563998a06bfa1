"""Two folders that should be one: which file differs, and where in it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftpipe import artifacts
from ftpipe.artifacts import MANIFEST, Artifact, digest, digests
from ftpipe.trace import INITIAL, TRACE
from ftpipe.verify.findings import Finding, Layer

# They hold times, or say where a run lay, or are compared by themselves; nothing computes with them.
UNREAD = ("metrics.jsonl", "uncommitted.diff", "samples.md", "README.md", TRACE, INITIAL)
ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"  # of PEFT
SHOWN = 60  # characters of a value


def compare(recorded: Path, made: Path, stage: str, layer: Layer) -> tuple[str, list[Finding]]:
    """Return how many files were compared, and what differs.

    Args:
        recorded: a finished artifact.
        made: the same stage made again, finished.
        layer: what a difference is one of.
    """
    names = [name for name in digests(recorded) if Path(name).name not in UNREAD]
    found = []
    for name in names:
        one, other = recorded / name, made / name
        if not other.is_file():
            found.append(Finding(layer, stage, f"{name} was not made"))
        elif digest(one) != digest(other) and not _moved(one, other):
            found.append(Finding(layer, stage, f"{name}: {where(one, other)}"))
    return f"{len(names):,} files", found


def _moved(one: Path, other: Path) -> bool:
    """Say whether two adapters' configurations differ only in where their base lies."""
    if one.name != ADAPTER:
        return False
    a, b = (json.loads(path.read_text()) for path in (one, other))
    return bool({**a, BASE: ""} == {**b, BASE: ""})


def damage(artifact: Artifact) -> list[Finding]:
    """Return which files of an artifact are not as its manifest has them."""
    files = (path for path in sorted(artifact.path.rglob("*")) if path.is_file())
    names = [path.relative_to(artifact.path).as_posix() for path in files]
    written: dict[str, str] = artifact.manifest["files"]
    added = [f"{name} was added" for name in names if name not in {*written, MANIFEST}]
    found = [*artifacts.damage(artifact.path, written), *added]
    return [Finding(Layer.record, artifact.stage, says) for says in found]


def where(one: Path, other: Path) -> str:
    """Say where two files that differ do so first: a row, a tensor, a key, a line."""
    try:
        match one.suffix:
            case ".arrow":
                return _row(one, other)
            case ".safetensors":
                return _tensor(one, other)
            case ".json":
                return _key(json.loads(one.read_text()), json.loads(other.read_text()))
            case ".jsonl" | ".txt" | ".md" | ".jinja":
                return _text(one, other)
    except (ValueError, OSError):  # one of them is damaged
        pass
    return "its bytes differ"


def _row(one: Path, other: Path) -> str:
    from ftpipe.data import table

    def rows(path: Path) -> Iterator[dict[str, Any]]:
        for batch in table.batches(path):
            yield from batch.to_pylist()

    for number, (a, b) in enumerate(itertools.zip_longest(rows(one), rows(other)), start=1):
        if a != b:
            if a is None or b is None:
                return f"row {number:,} is {'new here' if a is None else 'missing here'}"
            column = next(name for name in a if a[name] != b.get(name))
            return f"row {number:,}, {_unlike(column, a[column], b.get(column))}"
    return "its rows are equal, their layout differs"


def _unlike(name: str, a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list):
        at = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is not None:
            return _unlike(f"{name}[{at}]", a[at], b[at])
        return f"{name}: {len(a):,} recorded, {len(b):,} made"
    return f"{name}: {_short(a)} is recorded, {_short(b)} made"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _tensor(one: Path, other: Path) -> str:
    import torch
    from safetensors import safe_open

    with safe_open(str(one), "pt") as a, safe_open(str(other), "pt") as b:
        names, others = list(a.keys()), set(b.keys())
        for name in names:
            if name not in others:
                return f"{name} was not made"
            x, y = a.get_tensor(name), b.get_tensor(name)
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return f"{name}: {x.dtype} {tuple(x.shape)} is recorded, {y.dtype} {tuple(y.shape)} made"
            if not torch.equal(x, y):
                apart = (x.double() - y.double()).abs()
                return f"{name}: {int((apart != 0).sum()):,} numbers by up to {float(apart.max()):.3g}"
        strange = sorted(others - set(names))
        return f"{strange[0]} is new here" if strange else "its tensors are equal, their layout differs"


def _key(a: Any, b: Any, at: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            key = f"{at}.{name}".lstrip(".")
            if name not in a or name not in b:
                return f"{key} is {'new' if name not in a else 'missing'} here"
            if a[name] != b[name]:
                return _key(a[name], b[name], key)
        return "its keys are equal, their layout differs"
    return _unlike(at or "its value", a, b)


def _text(one: Path, other: Path) -> str:
    lines = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (one, other)]
    for number, (a, b) in enumerate(itertools.zip_longest(*lines), start=1):
        if a != b:
            return _unlike(f"line {number:,}", a, b)
    return "its line ends differ"
