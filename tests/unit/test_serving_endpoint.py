"""The routes without a socket: who is let in, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ftpipe.choices import TemplateName
from ftpipe.data.prompt import Template
from ftpipe.serving import endpoint
from ftpipe.serving.endpoint import Endpoint
from ftpipe.serving.engine import Engine
from ftpipe.serving.load import Voice
from ftpipe.serving.source import Source
from ftpipe.tokenizer import byte_level
from tests import parrot

KEY = "planted-key-0123456789"
ADDRESS = "http://127.0.0.1:8000"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
# a token for each byte: <|user|>, the question, eos, <|assistant|>
PROMPT = len("<|user|>\nHi") + 1 + len("\n<|assistant|>\n")
ANSWER = len(parrot.ANSWER.encode()) + 1  # with its eos


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Voice]:
    tokenizer = byte_level()
    engine = Engine(parrot.model(positions=128), tokenizer, 128)
    source = Source("m", tmp_path_factory.mktemp("m"), None, TemplateName.tokenizer)
    yield Voice(source, Template(TemplateName.tokenizer, tokenizer), engine)
    engine.close()
    engine.join()


def sent(
    voice: Voice,
    path: str,
    body: Any = None,
    key: str | None = None,
    local: bool = True,
    method: str | None = None,
    **headers: str,
) -> httpx.Response:
    """Send one request to the application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Endpoint(voice, "m", key, local).app())
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            content = body if isinstance(body, bytes | None) else json.dumps(body)
            verb = method or ("GET" if body is None else "POST")
            return await client.request(verb, path, content=content, headers=headers)

    return asyncio.run(send())


def test_an_answer_in_one_piece(voice: Voice, capsys: pytest.CaptureFixture[str]) -> None:
    got = sent(voice, "/v1/chat/completions", CHAT).json()
    (choice,) = got["choices"]
    assert choice["message"]["content"] == parrot.ANSWER and choice["finish_reason"] == "stop"
    assert (got["object"], got["model"]) == ("chat.completion", "m")
    whole = PROMPT + ANSWER
    counts = {"prompt_tokens": PROMPT, "completion_tokens": ANSWER, "total_tokens": whole}
    assert got["usage"] == counts
    log = capsys.readouterr().err
    assert f": {PROMPT} + {ANSWER} tokens, stop, " in log and parrot.ANSWER not in log


@pytest.mark.parametrize("usage", [False, True])
def test_an_answer_in_pieces(voice: Voice, usage: bool) -> None:
    asked = CHAT | {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    got = sent(voice, "/v1/chat/completions", asked)
    assert got.headers["content-type"].startswith("text/event-stream")
    lines = got.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    told = chunks.pop() if usage else None
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        *({"content": letter} for letter in parrot.ANSWER),
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert all(("usage" in chunk) is usage for chunk in chunks)
    if told is not None:
        assert told["choices"] == [] and told["usage"]["total_tokens"] == PROMPT + ANSWER


def test_a_text_goes_on(voice: Voice) -> None:
    asked = {"model": "m", "prompt": "xy\n", "temperature": 0}
    got = sent(voice, "/v1/completions", asked).json()
    assert got["choices"][0]["text"] == parrot.ANSWER and got["usage"]["prompt_tokens"] == 3
    got = sent(voice, "/v1/completions", asked | {"prompt": "zz", "stream": True}).text
    parts = [json.loads(line[6:]) for line in got.split("\n\n")[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == "z" * 16
    assert {part["object"] for part in parts} == {"text_completion"}
    for prompt in ("", [], [258], [-1]):
        refused = sent(voice, "/v1/completions", asked | {"prompt": prompt})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(("most", "status"), [(128 - PROMPT, 200), (128 - PROMPT + 1, 400), (None, 200)])
def test_prompt_and_answer_share_the_context(voice: Voice, most: int | None, status: int) -> None:
    got = sent(voice, "/v1/chat/completions", CHAT | {"max_tokens": most})
    assert got.status_code == status
    if status == 400:
        error = got.json()["error"]
        assert error["code"] == "context_length_exceeded" and "length is 128 tokens" in error["message"]
    long = {"model": "m", "temperature": 0, "prompt": "z" * 127, "max_tokens": None}
    # without a number a completion has 16 tokens, and these do not fit
    assert sent(voice, "/v1/completions", long).status_code == 400
    assert sent(voice, "/v1/completions", long | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        *(("/v1/models", f"Bearer {KEY}", 200), ("/v1/models", f"bearer  {KEY} ", 200)),
        *(("/v1/models", f"Basic {KEY}", 401), ("/v1/models", f"Bearer {KEY}x", 401)),
        *(("/v1/models", "Bearer", 401), ("/v1/models", "Bearer \xe9", 401), ("/v1/models", "", 401)),
        *(("/health", "", 200), ("/v1/models/m", f"Bearer {KEY}", 200), ("/v1/models/m", "", 401)),
    ],
)
def test_a_key_opens_all_but_the_health(voice: Voice, path: str, header: str, status: int) -> None:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Endpoint(voice, "m", KEY, True).app())
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            return await client.get(path, headers={b"Authorization": header.encode("latin-1")})

    got = asyncio.run(send())
    assert got.status_code == status and KEY not in got.text
    assert (got.headers.get("www-authenticate") == "Bearer") is (status == 401)


def test_a_foreign_name_is_refused_where_only_this_machine_may_ask(voice: Voice) -> None:
    refused = sent(voice, "/v1/models", Host="evil.example")
    assert refused.status_code == 403 and "localhost" in refused.json()["error"]["message"]
    assert sent(voice, "/health", Host="evil.example").status_code == 403
    assert sent(voice, "/v1/models", Host="box.example", local=False).status_code == 200
    assert sent(voice, "/v1/models", Host="localhost:1").status_code == 200


@pytest.mark.parametrize(
    ("path", "method", "status", "said"),
    [
        ("/", "GET", 404, "Unknown request: GET /."),
        ("/docs", "GET", 404, "Unknown request: GET /docs."),
        ("/openapi.json", "GET", 404, "Unknown request: GET /openapi.json."),
        ("/v1/chat/completions", "GET", 405, "Unknown request: GET /v1/chat/completions."),
        ("/v1/models/other", "GET", 404, "This server has 'm'."),
    ],
)
def test_what_is_not_there(voice: Voice, path: str, method: str, status: int, said: str) -> None:
    got = sent(voice, path, method=method)
    error = got.json()["error"]
    assert got.status_code == status and said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_not_read_to_its_end(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(CHAT).encode()
    monkeypatch.setattr(endpoint, "LONGEST_BODY", len(body))
    assert sent(voice, "/v1/chat/completions", body).status_code == 200
    assert sent(voice, "/v1/chat/completions", body + b" ").status_code == 413


def test_an_answer_that_fails_and_a_server_that_ends_are_told(tmp_path: Path) -> None:
    tokenizer = byte_level()
    engine = Engine(parrot.model(positions=128), tokenizer, 128)
    source = Source("m", tmp_path, None, TemplateName.tokenizer)
    voice = Voice(source, Template(TemplateName.tokenizer, tokenizer), engine)
    engine.vocabulary = 10**6  # so that a token gets by that the model does not have
    asked = {"model": "m", "prompt": [10**5]}
    got = sent(voice, "/v1/completions", asked)
    assert (got.status_code, got.json()["error"]["type"]) == (500, "server_error")
    told = sent(voice, "/v1/completions", asked | {"stream": True}).text
    assert '"type":"server_error"' in told and told.endswith("data: [DONE]\n\n")
    engine.close()
    engine.join()
    got = sent(voice, "/v1/chat/completions", CHAT)
    assert got.status_code == 503 and "shut down" in got.json()["error"]["message"]
