"""A hub's commit, told from a branch or a tag."""

from __future__ import annotations

from ftpipe.errors import ConfigError


def check_commit(key: str, revision: str | None) -> None:
    """Refuse a hub revision that is not a commit: a branch can move under a recipe."""
    if revision is not None and not is_commit(revision):
        raise ConfigError(
            f"{key}={revision} is not a commit (40 hex digits); a branch or tag can move, "
            "so give the commit it points to now."
        )


def is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)
