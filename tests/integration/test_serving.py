"""`ftpipe serve` and `ftpipe chat` as processes, asked by the official client and by raw sockets."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import (
    APIError,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
)
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from ftpipe import cli, launch, worker
from tests import parrot
from tests.conftest import InProcess

pytestmark = pytest.mark.slow

KEY = "planted-key-0123456789"
ENDLESS = 100_000  # positions: minutes of an answer
PATIENCE = 60.0  # seconds for what takes a moment on a quiet machine


@dataclass
class Served:
    """An endpoint in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    name: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
        return host, int(port)

    def client(self, **options: Any) -> OpenAI:
        given = {"base_url": self.url, "api_key": KEY, "max_retries": 0, "timeout": PATIENCE}
        return OpenAI(**{**given, **options})

    def under_way(self) -> int:
        health = httpx.get(self.url.removesuffix("/v1") + "/health").json()
        assert health["status"] == "ok"
        return int(health["under_way"])

    def idle(self) -> None:
        """Wait until nothing is generated."""
        end = time.monotonic() + PATIENCE
        while self.under_way():
            assert time.monotonic() < end, "an answer goes on that nobody reads"
            time.sleep(0.02)

    def raw(self, request: bytes) -> tuple[int, dict[str, Any]]:
        """Send bytes; return the status and the JSON that comes back."""
        with socket.create_connection(self.address, PATIENCE) as connection:
            connection.sendall(request)
            got = b""
            while part := connection.recv(65536):
                got += part
        head, _, body = got.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ftpipe.cli", *words]


def started(folder: Path, *words: str, env: dict[str, str] | None = None) -> Served:
    """Start `ftpipe serve` on a free port; return when it listens."""
    log = folder / f"serve-{len(list(folder.glob('serve-*')))}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command("serve", *words, "--port", "0"),
            cwd=folder,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    end = time.monotonic() + 3 * PATIENCE
    while True:
        said = log.read_text()
        found = [line for line in said.splitlines() if " at http://" in line]
        if found:
            name, _, rest = found[0].partition(" at ")
            return Served(process, rest.split()[0], name, log)
        assert process.poll() is None, said
        assert time.monotonic() < end, said
        time.sleep(0.05)


def ended(served: Served, number: int = signal.SIGTERM) -> int:
    if served.process.poll() is None:
        served.process.send_signal(number)
    try:
        return served.process.wait(PATIENCE)
    finally:
        served.process.kill()
        assert served.process.stdout is not None
        served.process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model that says what is wanted."""
    made = tmp_path_factory.mktemp("serving")
    parrot.write(made / "parrot", ENDLESS)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a few steps of LoRA."""
    made = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"Say {number}.", "completion": f"It is {number}."} for number in range(16)]
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (
        *("sft", "recipe=tiny", "data=own", "data.template=chatml", "data.validation=0"),
        "data.sources={rows: {format: prompt_completion, path: rows.jsonl}}",
        *("sft.max_steps=6", "sft.samples=0", "sft.eval_every=0"),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made)
        patched.setattr(launch, "Popen", InProcess)
        patched.setattr(worker, "die_with_parent", lambda: None)
        patched.setattr(worker, "quiet_libraries", lambda: None)
        assert cli.main(list(words)) == 0
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """The model that says what is wanted, with a key."""
    one = started(folder, "parrot", "--api-key-env", "ENDPOINT_KEY", env={"ENDPOINT_KEY": KEY})
    yield one
    assert ended(one) == 0
    log = one.log.read_text()
    assert KEY not in log and parrot.ANSWER not in log and "Traceback" not in log
    assert "[transformers]" not in log  # nothing to complain of


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with served.client() as one:
        yield one


ASK: Any = [{"role": "user", "content": "What colour?"}]


def test_the_official_client_lists_the_model(client: OpenAI, served: Served) -> None:
    assert [one.id for one in client.models.list()] == ["parrot"] == [served.name]
    assert client.models.retrieve("parrot").object == "model"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_ends_where_its_turn_does(client: OpenAI, served: Served) -> None:
    done = client.chat.completions.create(model="parrot", messages=ASK, temperature=0)
    (choice,) = done.choices
    assert choice.message.content == parrot.ANSWER and choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert done.usage is not None
    # a token for each byte: <|user|>, the question, eos, <|assistant|>; the answer and its eos
    prompt = len("<|user|>\nWhat colour?") + 1 + len("\n<|assistant|>\n")
    answer = len(parrot.ANSWER.encode()) + 1
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, answer)
    assert done.usage.total_tokens == prompt + answer
    assert f": {prompt} + {answer} tokens, stop, " in served.log.read_text()


def test_a_stream_says_the_same_in_pieces(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="parrot",
        messages=ASK,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert [piece for piece in pieces if piece] == list(parrot.ANSWER)  # é in one piece
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(parrot.ANSWER.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "content"),
    [("é", "Blu"), ([", k", "zz"], "Blué"), ("k!z", parrot.ANSWER), (["lu", "B"], "")],
)
def test_an_answer_ends_before_a_stop_string(
    client: OpenAI, stop: Any, content: str, stream: bool
) -> None:
    asked: Any = {"model": "parrot", "messages": ASK, "temperature": 0, "stop": stop}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(**asked).choices
        said, reason = choice.message.content, choice.finish_reason
    assert (said, reason) == (content, "stop")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_cut_where_it_is_asked_to_be(client: OpenAI, name: str) -> None:
    asked: Any = {"model": "parrot", "messages": ASK, "temperature": 0, name: 3}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.finish_reason) == (parrot.ANSWER[:3], "length")


def test_a_seed_decides_what_is_drawn(client: OpenAI) -> None:
    def drawn(seed: int) -> str:
        done = client.completions.create(
            model="parrot", prompt="x", temperature=1.5, max_tokens=40, seed=seed
        )
        return done.choices[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in (1, 2, 3)}) == 3
    greedy = client.completions.create(model="parrot", prompt="x", temperature=0, max_tokens=40)
    assert greedy.choices[0].text == "x" * 40
    narrow = client.completions.create(
        model="parrot", prompt="x", temperature=1.5, max_tokens=40, top_p=0.01, seed=1
    )
    assert narrow.choices[0].text == "x" * 40  # a nucleus of one token


def test_completions_go_on_with_a_text(client: OpenAI) -> None:
    done = client.completions.create(model="parrot", prompt="say\nB", temperature=0)
    assert done.choices[0].text == parrot.ANSWER[1:] and done.choices[0].finish_reason == "stop"
    assert done.usage is not None and done.usage.prompt_tokens == 5
    cut = client.completions.create(model="parrot", prompt=["7"], temperature=0)
    assert cut.choices[0].text == "7" * 16  # OpenAI's default
    assert cut.choices[0].finish_reason == "length"
    parts = list(
        client.completions.create(
            model="parrot", prompt=parrot.ids(_bytes(), "y"), temperature=0, max_tokens=3, stream=True
        )
    )
    assert "".join(part.choices[0].text for part in parts) == "yyy"
    assert parts[-1].choices[0].finish_reason == "length"


def _bytes() -> Any:
    from ftpipe.tokenizer import byte_level

    return byte_level()


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found", "This server has 'parrot'"),
        ({"messages": []}, 400, "messages", "invalid_value", "not an empty one"),
        (
            {"messages": [{"role": "usr", "content": "Hi"}]},
            *(400, "messages[0].role", "invalid_value", "Did you mean 'user'?"),
        ),
        ({"messages": [USER, USER]}, 400, "messages[1].role", "invalid_value", "by turns"),
        (
            {"messages": [{"role": "user", "content": "a<|endoftext|>b"}]},
            *(400, "messages", "invalid_value", "special token '<|endoftext|>'"),
        ),
        (
            {"messages": [{"role": "user", "content": "long " * ENDLESS}]},
            *(400, "messages", "context_length_exceeded", "maximum context length is 100,000"),
        ),
        (
            {"max_tokens": ENDLESS},
            *(400, "messages", "context_length_exceeded", "100,000 of the answer"),
        ),
        ({"n": 2}, 400, "n", "unsupported_parameter", "allowed: 1"),
        ({"temperature": 3}, 400, "temperature", "invalid_value", "from 0 to 2, not 3"),
        ({"temprature": 1}, 400, "temprature", "unknown_parameter", "Did you mean 'temperature'?"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value", "stream"),
    ],
)
def test_what_does_not_fit_is_refused_as_openai_does(
    client: OpenAI, fields: dict[str, Any], status: int, param: str, code: str, said: str
) -> None:
    asked: Any = {"model": "parrot", "messages": [USER], **fields}
    with pytest.raises(APIStatusError) as caught:
        client.post("/chat/completions", body=asked, cast_to=object)
    error = caught.value
    assert isinstance(error, NotFoundError if status == 404 else BadRequestError)
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.type == "invalid_request_error" and said in error.message


def request(body: bytes, path: str = "/v1/chat/completions", method: str = "POST", **more: str) -> bytes:
    headers = {"Host": "127.0.0.1", "Authorization": f"Bearer {KEY}", "Connection": "close", **more}
    headers["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


GOOD = json.dumps({"model": "parrot", "messages": [USER], "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (request(GOOD), 200, None),
        (request(b""), 400, "The body is no JSON"),
        (request(b"{"), 400, "The body is no JSON"),
        (request(b"[" * 100_000), 400, "The body is no JSON"),
        (request(b'{"model": "\xff"}'), 400, "The body is no JSON"),
        (request(GOOD.replace(b"2", b"NaN")), 400, "NaN is no number"),
        (request(GOOD.replace(b"2", b"9" * 5000)), 400, "The body is no JSON"),
        (request(b"[1]"), 400, "must be a JSON object"),
        (request(GOOD.replace(b"Hi", rb"\ud800")), 400, "lone surrogate"),
        (request(GOOD.replace(b"parrot", rb"\ud800")), 404, "does not exist"),
        (request(b" " * (16 * 2**20 + 1)), 413, "more than 16,777,216 bytes"),
        (request(GOOD, "/v1/embeddings"), 404, "Unknown request: POST /v1/embeddings"),
        (request(b"", method="GET"), 405, "Unknown request: GET /v1/chat/completions"),
        (request(GOOD, Host="evil.example"), 403, "localhost"),
        (request(GOOD, Authorization="Bearer planted"), 401, "The key is missing or wrong"),
        (request(GOOD, Authorization=f"Basic {KEY}"), 401, "The key is missing or wrong"),
        (request(b"", "/v1/models", "GET", Authorization=""), 401, "The key is missing or wrong"),
    ],
)
def test_bytes_that_no_client_should_send_get_an_error_in_json(
    served: Served, sent: bytes, status: int, said: str | None
) -> None:
    got, body = served.raw(sent)
    assert got == status
    assert ("error" in body) == (said is not None)
    if said is not None:
        assert said in body["error"]["message"] and set(body["error"]) == {
            *("message", "type", "param", "code"),
        }


def test_a_wrong_key_is_what_the_client_says_it_is(served: Served) -> None:
    with served.client(api_key="another") as one, pytest.raises(AuthenticationError) as caught:
        one.models.list()
    assert caught.value.code == "invalid_api_key"
    assert served.under_way() == 0  # which needs no key


def test_only_this_machine_reaches_it(served: Served) -> None:
    _, port = served.address
    # the kernel's own list: local address, remote address, state 0A for listening (proc(5))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]  # 127.0.0.1, its bytes in the machine's order


def test_a_client_that_goes_away_stops_its_answer_and_no_other(served: Served, client: OpenAI) -> None:
    endless: Any = {"model": "parrot", "prompt": "z", "temperature": 0, "max_tokens": ENDLESS - 9}
    stream = client.completions.create(**endless, stream=True)
    assert next(iter(stream)).choices[0].text == "z"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.completions.create, model="parrot", prompt="q", temperature=0)
        while served.under_way() < 2:
            time.sleep(0.01)
        stream.close()
        assert waiting.result(PATIENCE).choices[0].text == "q" * 16
    served.idle()
    with httpx.Client() as hasty, pytest.raises(httpx.ReadTimeout):  # not a stream, and alone
        headers = {"Authorization": f"Bearer {KEY}"}
        hasty.post(f"{served.url}/completions", json=endless, headers=headers, timeout=0.3)
    served.idle()


def test_ten_clients_at_once_each_get_their_own_whole_answer(served: Served, client: OpenAI) -> None:
    def asked(digit: str) -> tuple[str, str]:
        given: Any = {"model": "parrot", "prompt": digit, "temperature": 0, "max_tokens": 50}
        parts = list(client.completions.create(**given, stream=True))
        whole = client.completions.create(**given)
        return "".join(part.choices[0].text for part in parts), whole.choices[0].text

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(asked, "0123456789")) == [(one * 50, one * 50) for one in "0123456789"]
    served.idle()


def test_a_trained_run_answers_alone_and_among_ten_as_its_adapter_does(trained: Path) -> None:
    served = started(trained, "tiny")
    try:
        questions = [f"What is {number} and {number}?" for number in range(10)]
        with served.client() as client:

            def answer(question: str) -> str | None:
                asked: Any = [
                    {"role": "system", "content": "Add."},
                    {"role": "user", "content": question},
                ]
                done = client.chat.completions.create(
                    model=served.name, messages=asked, temperature=0, max_tokens=24
                )
                return done.choices[0].message.content

            with ThreadPoolExecutor(10) as pool:
                together = list(pool.map(answer, questions))
            assert together == [_greedy(trained, question, 24) for question in questions]
            assert together[:2] == [answer(question) for question in questions[:2]]
            # an answer that is under way when the server is asked to end
            stream = client.chat.completions.create(model=served.name, messages=ASK, stream=True)
            assert next(iter(stream)).choices[0].delta.role == "assistant"
            served.process.send_signal(signal.SIGINT)
            with pytest.raises(APIError, match="shut down"):
                list(stream)
    finally:
        assert ended(served) == 0
    assert served.name.startswith("tiny-") and "Traceback" not in served.log.read_text()


def _greedy(folder: Path, question: str, tokens: int) -> str:
    """Return the adapter's answer by PEFT's own loading, from ChatML spelled out, by hand."""
    (adapter,) = folder.glob("outputs/artifacts/sft-*/adapter_config.json")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)  # it names its base by a relative path
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter.parent))
    tokenizer = AutoTokenizer.from_pretrained(str(adapter.parent))
    prompt = (
        f"<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    answer = ids[0, -tokens:].tolist()
    end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else tokens
    said = tokenizer.decode(answer[:end], skip_special_tokens=True)
    return str(said).partition("<|im_end|>")[0]


def test_a_port_that_is_taken_is_one_sentence(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run(
            command("serve", "parrot", "--port", port),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"ftpipe: --port={port}: another program listens there")
    assert done.stderr.count("\n") == 1


def test_a_pipe_gets_an_answer_for_each_line(folder: Path) -> None:
    done = subprocess.run(
        command("chat", "parrot", "--temperature", "0", "--json"),
        cwd=folder,
        input="What?\n\nAnd that?\n/save said.json\n",
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    said = {"content": parrot.ANSWER, "finish_reason": "stop"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [said, said]
    (row,) = (folder / "said.json").read_text(encoding="utf-8").splitlines()
    assert [one["content"] for one in json.loads(row)["messages"]] == [
        *("What?", parrot.ANSWER, "And that?", parrot.ANSWER),
    ]


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(folder: Path) -> None:
    ours, theirs = pty.openpty()
    # its template ends prompts with a newline; this one ends them with the user's words
    words = ("chat", "parrot", "--template", "plain", "--temperature", "0", "--max-tokens", "90000")
    process = subprocess.Popen(
        command(*words),
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(theirs)
    try:
        _until(ours, b"> ")
        os.write(ours, b"z\n")
        _until(ours, b"zzzzzzzz")
        os.write(ours, b"\x03")  # the terminal makes it SIGINT
        _until(ours, b"stopped")
        os.write(ours, b"/undo\n")
        shown = _until(ours, b"taken back")
        if b"> " not in shown.partition(b"taken back")[2]:
            _until(ours, b"> ")  # it waits for words again
        # Python misses one between its prompt and its wait for a key
        _until(ours, b"Ctrl-D or /quit ends", press=b"\x03")
        _press_until_it_ends(ours, b"\x04", process)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background


def _press_until_it_ends(terminal: int, key: bytes, process: subprocess.Popen[bytes]) -> None:
    """Press a key until a program ends: a terminal that changes its mode in between swallows one."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        assert time.monotonic() < end
        os.write(terminal, key)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


def _until(terminal: int, wanted: bytes, press: bytes = b"") -> bytes:
    """Read a terminal until it shows something, and press a key while it does not."""
    shown, end = b"", time.monotonic() + 3 * PATIENCE
    while wanted not in shown:
        assert time.monotonic() < end, shown
        os.write(terminal, press)
        ready, _, _ = select.select([terminal], [], [], 0.5)
        if ready:
            shown += os.read(terminal, 65536)
    return shown
