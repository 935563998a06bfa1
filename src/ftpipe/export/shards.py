"""Files of weights, written tensor by tensor: no more than one is in memory.

The layout is that of safetensors (github.com/huggingface/safetensors, "Format"): the length of the
header in 8 bytes, the header in JSON, the bytes of each tensor one after another. Its library writes
what it is given whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ftpipe.export.source import INDEX, ONE

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8  # bytes: where the first tensor begins


def write(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    most: int,
) -> list[str]:
    """Write weights as files of no more than ``most`` bytes each, with an index where they are several.

    Args:
        shapes: of each tensor, in the order in which they are written.
        tensor: computes one of them.
        dtype: of all of them.
        most: a tensor that is larger by itself has a file of its own.

    Returns:
        the names of the files.
    """
    width = dtype.itemsize
    shards = list(_shared_out({name: width * prod(shape) for name, shape in shapes.items()}, most))
    count = len(shards)
    files = [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
    files = [ONE] if count == 1 else files
    for file, shard in zip(files, shards, strict=True):
        _write_one(folder / file, {name: shapes[name] for name in shard}, tensor, dtype)
    if count > 1:
        total = sum(width * prod(shape) for shape in shapes.values())
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _shared_out(sizes: dict[str, int], most: int) -> Iterator[Sequence[str]]:
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > most:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def _write_one(
    path: Path, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in shapes.items():
            made = tensor(name)
            assert (tuple(made.shape), made.dtype) == (shape, dtype), name
            file.write(made.flatten().view(torch.uint8).numpy().tobytes())
