"""Hold a run to its recipe's lock: what moved refuses it, what the command line gives lifts the pin.

What is typed instead of a recipe's own value is the user's word. Smoke forms have other inputs, and are
not held to anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftpipe import origins, provenance
from ftpipe.errors import LockError
from ftpipe.lock.record import DECIDE, Lock, files_of, inputs_of, packages, python
from ftpipe.origins import Layer
from ftpipe.pipeline import Step

# the keys that say which input is meant; of rows ``owner.path`` and so on
ROWS = ("path", "revision", "file")
MODEL = ("model.path", "model.revision", "model.init")
NAMED_BY = {
    "model.path": MODEL,
    "model.tokenizer": (*MODEL, "model.tokenizer", "model.tokenizer_revision"),
}
SAID = "chosen on the command line"
SHOWN = 12  # digits of a digest in a sentence


def check(
    lock: Lock,
    steps: Sequence[Step],
    layers: Sequence[Layer],
    told: Mapping[str, str],
    groups: frozenset[str],
) -> list[str]:
    """Hold a plan to its recipe's lock; return a line for each pin that the command line lifts.

    Args:
        told: where each value came from.
        groups: those that the command line chooses an option of.

    Raises:
        LockError: with all that moved.
    """
    moved, lines = [*_moved_files(lock, layers), *_moved_packages(lock)], []
    named = f"the lock of recipe={lock.recipe}"
    lifted = {group for group in groups & set(DECIDE) if _other_option(lock, layers, group)}
    lines += [f"{group}: {SAID}; {named} does not hold for it." for group in sorted(lifted)]
    for owner, parts in inputs_of(steps).items():
        locked = lock.inputs.get(owner)
        if locked == parts or owner.split(".")[0] in lifted:
            continue
        if locked is None:
            lines.append(f"{owner} is not in {named}.")
        elif any(word == origins.COMMAND and _names(key, owner) for key, word in told.items()):
            lines.append(f"{owner}: {SAID}; {named} does not hold for it.")
        else:
            moved.append(_difference(owner, locked, parts))
    if moved:
        raise LockError(
            f"recipe={lock.recipe} is locked, and {'; '.join(moved)}; "
            f"`ftpipe lock recipe={lock.recipe}` pins it anew."
        )
    return lines


def _other_option(lock: Lock, layers: Sequence[Layer], group: str) -> bool:
    """Say whether the run takes another option of a group than the recipe was locked with."""
    here = f"conf/{group}/"
    before, now = (
        {file for file in files if file.startswith(here)} for files in (lock.files, files_of(layers))
    )
    return before != now


def _names(key: str, owner: str) -> bool:
    """Whether a key says which input is meant."""
    if owner in NAMED_BY:
        return key in NAMED_BY[owner]
    own = key == owner  # evaluate.mmlu.path, evaluate.judge.reward_model
    return own or key in [f"{owner}.{name}" for name in ROWS] or key.startswith(f"{owner}.files.")


def _moved_files(lock: Lock, layers: Sequence[Layer]) -> list[str]:
    now = files_of(layers)
    return [
        f"{file} moved: {_shown(was, now[file])}"
        for file, was in lock.files.items()
        if file in now and now[file] != was
    ]


def _moved_packages(lock: Lock) -> list[str]:
    now = packages()
    found = [
        f"{name} {was} is locked, {now.get(name, 'none')} is installed"
        for name, was in lock.packages.items()
        if now.get(name) != provenance.public(was)
    ]
    if lock.python != python():
        found.insert(0, f"Python {lock.python} is locked, {python()} runs")
    return found


def _difference(owner: str, locked: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say how an input differs, by the first part of it that does."""
    for part in sorted({*locked, *now}):
        was, is_ = locked.get(part), now.get(part)
        if was != is_:
            of = f"{owner} ({part})" if part else owner
            return f"{of} moved: {_shown(was, is_)}"
    raise AssertionError("the same in every part")


def _shown(was: str | None, now: str | None) -> str:
    """Say what was locked and what is there now; of digests their first digits.

    >>> _shown("ab" * 32, "cd" * 32)
    'locked sha256 abababababab…, now cdcdcdcdcdcd…'
    """
    before, after = _pin(was), _pin(now)
    both = before.startswith("sha256 ") and after.startswith("sha256 ")
    return f"locked {before}, now {after.removeprefix('sha256 ') if both else after}"


def _pin(value: str | None) -> str:
    if value is None:
        return "none"
    bare = value.removeprefix("hub:")
    is_digest = "@" not in bare and len(bare) > SHOWN
    return f"sha256 {bare[:SHOWN]}…" if is_digest else bare
