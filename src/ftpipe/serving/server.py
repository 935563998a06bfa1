"""The process that serves a policy: where it listens, what it says, how it ends."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

from ftpipe.serving.address import is_loopback, refusal, url
from ftpipe.serving.endpoint import Endpoint
from ftpipe.serving.options import ServeOptions
from ftpipe.serving.replies import say

if TYPE_CHECKING:
    from ftpipe.serving.load import Voice

GRACE = 10  # seconds for connections to take their last words when the server ends


def warnings(sock: socket.socket, chosen: ServeOptions) -> list[str]:
    """Return what a person should know who opens the endpoint to other machines."""
    if is_loopback(sock):
        return []
    anyone = "" if chosen.key else ", and without --api-key-env by anyone"
    return [
        f"warning: --host={chosen.host} can be reached from other machines{anyone}; nothing that is "
        "sent is encrypted."
    ]


def serve(voice: Voice, sock: socket.socket, name: str, key: str | None) -> None:
    """Serve until SIGTERM or SIGINT. Running answers are ended then, and their clients told so.

    Raises:
        ConfigError: if another program listens there by now.
    """
    app = Endpoint(voice, name, key, is_loopback(sock)).app()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = _Server(config, voice, f"{name} at {url(sock)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn takes the signals, and once it has ended raises them again for whom it found there
        signal.signal(number, lambda *_: None)
    host, port, *_ = sock.getsockname()
    try:
        server.run(sockets=[sock])
    except OSError as error:
        raise refusal(error, host, port) from None
    finally:
        voice.engine.close()
        voice.engine.join()


class _Server(uvicorn.Server):
    """Says when it listens, and ends the answers that are being made before it waits for clients."""

    def __init__(self, config: uvicorn.Config, voice: Voice, listening: str) -> None:
        super().__init__(config)
        self._voice = voice
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say(f"{self._listening} (template {self._voice.template.name}); Ctrl-C ends")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._voice.engine.close()
        await super().shutdown(sockets)
