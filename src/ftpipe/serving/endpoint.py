"""An OpenAI-compatible endpoint for one policy: what clients of that API need, on FastAPI.

transformers' own server (``transformers serve``, 5.23) cannot stand here. It finds models by hub id or
folder and knows no adapter and no template but the tokenizer's; it keeps stop strings in the answer,
ignores ``n`` and ``stream_options``, and seeds when a request arrives rather than when its answer is
drawn; what does not fit gets FastAPI's own errors or a 500; and unless it is streamed, an answer goes on
whose client is gone.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ftpipe.choices import Ended
from ftpipe.data.prompt import Endings, Prompt
from ftpipe.errors import UserError
from ftpipe.serving import replies
from ftpipe.serving.address import is_own_name
from ftpipe.serving.job import Done, Event, Failed, Job, Said
from ftpipe.serving.replies import Reply, counts, say
from ftpipe.serving.requests import Asked, Refused, read

if TYPE_CHECKING:
    from ftpipe.serving.load import Voice

LONGEST_BODY = 16 * 2**20  # bytes
LOOK = 0.25  # seconds between two looks whether the client is still there


class Gone(Exception):
    """The client hung up."""


class Endpoint:
    """The routes, and what they need.

    Args:
        name: what the model is called.
        key: what a request must present; None: nothing.
        local: only this machine can reach it, so no page of a browser under a foreign name may.
    """

    def __init__(self, voice: Voice, name: str, key: str | None, local: bool) -> None:
        self._voice = voice
        self._engine = voice.engine
        self._name = name
        self._key = None if key is None else key.encode()
        self._local = local
        self._created = int(voice.source.folder.stat().st_mtime)

    def app(self) -> FastAPI:
        """Return the application; every error it answers with has OpenAI's form."""
        app = FastAPI(
            openapi_url=None,
            dependencies=[Depends(self.check_host)],
            exception_handlers={
                Refused: _refused,
                HTTPException: _no_route,
                Exception: _broken,
            },
        )
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        routes = APIRouter(prefix="/v1", dependencies=[Depends(self.check_key)])
        for path, answer, method in (
            ("/models", self.models, "GET"),
            ("/models/{name:path}", self.model, "GET"),
            ("/chat/completions", self.chat, "POST"),
            ("/completions", self.completion, "POST"),
        ):
            routes.add_api_route(path, answer, methods=[method], response_model=None)
        app.include_router(routes)
        return app

    async def check_host(self, request: Request) -> None:
        """Refuse a page of a browser that has a name of its own point here."""
        host = request.headers.get("host", "")
        if self._local and host and not is_own_name(host):
            raise Refused("This server answers to localhost and to addresses.", status=403)

    async def check_key(self, request: Request) -> None:
        """Refuse a request without the key."""
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not right:
            raise Refused(
                "The key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                status=401,
            )

    async def health(self) -> Response:
        return _json({"status": "ok", "model": self._name, "under_way": self._engine.under_way})

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        if name != self._name:
            raise _unknown_model(self._name)
        return _json(self._model())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    def _model(self) -> dict[str, object]:
        told: dict[str, object] = {"id": self._name, "object": "model", "created": self._created}
        # vLLM's field for what clients must know to cut a history
        return told | {"owned_by": "ftpipe", "max_model_len": self._engine.context}

    async def _answer(self, request: Request, chat: bool) -> Response:
        try:
            asked = read(await _body(request), chat, self._name)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        prompt, endings = self._prompt(asked)
        self._check_room(len(prompt.ids), asked.sampling.max_tokens, "messages" if chat else "prompt")
        events: asyncio.Queue[Event] = asyncio.Queue()
        tell = partial(_tell, asyncio.get_running_loop(), events)
        job = Job(prompt, asked.sampling, endings, tell)
        reply = Reply(chat, self._name, asked.usage)
        self._engine.ask(job)
        incoming = _events(request, job, events, reply)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = _stream(incoming, job, reply)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        try:
            return await _whole(incoming, job, reply)
        except Gone:
            return Response(status_code=400)  # nobody reads it

    def _prompt(self, asked: Asked) -> tuple[Prompt, Endings]:
        """Return the tokens of a request and what ends its answer.

        Raises:
            Refused: if the template cannot write the conversation, or a token is none.
        """
        template, tokenizer = self._voice.template, self._engine.tokenizer
        if asked.turns is not None:
            try:
                return template.prompt(asked.turns), template.endings
            except UserError as error:
                raise Refused(
                    f"'messages': {str(error).rstrip('.')}.", "messages", "invalid_value"
                ) from None
        if isinstance(asked.prompt, str):
            ids = tuple(tokenizer(asked.prompt)["input_ids"])
        else:
            ids = asked.prompt or ()
        if not ids or not all(0 <= token < self._engine.vocabulary for token in ids):
            allowed = f"tokens below {self._engine.vocabulary:,}" if ids else "at least one token"
            raise Refused(f"'prompt' must have {allowed}.", "prompt", "invalid_value")
        # a text that goes on has no turns, so nothing but eos ends it
        ends = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
        return Prompt("", ids), Endings(ends)

    def _check_room(self, tokens: int, most: int | None, param: str) -> None:
        context = self._engine.context
        if context is not None and tokens + (most or 1) > context:
            wanted = f" and {most:,} of the answer" if most else ""
            raise Refused(
                f"This model's maximum context length is {context:,} tokens, but {tokens:,} of the "
                f"{param}{wanted} were asked for. Shorten the {param}, or ask for a shorter answer.",
                param,
                "context_length_exceeded",
            )


async def _body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        Refused: if it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise Refused(f"The body has more than {LONGEST_BODY:,} bytes.", status=413)
    return bytes(body)


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event from the engine's thread over to the server's."""
    with suppress(RuntimeError):  # the loop has ended: nobody listens any more
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _events(
    request: Request, job: Job, events: asyncio.Queue[Event], reply: Reply
) -> AsyncIterator[Said | Done]:
    """Yield what the engine tells, until the answer ends.

    Raises:
        Gone: when the client has hung up; its answer is not made any further.
        Refused: when the answer cannot be given.
    """
    begun = looked = time.monotonic()
    while True:
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            if await request.is_disconnected():
                job.cancel()
                say(f"{reply.number}: the client is gone")
                raise Gone
        try:
            event = await asyncio.wait_for(events.get(), LOOK)
        except TimeoutError:
            continue
        if isinstance(event, Failed):
            say(f"{reply.number}: failed: {event.why}")
            raise Refused(f"No answer: {event.why}.", status=500, kind="server_error")
        if isinstance(event, Done) and event.why is Ended.cancelled:
            raise Refused("The server is being shut down.", status=503, kind="server_error")
        if isinstance(event, Done):
            took = time.monotonic() - begun
            tokens = f"{len(job.prompt.ids)} + {event.tokens} tokens"
            say(f"{reply.number}: {tokens}, {event.why}, {took:.1f} s")
        yield event
        if isinstance(event, Done):
            return


async def _whole(incoming: AsyncIterator[Said | Done], job: Job, reply: Reply) -> Response:
    """Return an answer in one piece."""
    said: list[str] = []
    async for event in incoming:
        if isinstance(event, Done):
            tokens = counts(len(job.prompt.ids), event.tokens)
            return _json(reply.whole("".join(said), event.why, tokens))
        said.append(event.text)
    raise AssertionError("an answer ended without its end")


async def _stream(incoming: AsyncIterator[Said | Done], job: Job, reply: Reply) -> AsyncIterator[bytes]:
    """Yield an answer as it is made; what goes wrong now can only be told in the stream."""
    try:
        for chunk in reply.begin():
            yield chunk
        async for event in incoming:
            if isinstance(event, Done):
                yield reply.end(event.why, counts(len(job.prompt.ids), event.tokens))
            else:
                yield reply.part(event.text)
    except Refused as error:
        yield replies.event(error.body()) + replies.LAST
    except Gone:
        return
    finally:
        job.cancel()


def _json(told: dict[str, object], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = replies.encoded(told)
    return Response(body, status, headers, media_type="application/json")


def _unknown_model(name: str) -> Refused:
    return Refused(
        f"That model does not exist. This server has '{name}'.", "model", "model_not_found", 404
    )


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return _json(error.body(), error.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"Unknown request: {request.method} {request.url.path}."
    known = "There are GET /v1/models, POST /v1/chat/completions, POST /v1/completions and GET /health."
    refused = Refused(f"{what} {known}", code="unknown_url", status=error.status_code)
    return _json(refused.body(), error.status_code, dict(error.headers or {}))


async def _broken(_: Request, error: Exception) -> Response:
    """Answer where our own code failed; the traceback is in the server's log alone."""
    refused = Refused("The server failed.", status=500, kind="server_error")
    return _json(refused.body(), 500)
