"""Where an endpoint listens, and what is said when it cannot."""

from __future__ import annotations

import socket

import pytest

from ftpipe.errors import ConfigError
from ftpipe.serving import server
from ftpipe.serving.address import bound, is_loopback, is_own_name, url
from ftpipe.serving.options import ServeOptions, Wanted


@pytest.mark.parametrize(
    ("host", "loopback", "shown"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:"),
        ("127.8.9.1", True, "http://127.8.9.1:"),
        ("0.0.0.0", False, "http://0.0.0.0:"),
        ("::1", True, "http://[::1]:"),
        ("::", False, "http://[::]:"),
    ],
)
def test_other_machines_reach_it_only_where_that_is_said(host: str, loopback: bool, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with bound(host, 0) as sock:
        assert is_loopback(sock) is loopback
        assert url(sock).startswith(shown) and url(sock).endswith("/v1")
        chosen = ServeOptions(Wanted("x"), host=host)
        said = server.warnings(sock, chosen)
        assert bool(said) is not loopback
        if said:
            assert f"--host={host} can be reached from other machines" in said[0]
            assert "without --api-key-env by anyone" in said[0]
            (locked,) = server.warnings(sock, ServeOptions(Wanted("x"), host=host, key="k"))
            assert "anyone" not in locked


def test_clients_are_refused_until_it_listens() -> None:
    with bound("127.0.0.1", 0) as sock:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(sock.getsockname(), 5)
        sock.listen()
        socket.create_connection(sock.getsockname(), 5).close()


def test_an_address_that_cannot_be_had_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"^--port={port}: another program"),
            bound("127.0.0.1", port),
        ):
            pass
    with pytest.raises(ConfigError, match="this machine has no such address"), bound("192.0.2.1", 0):
        pass  # of a network for documentation (RFC 5737)
    with pytest.raises(ConfigError, match="there is no such address"), bound("no.such.invalid", 0):
        pass  # a name that never is one (RFC 2606)


@pytest.mark.parametrize(
    ("header", "own"),
    [
        *(
            ("localhost", True),
            ("localhost:8000", True),
            ("LOCALHOST.:1", True),
            ("127.0.0.1:8000", True),
        ),
        *(("[::1]:8000", True), ("[::1]", True), ("192.168.1.5", True)),
        *(("evil.example", False), ("evil.example:8000", False), ("localhost.evil.example", False)),
        *(("127.0.0.1.evil.example", False), ("[evil.example]:8000", False), (":8000", False)),
    ],
)
def test_a_page_under_a_foreign_name_is_no_local_client(header: str, own: bool) -> None:
    assert is_own_name(header) is own
