"""``ftpipe runs lineage``: an artifact back to the data and the base model that it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftpipe.choices import State
from ftpipe.errors import UserError
from ftpipe.runs import records
from ftpipe.runs.listing import main_metrics, number
from ftpipe.runs.records import Piece, Run

DIGEST = re.compile(r"[0-9a-f]{64}")
SHOWN = 16  # hex digits of a digest that people read


@dataclass(frozen=True)
class Node:
    """An artifact of a tree, what it was made from, and what came from outside.

    Attributes:
        outside: the pin of each outside input, by the key of the configuration that names it.
        seen: it stands elsewhere in the tree with all that is below it.
    """

    piece: Piece
    inputs: list[Node] = field(default_factory=list)
    outside: Mapping[str, str] = field(default_factory=dict)
    seen: bool = False


def trees(of: Run | Piece) -> list[Node]:
    """Return the tree of an artifact, or of each artifact of a run that no other of it was made from.

    Raises:
        UserError: if nothing of the run is made.
    """
    if isinstance(of, Piece):
        if of.damage:
            raise UserError(of.damage)
        return [_node(of, records.root_of(of.path), set())]
    made = of.made()
    if not made:
        raise UserError(f"nothing of the run {of.name} is made, so nothing has a lineage.")
    used = {name for piece in made.values() for name in piece.inputs.values()}
    seen: set[str] = set()
    root = records.root_of(of.folder)
    return [_node(piece, root, seen) for piece in made.values() if piece.name not in used]


def _node(piece: Piece, root: Path, seen: set[str]) -> Node:
    if piece.name in seen:
        return Node(piece, seen=True)
    seen.add(piece.name)
    made_from = [records.look(root, name) for name in piece.inputs.values()]
    return Node(piece, [_node(one, root, seen) for one in made_from], outside(piece))


def outside(piece: Piece) -> dict[str, str]:
    """Return what an artifact took from outside: a line for each pin, by the key that names it."""
    config = records.flat(piece.told("config"))
    found = {}
    for name, pin in piece.facts("pins").items():
        key = key_of(name)
        path = next((config[at] for at in (f"{key}.path", key) if isinstance(config.get(at), str)), None)
        said = pin_line(str(pin))
        found[f"{key}{_part(name)}"] = said if path is None or path in said else f"{path}, {said}"
    return found


def key_of(pin: str) -> str:
    """Return the configuration's key behind the name of a pin.

    >>> key_of("data/0/alpaca"), key_of("data/decontaminate/1/mmlu"), key_of("tokenizer/tokenizer")
    ('data.sources.alpaca', 'data.decontaminate.mmlu', 'model.tokenizer')
    """
    group, _, rest = pin.partition("/")
    if group == "data":
        name = re.sub(r"^(decontaminate/)?\d+/", "", rest)
        return f"data.{'decontaminate' if rest.startswith('decontaminate/') else 'sources'}.{name}"
    if group in ("evaluation", "benchmarks"):
        return _evaluated(rest)
    return {"seeds": "evolve.seeds", "tokenizer": "model.tokenizer"}.get(group, group)


def _evaluated(rest: str) -> str:
    """Return the key behind a pin of the stage evaluate."""
    match rest.split("/"):
        case ["harness", task, *split]:
            return f"evaluate.harness.tasks.{task}" + "".join(f".files.{one}" for one in split)
        case ["prompts" | "answers" as kind, name]:
            return f"evaluate.{kind}.{name}"
    return {"reward_model": "evaluate.judge.reward_model", "prompts": "evaluate.judge"}.get(
        rest, f"evaluate.{rest}"
    )


def _part(pin: str) -> str:
    """Return which of several files of a model or a tokenizer a pin is of, or what of the seeds."""
    group, _, rest = pin.partition("/")
    if group in ("data", "evaluation", "benchmarks") or rest in ("tokenizer", "rows", "hub", "gguf"):
        return ""
    return f" ({rest.removeprefix('tokenizer/')})"


def pin_line(pin: str) -> str:
    """Return how to say a pin: a digest, shortened, or a hub id with its commit."""
    match = DIGEST.match(pin)
    if match:
        return f"sha256 {pin[:SHOWN]}…{pin[match.end() :]}"
    return pin


def lines(roots: list[Node]) -> list[str]:
    """Return trees as lines."""
    return [line for root in roots for line in [_head(root), *_below(root, "")]]


def _head(node: Node) -> str:
    piece = node.piece
    if piece.state is State.damaged:
        return f"{piece.name}  damaged: {piece.damage}"
    if piece.state is not State.made or piece.artifact is None:
        return f"{piece.name}  {piece.state}"
    if node.seen:
        return f"{piece.name}  (above)"
    numbers = ", ".join(f"{name} {number(value)}" for name, value in main_metrics(piece).items())
    return "  ".join([piece.name, piece.artifact.kind, *([numbers] if numbers else [])])


def _below(node: Node, margin: str) -> Iterator[str]:
    children: list[Node | str] = [*node.inputs, *(f"{key}: {pin}" for key, pin in node.outside.items())]
    for at, child in enumerate(children, start=1):
        last = at == len(children)
        branch, below = ("└── ", "    ") if last else ("├── ", "│   ")
        yield margin + branch + (child if isinstance(child, str) else _head(child))
        if isinstance(child, Node):
            yield from _below(child, margin + below)


def as_json(node: Node) -> dict[str, Any]:
    """Return a tree for ``--json``; pins are whole here."""
    piece = node.piece
    return {
        "artifact": piece.name,
        "stage": piece.stage,
        "fingerprint": piece.fingerprint,
        "kind": piece.artifact.kind if piece.artifact else None,
        "state": piece.state,
        "metrics": {} if node.seen else main_metrics(piece),
        "pins": {} if node.seen else piece.facts("pins"),
        "inputs": [as_json(below) for below in node.inputs],
        "above": node.seen,
    }
