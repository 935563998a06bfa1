"""``ftpipe runs`` and ``runs show``: what was run, how far it came, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftpipe import printing
from ftpipe.choices import State
from ftpipe.errors import UserError
from ftpipe.runs.records import LISTED, ORIGINS, RUN, Piece, Run, in_bytes

# Of each stage, the numbers that say most; of several, those that are there.
MAIN: Mapping[str, tuple[str, ...]] = {
    "model": ("parameters",),
    "evolve": ("rows",),
    "prepare": ("train_rows",),
    "sft": ("held_out_loss", "loss_last"),
    "merge": ("apart_mean",),
    "reward": ("held_out_accuracy", "loss_last"),
    "reference": (),
    "dpo": ("held_out_reward_accuracy", "held_out_loss", "loss_last"),
    "ppo": ("held_out_score", "score", "kl"),
    "evaluate": ("loss", "win_rate"),
}
SHOWN = 2  # main metrics of a stage in a list
NOT_RECORDED = "not recorded"


def table(runs: Sequence[Run]) -> list[str]:
    """Return a line for each run, and what is damaged below it."""
    if not runs:
        return ["no runs"]
    head = ("run", "recipe", "started", "stages", "metrics")
    rows = [head, *((run.name, run.recipe, when(run), stages(run), main_line(run)) for run in runs)]
    drawn = printing.table(rows, fit=printing.width())
    broken = [sentence for run in runs for sentence in run.damage]
    return [*drawn, *(f"damaged: {sentence}" for sentence in dict.fromkeys(broken))]


def when(run: Run) -> str:
    return run.when.strftime("%Y-%m-%d %H:%M")


def stages(run: Run) -> str:
    """Return the stages of a run in order; one that is not made says so."""
    words = []
    for stage, piece in run.pieces.items():
        state = state_of(piece)
        words.append(stage if state is State.made else f"{stage} ({state})")
    return " ".join(words)


def state_of(piece: Piece | None) -> State:
    return piece.state if piece else State.missing


def main_metrics(piece: Piece) -> dict[str, float]:
    """Return the numbers of a stage that say most."""
    wanted = [name for name in MAIN.get(piece.stage, ()) if name in piece.metrics]
    return {name: piece.metrics[name] for name in wanted[:SHOWN]}


def main_line(run: Run) -> str:
    """Return the main metrics of the last stage that has any."""
    for stage, piece in reversed(run.made().items()):
        found = main_metrics(piece)
        if found:
            return ", ".join(f"{stage}/{name} {number(value)}" for name, value in found.items())
    return ""


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def as_json(run: Run) -> dict[str, Any]:
    """Return a run for ``--json``; docs/runs.md has the keys."""
    return {
        "name": run.name,
        "recipe": run.recipe,
        "folder": str(run.folder),
        "started": run.when.isoformat(timespec="seconds"),
        "stages": [
            {
                "stage": stage,
                "state": state_of(piece),
                "artifact": piece.name if piece else None,
                "fingerprint": piece.fingerprint if piece else None,
                "metrics": piece.metrics if piece else {},
            }
            for stage, piece in run.pieces.items()
        ],
        "damage": list(run.damage),
    }


def in_full(run: Run) -> dict[str, Any]:
    """Return a run with the sizes and the provenance of its artifacts."""
    whole = as_json(run)
    for entry, piece in zip(whole["stages"], run.pieces.values(), strict=True):
        entry["bytes"] = piece.size() if piece and piece.state is not State.missing else 0
        entry["path"] = str(piece.path) if piece else None
        entry["inputs"] = piece.inputs if piece else {}
        entry["provenance"] = piece.told("provenance") if piece else {}
    return whole


def shown(run: Run) -> list[str]:
    """Return the lines of ``runs show``: stages, time, size, numbers, and where they come from."""
    if not run.config:
        raise UserError(" ".join(run.damage))
    record = [name for name in (RUN, LISTED, ORIGINS) if (run.folder / name).is_file()]
    lines = [f"{run.folder}", f"recipe {run.recipe}, seed {run.config.get('seed')}, started {when(run)}"]
    lines += [f"record: {', '.join(record)}", "", *_stages(run), "", *_numbers(run), *_origin(run)]
    return [*lines, *(f"damaged: {sentence}" for sentence in run.damage)]


def _stages(run: Run) -> list[str]:
    seconds = {stage: _seconds(piece) for stage, piece in run.made().items()}
    whole = sum(second or 0.0 for second in seconds.values())
    rows = [("stage", "state", "seconds", "of all", "size", "artifact")]
    total = 0
    for stage, piece in run.pieces.items():
        state = state_of(piece)
        spent = seconds.get(stage)
        took = piece.size() if piece and state is not State.missing else 0
        total += took
        rows.append(
            (
                stage,
                str(state),
                "" if spent is None else f"{spent:,.1f}",
                "" if spent is None or not whole else f"{spent / whole:.0%}",
                in_bytes(took) if took else "",
                piece.name if piece else "",
            )
        )
    rows.append(("all", "", f"{whole:,.1f}", "", in_bytes(total), ""))
    return printing.table(rows)


def _seconds(piece: Piece) -> float | None:
    spent = piece.told("provenance").get("wall_seconds")
    return float(spent) if isinstance(spent, int | float) else None


def _numbers(run: Run) -> list[str]:
    rows = [
        (f"{stage}/{name}", number(value))
        for stage, piece in run.made().items()
        for name, value in (main_metrics(piece) or piece.metrics).items()
    ]
    return ["metrics", *printing.table(rows, indent="  "), ""] if rows else []


def _origin(run: Run) -> list[str]:
    """Return where the artifacts come from; a line once for all stages that it is the same for."""
    told: dict[tuple[str, str], list[str]] = {}
    for stage, piece in run.made().items():
        record = piece.told("provenance")
        for what, text in provenance(record).items():
            told.setdefault((what, text), []).append(stage)
    every = len(run.made())
    rows = [
        (what, text + ("" if len(of) == every else f"  ({', '.join(of)})"))
        for (what, text), of in sorted(told.items(), key=lambda entry: ORDER.index(entry[0][0]))
    ]
    return ["provenance", *printing.table(rows, indent="  ")] if rows else []


ORDER = ("command", "code", "python", "torch", "hardware", "ranks", "peak memory")


def provenance(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a manifest's provenance in short, for people."""
    git, packages, machine = (_group(record, key) for key in ("git", "packages", "hardware"))
    gpus = machine.get("gpus") or []
    changed = ", with uncommitted changes (uncommitted.diff)" if git.get("dirty") else ""
    memory = record.get("peak_memory_gib")
    said = {
        "command": record.get("command"),
        "code": f"commit {git['commit']}{changed}" if "commit" in git else None,
        "python": record.get("python"),
        "torch": packages.get("torch"),
        "hardware": ", ".join([str(machine.get("cpu", "")), *map(str, gpus)]) if machine else None,
        "ranks": record.get("world_size"),
        "peak memory": f"{memory} GiB" if memory is not None else None,
    }
    return {what: NOT_RECORDED if text is None else str(text) for what, text in said.items()}


def _group(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}
