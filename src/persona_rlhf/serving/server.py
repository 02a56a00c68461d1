"""The HTTP server in OpenAI's form. It knows tokens, limits and the policy; a writer that it is given answers.

Needs the extra `serve`: nothing else imports FastAPI or uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.serving.access import AdapterAccess, Limits, RateLimiter, Tokens
from persona_rlhf.serving.openai_api import APIError, TextGenerator, completion, events, failed, model_list, parse
from persona_rlhf.serving.policy_filter import PolicyFilter, together

_BODY_SECONDS = 30
_SPARE_THREADS = 8
_FINISH_SECONDS = 120  # what runs at the end may take so long to be read

Endpoint = Callable[[Request], Awaitable[Response]]


class Gateway:
    """One door for all users: each comes in with his token, and reaches his own adapter and nothing else.

    `tell` hears of faults, for the people who run the server.
    """

    def __init__(
        self,
        writer: TextGenerator,
        admitted: AdapterAccess,
        tokens: Tokens,
        tell: Callable[[str], None],
        guard: PolicyFilter | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._writer, self._admitted, self._tokens, self._tell = writer, admitted, tokens, tell
        self._guard, self._limits = guard or PolicyFilter(), limits or Limits()
        self._turnstile = RateLimiter(self._limits)

    def app(self) -> FastAPI:
        """The server, to be run by uvicorn."""
        app = FastAPI(title="persona-rlhf", openapi_url=None, docs_url=None, redoc_url=None, lifespan=self._threads)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/v1/models", self._answered(self._models), methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._answered(self._completions), methods=["POST"])
        app.add_exception_handler(HTTPException, _no_such_place)
        return app

    @asynccontextmanager
    async def _threads(self, _: FastAPI) -> AsyncIterator[None]:
        """A thread for every answer that is waited for, and some for what is quickly done."""
        current_default_thread_limiter().total_tokens = self._limits.concurrent + _SPARE_THREADS
        yield

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _models(self, request: Request) -> Response:
        slug = self._holder(request)
        self._turnstile.count(slug)
        try:
            await run_in_threadpool(self._admitted.check, slug)
        except APIError:
            return JSONResponse(model_list([]))
        return JSONResponse(model_list([slug]))

    async def _completions(self, request: Request) -> Response:
        slug = self._holder(request)
        self._turnstile.count(slug)
        asked = parse(await _body(request, self._limits.body), self._limits.tokens)
        if not hmac.compare_digest(asked.model.encode("utf-8", "surrogatepass"), slug.encode()):
            raise APIError(404, "There is no such model, or it is not yours.", "model_not_found", "model")
        with ExitStack() as place:
            place.enter_context(self._turnstile.inside(slug))
            user = await run_in_threadpool(self._admitted.check, slug)
            pieces = await run_in_threadpool(
                self._guard.answer, self._writer, user.user_id, slug, asked.messages, asked.wish
            )
            if asked.wish.stream:
                return _Events(events(slug, pieces, asked.with_usage, self._tell_fault), place.pop_all())
            return JSONResponse(completion(slug, await run_in_threadpool(together, pieces)))

    def _holder(self, request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        slug = self._tokens.holder(token.strip()) if scheme.lower() == "bearer" else None
        if slug is None:
            raise APIError(401, "Send your token: `Authorization: Bearer TOKEN`.", "invalid_api_key")
        return slug

    def _answered(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint that answers in OpenAI's form whatever happens."""

        async def answered(request: Request) -> Response:
            try:
                return await endpoint(request)
            except APIError as declined:
                return _error(declined)
            except Exception as fault:
                self._tell_fault(fault)
                return _error(failed())

        return answered

    def _tell_fault(self, fault: Exception) -> None:
        """Where it happened, not with what: messages of faults may hold what users wrote."""
        last = traceback.extract_tb(fault.__traceback__)[-1]
        self._tell(f"Internal fault: {type(fault).__name__} at {Path(last.filename).name}:{last.lineno}")


class _Events(StreamingResponse):
    """A stream of events that gives its place back at the end, however it ends."""

    def __init__(self, stream: Iterator[bytes], place: AbstractContextManager[object]) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than `most` bytes. Raises Declined where it is longer, or does not come."""
    too_long = APIError(413, f"The body is longer than {most} bytes.", "request_too_large")
    if int(request.headers.get("content-length") or 0) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
    except TimeoutError:
        raise APIError(408, f"The body did not come within {_BODY_SECONDS} seconds.", "request_timeout") from None
    return bytes(body)


def _error(declined: APIError) -> JSONResponse:
    headers = {}
    if declined.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if declined.retry_after is not None:
        headers["Retry-After"] = str(declined.retry_after)
    if declined.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(declined.to_json(), declined.status, headers)


async def _no_such_place(request: Request, fault: Exception) -> Response:
    status = fault.status_code if isinstance(fault, HTTPException) else 404
    return _error(APIError(status, "There is nothing here; see /v1/models and /v1/chat/completions.", "not_found"))


def listening(host: str, port: int) -> socket.socket:
    """A socket at this place (port 0: any free one), not open yet. Raises InputError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as fault:
        raise _not_listening(host, port, fault) from fault
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as fault:
        found.close()
        raise _not_listening(host, port, fault) from fault
    return found


def _not_listening(host: str, port: int, fault: OSError) -> InputError:
    sentence = f"cannot listen on {host}:{port} ({fault.strerror}); name another --host or --port"
    return InputError([Problem("serve", None, "--port", sentence)])


def run_until_stopped(app: FastAPI, place: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT: then nothing new is taken, what runs is finished, and the signal is passed on."""
    config = uvicorn.Config(
        app,
        http="h11",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FINISH_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[place])
