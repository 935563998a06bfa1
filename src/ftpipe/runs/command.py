"""``ftpipe runs [VERB]``: reads the words, prints what the verb finds. Only this file prints or asks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftpipe import printing
from ftpipe.errors import ConfigError, UserError, unknown
from ftpipe.runs import archive, collect, find, lineage, listing, records, unpack
from ftpipe.runs.records import Run, in_bytes

NOTHING_DONE = 1  # exit code: nothing was found, or nothing was removed though something could be


@dataclass(frozen=True)
class Words:
    """The words after a verb.

    Attributes:
        flags: those without a value, such as ``--json``.
        values: those with one, such as ``--to``.
        names: all else, in order.
        output: the folder that holds runs and artifacts.
    """

    names: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)
    output: Path = Path("outputs")

    def one(self, verb: str, what: str = "a run") -> str:
        """Return the only name.

        Raises:
            ConfigError: if there is none, or there are several.
        """
        if len(self.names) != 1:
            got = f"got {len(self.names)}: {' '.join(self.names)}" if self.names else "got none"
            raise ConfigError(f"runs {verb} takes {what}, but {got}. `ftpipe runs` lists the runs.")
        return self.names[0]


def parse(words: Sequence[str], flags: Sequence[str] = (), values: Sequence[str] = ()) -> Words:
    """Sort the words of a verb.

    Raises:
        ConfigError: for an option that is unknown, given twice, or lacks its value.
    """
    found, left = Words(), list(words)
    output: str | None = None
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("output="):
            if output is not None or not value:
                raise ConfigError(f"{word}: give one folder of outputs.")
            output = value
        elif name in values:
            value = value if equals else left.pop(0) if left and not left[0].startswith("--") else ""
            if not value or name in found.values:
                raise ConfigError(f"{name} needs one value, such as {name} {EXAMPLES[name]}.")
            found.values[name] = value
        elif word in flags:
            found.flags.add(word)
        elif word.startswith("-"):
            raise ConfigError(unknown("option", word, [*flags, *values]))
        else:
            found.names.append(word)
    folder = expanded(output) if output else Words.output
    return Words(found.names, found.flags, found.values, folder)


EXAMPLES = {"--to": "run.tar"}


def main(words: Sequence[str]) -> int:
    """Run ``ftpipe runs`` with these words; return its exit code.

    Raises:
        UserError: for what does not exist, does not fit, or cannot be done.
    """
    verb, rest = (words[0], words[1:]) if words and _is_verb(words[0]) else ("list", words)
    if verb not in VERBS:
        raise ConfigError(unknown("verb of runs", verb, VERBS))
    return VERBS[verb](rest)


def _is_verb(word: str) -> bool:
    return not word.startswith(("-", "output="))


def _list(words: Sequence[str]) -> int:
    given = parse(words, ["--json"])
    if given.names:
        raise ConfigError(unknown("verb of runs", given.names[0], VERBS))
    return _print_runs(records.runs(given.output), given)


def _find(words: Sequence[str]) -> int:
    given = parse(words, ["--json"])
    if not given.names:
        raise ConfigError("runs find takes conditions, such as recipe=tiny or 'sft/held_out_loss<2.0'.")
    wanted = find.conditions(given.names)
    found = find.matching(records.runs(given.output), wanted)
    _print_runs(found, given)
    return 0 if found else NOTHING_DONE


def _print_runs(runs: Sequence[Run], given: Words) -> int:
    if "--json" in given.flags:
        print(printing.as_json({"version": 1, "runs": [listing.as_json(run) for run in runs]}))
    else:
        print("\n".join(listing.table(runs)))
    return 0


def _show(words: Sequence[str]) -> int:
    given = parse(words, ["--json"])
    run = find.run(given.one("show"), given.output)
    lines = listing.shown(run)
    print(printing.as_json(listing.in_full(run)) if "--json" in given.flags else "\n".join(lines))
    return 0


def _lineage(words: Sequence[str]) -> int:
    given = parse(words, ["--json"])
    roots = lineage.trees(find.anything(given.one("lineage", "a run or an artifact"), given.output))
    if "--json" in given.flags:
        print(printing.as_json({"version": 1, "trees": [lineage.as_json(root) for root in roots]}))
    else:
        print("\n".join(lineage.lines(roots)))
    return 0


def _gc(words: Sequence[str]) -> int:
    given = parse(words, ["--json", "--yes", "--unfinished"])
    if given.names:
        raise ConfigError(f"runs gc takes no run, but got '{given.names[0]}'.")
    machine, unfinished = "--json" in given.flags, "--unfinished" in given.flags
    refers = collect.References(given.output)
    things, stays = collect.garbage(given.output, refers, unfinished)
    whole = sum(one.size for one in things)
    if not machine:
        rows = [(in_bytes(one.size), str(one.path), one.why) for one in things]
        last = f"{in_bytes(whole)} in all" if things else "nothing to remove"
        print("\n".join([*printing.table(rows), *(f"stays: {line}" for line in stays), last]))
    agreed = bool(things) and ("--yes" in given.flags or (not machine and _agrees()))
    kept: list[str] = []
    for thing in things if agreed else []:
        why = collect.remove(thing, refers, unfinished)
        if why is not None:
            kept.append(why)
    if machine:
        said: dict[str, Any] = {"version": 1, "garbage": collect.as_json(things), "stays": stays}
        print(printing.as_json(said | {"bytes": whole, "removed": agreed, "kept": kept}))
    elif agreed:
        print(
            "\n".join(
                [*(f"stays: {why}" for why in kept), "removed" if not kept else "removed the rest"]
            )
        )
    return 0 if not things or (agreed and not kept) else NOTHING_DONE


def _remove(words: Sequence[str]) -> int:
    given = parse(words, ["--yes"])
    if not given.names:
        raise ConfigError("runs remove takes one or more runs. `ftpipe runs` lists them.")
    runs = [find.run(name, given.output) for name in given.names]
    for run in runs:
        print(f"{run.folder}, with its logs; its artifacts stay until `ftpipe runs gc`")
    if "--yes" not in given.flags and not _agrees():
        return NOTHING_DONE
    for run in {run.folder: run for run in runs}.values():
        collect.drop(run)
    print("removed")
    return 0


def _agrees() -> bool:
    """Ask on a terminal; without one, say what it takes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("nothing was removed; --yes removes it")
        return False
    try:
        return input("remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _export(words: Sequence[str]) -> int:
    given = parse(words, ["--without-inputs"], ["--to"])
    run = find.run(given.one("export"), given.output)
    to = Path(given.values.get("--to", f"{run.name}.tar"))
    size = archive.export(run, to, "--without-inputs" not in given.flags)
    print(f"{to} ({in_bytes(size)})")
    return 0


def _import(words: Sequence[str]) -> int:
    given = parse(words)
    print(unpack.bring_in(Path(given.one("import", "an archive")), given.output))
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": _list,
    "show": _show,
    "find": _find,
    "lineage": _lineage,
    "gc": _gc,
    "remove": _remove,
    "export": _export,
    "import": _import,
}


def expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder.") from None
