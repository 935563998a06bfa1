"""What every group of keys about an OpenAI-compatible server refuses."""

from __future__ import annotations

import re

from ftpipe.errors import ConfigError, require


def check_server(group: str, url: str | None, model: str | None, api_key_env: str | None) -> None:
    """Refuse an address or a key that would carry a secret into a file, without repeating it.

    Args:
        group: of the keys, such as ``evolve``.

    Raises:
        ConfigError: naming the key.
    """
    if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", api_key_env):
        raise ConfigError(
            f"{group}.api_key_env is not the name of an environment variable (capital letters, digits "
            "and _, such as OPENAI_API_KEY); put the key into a variable and name that."
        )
    if url is None:
        for key, value in (("model", model), ("api_key_env", api_key_env)):
            require(value is None, f"{group}.{key}", value, f"null without {group}.url")
        return
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url) is None:
        raise ConfigError(
            f"{group}.url is no plain address such as http://localhost:8000/v1 (no user, password or "
            f"query in it: it is written to files; a key goes into {group}.api_key_env)."
        )
    require(bool(model), f"{group}.model", model, f"the model's name at {group}.url")
