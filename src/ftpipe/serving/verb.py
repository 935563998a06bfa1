"""``ftpipe chat`` and ``ftpipe serve``: read the words, find the policy, load it, answer."""

from __future__ import annotations

from collections.abc import Sequence

from ftpipe.choices import ServeEngine
from ftpipe.errors import ConfigError
from ftpipe.logs import quiet_libraries
from ftpipe.serving import options, replies, vllm
from ftpipe.serving.address import bound
from ftpipe.serving.source import find_source

INTERRUPTED = 130  # exit code


def chat(words: Sequence[str]) -> int:
    """Chat with a policy; return 0, or 130 where Ctrl-C ended it.

    Raises:
        UserError: for words that do not fit, a policy that is not there or cannot be loaded, and
            through a pipe for a line that cannot be answered.
    """
    chosen = options.chat(words)
    source = find_source(chosen.wanted)
    quiet_libraries()
    try:
        from ftpipe.serving.chat import talk
        from ftpipe.serving.load import voice

        talk(voice(source, chosen.wanted.device), chosen)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def serve(words: Sequence[str]) -> int:
    """Serve a policy until it is asked to end; return 0.

    Raises:
        UserError: for words that do not fit, a policy that is not there or cannot be loaded, and an
            address that cannot be had.
    """
    chosen = options.serve(words)
    source = find_source(chosen.wanted)
    name = chosen.name or source.name
    if chosen.engine is ServeEngine.vllm:
        vllm.serve(source, chosen, name)
    quiet_libraries()
    try:
        from ftpipe.serving import server
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'ftpipe[serve]'.") from None
    with bound(chosen.host, chosen.port) as sock:  # first: a model takes minutes to load
        for line in server.warnings(sock, chosen):
            replies.say(line)
        from ftpipe.serving.load import voice

        server.serve(voice(source, chosen.wanted.device), sock, name, chosen.key)
    return 0
