"""A model behind an OpenAI-compatible server: many calls at once, patient with a busy one.

The key comes from an environment variable and is in nothing but the request's header.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from ftpipe.config import EvolveConfig
from ftpipe.errors import ConfigError, ModelError, UserError
from ftpipe.evolve.calls import Call, Said

BUSY = {408, 425, 429}  # and every 5xx: the same request may succeed later
OF_THIS_PROMPT = {400, 413, 422}  # too long, or against the server's rules
PATIENCE = 20  # so many refusals and no answer yet: it is not the prompts
CONNECT = 10.0  # seconds to be let in; the answer itself may take evolve.timeout
FIRST_WAIT = 1.0  # seconds between the first two attempts; each next one is twice as long
LONGEST_WAIT = 60.0  # seconds between two attempts, and what Retry-After may ask for at most


class Unsure(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Server:
    """``POST <url>/chat/completions``, the interface of vLLM, llama.cpp, TGI and OpenAI alike.

    Args:
        group: of the keys that say where it is, such as ``evolve``; sentences name them.

    Raises:
        ConfigError: if the environment variable of the key is not set, or holds no key.
    """

    together = 1

    def __init__(self, evolve: EvolveConfig, group: str = "evolve") -> None:
        assert evolve.url is not None and evolve.model is not None
        self.model = evolve.model
        self._group = group
        self._url = evolve.url.rstrip("/")
        self._where = f"{group}.url={self._url}"  # in a sentence
        self._at_once = evolve.concurrency
        self._retries = evolve.retries
        self._key = key(evolve.api_key_env, group)
        self._timeout = httpx.Timeout(evolve.timeout, connect=min(evolve.timeout, CONNECT))
        self._lock = threading.Lock()
        self._answered = 0
        self._refused = 0
        self._stopped = threading.Event()

    def complete(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Said]]:
        """Yield each call with what the server said, in the order in which they finish.

        After a failure no new call is sent; those under way are waited for and yielded, since they
        are paid for.

        Raises:
            ModelError: if nothing answers, or not after so many attempts.
            ConfigError: if the server refuses the key, the model or the address.
        """
        failure: UserError | None = None
        self._stopped.clear()
        with self._client() as client, ThreadPoolExecutor(self._at_once) as pool:
            asked = {pool.submit(self._ask, client, call): call for call in calls}
            try:
                for future in as_completed(asked):
                    try:
                        yield asked[future], future.result()
                    except CancelledError:
                        continue
                    except UserError as error:
                        failure = failure or error
                        self._stop(asked)
            finally:
                self._stop(asked)
        if failure is not None:
            raise failure

    def _client(self) -> httpx.Client:
        return httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._timeout,
            limits=httpx.Limits(max_connections=self._at_once),
        )

    def _stop(self, asked: dict[Future[Said], Call]) -> None:
        self._stopped.set()
        for future in asked:
            future.cancel()

    def _ask(self, client: httpx.Client, call: Call) -> Said:
        """Return what the server says to one call, unless another has failed before it is sent."""
        if self._stopped.is_set():
            raise CancelledError
        try:
            return self._patiently(client, call)
        except UserError:
            self._stopped.set()
            raise

    def _patiently(self, client: httpx.Client, call: Call) -> Said:
        """Return what the server says to one call, after as many attempts as it takes."""
        wait = FIRST_WAIT
        for attempt in range(self._retries + 1):
            try:
                said = self._attempt(client, call)
            except Unsure as problem:
                why = problem
            else:
                self._count(said)
                return said
            pause = wait if why.wait is None else why.wait
            if attempt == self._retries or self._stopped.wait(pause):
                break
            wait = min(2 * wait, LONGEST_WAIT)
        raise ModelError(
            f"{self._where} gave no answer after {attempt + 1} attempts (the last: {why}). "
            "Finished calls are kept: the same command goes on from there."
        )

    def _attempt(self, client: httpx.Client, call: Call) -> Said:
        try:
            response = client.post(f"{self._url}/chat/completions", json=self._body(call))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not self._answered:  # it is not there, or the address is wrong: say so at once
                raise ModelError(
                    f"{self._where}: nothing answers there ({_reason(error)}); "
                    "start the server, or correct the address."
                ) from None
            raise Unsure(_reason(error)) from None
        except httpx.TransportError as error:
            raise Unsure(_reason(error)) from None
        if response.status_code in BUSY or response.status_code >= 500:
            raise Unsure(f"HTTP {response.status_code}", _retry_after(response))
        if response.status_code in OF_THIS_PROMPT:
            return Said("", refused=self._complaint(response))
        if response.status_code != 200:
            raise self._wrong(response)
        return _read(response)

    def _body(self, call: Call) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": call.prompt}],
            "temperature": call.temperature,
            "top_p": call.top_p,
            "max_tokens": call.max_tokens,
            "seed": call.seed,
        }

    def _count(self, said: Said) -> None:
        """Tell a server that refuses some prompts from one that refuses everything.

        Raises:
            ConfigError: after ``PATIENCE`` refusals without one answer.
        """
        with self._lock:
            if said.refused is None:
                self._answered += 1
            else:
                self._refused += 1
            hopeless = not self._answered and self._refused >= PATIENCE
        if hopeless:
            raise ConfigError(
                f"{self._where} refused each of the first {PATIENCE} prompts: {said.refused}. "
                f"Correct {self._group}.model, {self._group}.max_tokens or what else it complains of."
            )

    def _wrong(self, response: httpx.Response) -> ConfigError:
        status = response.status_code
        if status in (401, 403):  # the server's own words may hold the key
            return ConfigError(
                f"{self._where} refuses the key (HTTP {status}); put a valid one into an "
                f"environment variable and name that in {self._group}.api_key_env."
            )
        return ConfigError(
            f"{self._where} answered HTTP {status}: {self._complaint(response)}. "
            f"Correct {self._group}.url (it usually ends in /v1) or {self._group}.model={self.model}."
        )

    def _complaint(self, response: httpx.Response) -> str:
        """Return the first line of what the server complains of, without the key."""
        try:
            body = response.json()
            said = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
        except (ValueError, KeyError, TypeError):
            said = response.text
        text = str(said).replace(self._key, "***") if self._key else str(said)
        line = next(iter(text.strip().splitlines()), "").strip().rstrip(".")
        return line[:300] or f"HTTP {response.status_code}"


def key(variable: str | None, group: str = "evolve") -> str:
    """Return the key that an environment variable holds; nothing where none is named.

    Raises:
        ConfigError: naming the variable, never what is in it.
    """
    if variable is None:
        return ""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"{group}.api_key_env={variable}: this environment variable is not set; "
            f"put the endpoint's key into it, or set {group}.api_key_env=null."
        )
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ConfigError(
            f"{group}.api_key_env={variable}: what this environment variable holds is no key "
            "(it has spaces, line ends or characters beyond ASCII)."
        )
    return value


def _read(response: httpx.Response) -> Said:
    """Return the words of a chat completion.

    Raises:
        Unsure: if the response is none.
    """
    try:
        body = response.json()
    except ValueError:
        raise Unsure("the response is no JSON") from None
    match body:
        case {"choices": [{"finish_reason": "content_filter"}, *_]}:
            return Said("", refused="content filter")
        case {"choices": [{"message": {"content": str(text)}, **rest}, *_]}:
            return Said(text.strip(), cut=rest.get("finish_reason") == "length")
        case {"choices": [{"message": {"content": None, "refusal": str(why)}}, *_]} if why:
            return Said("", refused=why)
        case {
            "choices": [{"message": {"content": None}, **rest}, *_]
        }:  # it got no further than thinking
            return Said("", cut=rest.get("finish_reason") == "length")
    raise Unsure("the response is no chat completion")


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a busy server asks to wait for, if it says so in seconds."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else None


def _reason(error: httpx.TransportError) -> str:
    """Return a transport error as the rest of a sentence; a timeout has no words of its own."""
    name = "timeout" if isinstance(error, httpx.TimeoutException) else type(error).__name__
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return f"{name}: {line}" if line and name != "timeout" else name
