"""What can go wrong through the user's input. Each is one sentence, shown without a traceback.

UserError              exit code 2
├── ConfigError        a key, a value, a recipe or a stage that does not exist or does not fit
├── DataError          a file or a row that cannot be used
├── ModelError         a model or tokenizer that cannot be used
├── HealthError        a training that went wrong and was ended, its state saved
├── LockError          a locked recipe whose inputs, packages or files moved
└── BusyError          another process is building the same artifact

Anything else that escapes is our bug and shows its traceback.
"""

import math
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(ValueError):
    """One sentence: where, what, what is allowed, what to do."""


class ConfigError(UserError):
    """The configuration asks for something that does not exist or does not fit."""


class DataError(UserError):
    """A data file or row cannot be used."""


class ModelError(UserError):
    """A model or tokenizer cannot be used."""


class HealthError(UserError):
    """A training went wrong: it was ended with its state saved."""


class LockError(UserError):
    """A recipe is locked to other inputs, packages or files than are there now."""


class BusyError(UserError):
    """Another process holds the artifact."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise a ``ConfigError`` that names the key, its value and what is allowed."""
    infinite = isinstance(value, float) and not math.isfinite(value)
    if not holds or infinite:
        raise ConfigError(f"{key}={value} is out of range; allowed: {allowed}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known``, or nothing.

    >>> nearest("stf", ["prepare", "sft"])
    " Did you mean 'sft'?"
    """

    # of several keys with one tail, the one whose group is like the word's is meant, else the first
    def likeness(name: str) -> float:
        ratio = SequenceMatcher(None, word.rpartition(".")[0], name.rpartition(".")[0]).ratio()
        return ratio if ratio >= 0.5 else 0.0

    names = sorted([*known][::-1], key=likeness)
    tail = word.rsplit(".", 1)[-1]
    tails = {name.rsplit(".", 1)[-1]: name for name in names}
    close = get_close_matches(word, names, n=1, cutoff=0.9)
    # the last part of a dotted key, with another prefix or none
    close = close or [tails[end] for end in tails if end == tail]
    # "lr" is short for "learning_rate"
    close = close or [
        name for end, name in tails.items() if tail == "".join(part[:1] for part in end.split("_"))
    ]
    close = close or [tails[match] for match in get_close_matches(tail, tails, n=1, cutoff=0.6)]
    close = close or get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not in a list: what it is, the nearest, all known."""
    names = list(known)
    listed = ", ".join(names)
    return f"no {what} '{word}'.{nearest(word, names)} Known: {listed}."
