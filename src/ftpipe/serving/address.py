"""Where an endpoint listens: on this machine alone, unless told otherwise."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ftpipe.errors import ConfigError

LOCAL_NAME = "localhost"


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that has an address and does not listen yet: clients are refused until it does.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host={host}: there is no such address.") from None
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its former owner may be ending
        try:
            sock.bind(address)
        except OSError as error:
            raise refusal(error, host, port) from None
        yield sock


def refusal(error: OSError, host: str, port: int) -> ConfigError:
    """Return the sentence for an address that cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"--port={port}: another program listens there; choose another, or --port 0 for any that is "
            "free."
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"--host={host}: this machine has no such address.")
    return ConfigError(f"--host={host} --port={port} cannot be had ({error.strerror}).")


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def url(sock: socket.socket) -> str:
    """Return what a client is told: the address up to ``/v1``."""
    host, port, *_ = sock.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_own_name(header: str) -> bool:
    """Whether a ``Host`` header names this machine as a local client does, or an address.

    A page in a browser can have a name of its own point here (DNS rebinding); it then sends that name.
    """
    name = header.strip().rpartition("]")[0].removeprefix("[") if "]" in header else ""
    name = name or header.strip().partition(":")[0]
    if name.lower().rstrip(".") == LOCAL_NAME:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
