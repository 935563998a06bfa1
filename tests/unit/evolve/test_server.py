"""A real server on the loopback: patience with a busy one, a sentence about one that is wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ftpipe.config import EvolveConfig
from ftpipe.errors import ConfigError, ModelError, UserError
from ftpipe.evolve import server
from ftpipe.evolve.calls import Call, Said
from ftpipe.evolve.server import Server
from tests.chat_server import Answer, ChatServer, Reply, prompt

KEY = "sk-PLANTED/planted+0123456789=="


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between the test and the loopback, and no test waits for seconds."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)


def settings(chat: ChatServer, **more: Any) -> EvolveConfig:
    return EvolveConfig(url=chat.url, model="m", **{"retries": 3, "timeout": 5.0, **more})


def call(text: str = "Hello", **more: Any) -> Call:
    return Call(text, **{"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 11, **more})


def ask(evolve: EvolveConfig, *texts: str) -> dict[str, Said]:
    return {
        asked.prompt: said for asked, said in Server(evolve).complete([call(text) for text in texts])
    }


def refusal(answer: Answer, kind: type[UserError], *texts: str, **more: Any) -> str:
    with ChatServer(answer) as chat, pytest.raises(kind) as refused:
        ask(settings(chat, **more), *(texts or ("Hello",)))
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(chat.url, "URL")


def in_turn(*replies: Reply) -> Answer:
    """Reply to each body with one after the other, the last one for ever."""
    return lambda body, before: replies[min(before, len(replies) - 1)]


# --- what is sent and read ---


def test_a_request_is_what_the_published_interface_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")  # as a file that is read into a variable ends
    with ChatServer(in_turn(Reply(" Hi \n"))) as chat:
        assert ask(settings(chat, api_key_env="MY_KEY"), "Héllo") == {"Héllo": Said("Hi")}
    # API reference of OpenAI, "Create chat completion"
    assert [json.loads(body) for body in chat.asked] == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "Héllo"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 7,
            "seed": 11,
        }
    ]
    assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(in_turn(Reply("Hi"))) as chat:
        ask(settings(chat), "x")
    assert "Authorization" not in chat.headers[0]
    assert KEY not in str(chat.headers)


def test_a_slash_at_the_end_of_the_address_is_no_other_address() -> None:
    with ChatServer(in_turn(Reply("Hi"))) as chat:
        evolve = settings(chat)
        evolve.url = f"{chat.url}/"
        assert ask(evolve, "x") == {"x": Said("Hi")}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("half a sen", finish="length"), Said("half a sen", cut=True)),
        (Reply("", finish="stop"), Said("")),
        (Reply("x", finish="content_filter"), Said("", refused="content filter")),
        # a model that was still thinking (vLLM's reasoning parsers), and OpenAI's own refusal
        (
            Reply(body=b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'),
            Said("", cut=True),
        ),
        (
            Reply(body=b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
            Said(""),
        ),
        (
            Reply(body=b'{"choices": [{"message": {"content": null, "refusal": "I cannot."}}]}'),
            Said("", refused="I cannot."),
        ),
    ],
)
def test_why_it_stopped_is_read(reply: Reply, said: Said) -> None:
    with ChatServer(in_turn(reply)) as chat:
        assert ask(settings(chat), "x") == {"x": said}


# --- busy servers ---


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(status=429),
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(status=408),
        Reply(status=500),
        Reply(status=502, body=b"<html>bad gateway</html>"),
        Reply(status=503),
        Reply(body=b'{"choices": [{"message": {"con'),
        Reply(body=b"\xff\xfe"),
        Reply(body=b"{}"),
        Reply(body=b"[]"),
        Reply(body=b'{"choices": []}'),
        Reply(hang_up=True),
    ],
)
def test_after_a_trouble_that_may_pass_it_asks_again(trouble: Reply) -> None:
    with ChatServer(in_turn(trouble, trouble, Reply("Hi"))) as chat:
        assert ask(settings(chat), "x") == {"x": Said("Hi")}
        assert chat.total == 3


def test_it_asks_again_after_a_timeout() -> None:
    with ChatServer(in_turn(Reply("late", delay=1.5), Reply("Hi"))) as chat:
        assert ask(settings(chat, timeout=0.3), "x") == {"x": Said("Hi")}
        assert chat.total == 2


def test_it_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 60.0)
    started = time.monotonic()
    with ChatServer(in_turn(Reply(status=429, headers={"Retry-After": "1"}), Reply("Hi"))) as chat:
        assert ask(settings(chat), "x") == {"x": Said("Hi")}
    assert 1 <= time.monotonic() - started < 30


def test_each_wait_is_twice_the_last_and_none_is_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 1.0)
    waited: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0)
            return False

    with ChatServer(in_turn(Reply(status=503))) as chat:
        patient = Server(settings(chat, retries=9))
        patient._stopped = Clock()
        with pytest.raises(ModelError):
            list(patient.complete([call()]))
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(status=500), "HTTP 500"),
        (Reply(status=429), "HTTP 429"),
        (Reply(body=b"{"), "the response is no JSON"),
        (Reply(body=b"{}"), "the response is no chat completion"),
        (Reply(hang_up=True), "RemoteProtocolError: Server disconnected without sending a response"),
    ],
)
def test_its_patience_has_an_end(reply: Reply, said: str) -> None:
    assert refusal(in_turn(reply), ModelError, retries=2) == (
        f"evolve.url=URL gave no answer after 3 attempts (the last: {said}). "
        "Finished calls are kept: the same command goes on from there."
    )


def test_a_timeout_is_called_so() -> None:
    said = refusal(in_turn(Reply(delay=1.0)), ModelError, timeout=0.1, retries=0)
    assert "after 1 attempts (the last: timeout)" in said


# --- wrong addresses, keys and requests ---


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_where_nobody_listens_it_says_so_at_once() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    started = time.monotonic()
    with pytest.raises(ModelError) as refused:
        ask(EvolveConfig(url=url, model="m", retries=8), "x")
    assert time.monotonic() - started < 2
    assert str(refused.value).startswith(f"evolve.url={url}: nothing answers there (ConnectError: ")
    assert str(refused.value).endswith("; start the server, or correct the address.")


def test_a_server_that_restarts_is_waited_for() -> None:
    with ChatServer(in_turn(Reply("Hi"))) as chat:
        patient = Server(settings(chat, retries=1))
        assert list(patient.complete([call()]))
    with pytest.raises(ModelError, match="gave no answer after 2 attempts"):
        list(patient.complete([call()]))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_repeated(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    said = refusal(in_turn(Reply(status=status, body=body)), ConfigError, api_key_env="MY_KEY")
    assert said == (
        f"evolve.url=URL refuses the key (HTTP {status}); put a valid one into an environment variable "
        "and name that in evolve.api_key_env."
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b'{"error": {"message": "The model `m` does not exist.\\nTry another."}}',
            "The model `m` does not exist",
        ),
        (b'{"error": "no such model"}', "no such model"),
        (b"Not Found", "Not Found"),
        (b"", "HTTP 404"),
    ],
)
def test_a_wrong_model_or_address_is_told_in_the_servers_words(body: bytes, said: str) -> None:
    assert refusal(in_turn(Reply(status=404, body=body)), ConfigError) == (
        f"evolve.url=URL answered HTTP 404: {said}. "
        "Correct evolve.url (it usually ends in /v1) or evolve.model=m."
    )


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    # whoever is at the other end would get the key
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatServer(in_turn(Reply("Hi"))) as other:
        moved = Reply(status=307, headers={"Location": f"{other.url}/chat/completions"})
        assert "answered HTTP 307" in refusal(in_turn(moved), ConfigError, api_key_env="MY_KEY")
        assert other.total == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_is_one_prompt(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def answer(body: dict[str, Any], before: int) -> Reply:
        if prompt(body) == "bad":
            error = {"error": {"message": f"too long ({KEY})\nsecond line"}}
            return Reply(status=status, body=json.dumps(error).encode())
        return Reply("Hi")

    with ChatServer(answer) as chat:
        said = ask(settings(chat, api_key_env="MY_KEY"), "good", "bad", "fine")
    assert said == {"good": Said("Hi"), "bad": Said("", refused="too long (***)"), "fine": Said("Hi")}
    assert chat.total == 3


def test_a_server_that_refuses_everything_is_not_asked_on() -> None:
    error = Reply(status=400, body=b'{"error": {"message": "unknown field seed"}}')
    texts = [f"text {at}" for at in range(200)]
    with ChatServer(in_turn(error)) as chat, pytest.raises(ConfigError) as refused:
        ask(settings(chat, concurrency=4), *texts)
    assert "refused each of the first 20 prompts: unknown field seed. " in str(refused.value)
    assert 20 <= chat.total <= 24


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_key_that_is_not_there_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(
        ConfigError, match=r"^evolve\.api_key_env=MY_KEY: this environment variable is not"
    ):
        Server(EvolveConfig(url="http://x/v1", model="m", api_key_env="MY_KEY"))


@pytest.mark.parametrize("value", ["two words", "line\nend", "schlüssel", "\x1b[0m"])
def test_what_can_be_no_header_is_no_key_and_is_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError) as refused:
        Server(EvolveConfig(url="http://x/v1", model="m", api_key_env="MY_KEY"))
    assert value not in str(refused.value) and "holds is no key" in str(refused.value)


# --- many at once ---


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_calls_are_under_way_than_allowed(concurrency: int) -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        return Reply(prompt(body), delay=0.05)

    texts = [f"text {at}" for at in range(9)]
    with ChatServer(answer) as chat:
        said = ask(settings(chat, concurrency=concurrency), *texts)
        assert chat.most_at_once == concurrency
    assert said == {text: Said(text) for text in texts}


def test_after_a_failure_no_new_call_is_sent_and_those_under_way_count() -> None:
    def answer(body: dict[str, Any], before: int) -> Reply:
        if prompt(body) == "text 1":
            return Reply(status=404, delay=0.1)
        return Reply("Hi", delay=0.4)

    done: list[str] = []

    def collect(calls: Iterator[tuple[Call, Said]]) -> None:
        for asked, _ in calls:
            done.append(asked.prompt)

    with ChatServer(answer) as chat, pytest.raises(ConfigError):
        collect(Server(settings(chat, concurrency=3)).complete([call(f"text {at}") for at in range(30)]))
    assert sorted(done) == ["text 0", "text 2"]  # they were paid for
    assert chat.total == 3
