"""The FastAPI app of the OpenAI API: tokens, limits and admission around a text generator.

It needs the extra `serve`; no other module imports FastAPI or uvicorn.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.version import __version__
from persona_rlhf.serving.access import METRICS_READER, AdapterAccess, Limits, RateLimiter, Tokens, pseudonym
from persona_rlhf.serving.chat_request import parse
from persona_rlhf.serving.connections import ACCEPTED_AT_ONCE, ConnectionPool, LoopFaults
from persona_rlhf.serving.metrics import ServerMetrics
from persona_rlhf.serving.openai_api import (
    AdmittedAdapter,
    AnswerHead,
    APIError,
    TextGenerator,
    completion,
    events,
    internal_error,
    model_list,
    model_object,
)
from persona_rlhf.serving.policy_filter import PolicyFilter, join_chunks
from persona_rlhf.serving.watch import LifetimeWatch

_BODY_SECONDS = 30
_SPARE_THREADS = 8
_CLIENT_LEFT = 499  # nginx's status of a request whose client closed the connection
_QUEUED_CONNECTIONS = 1024  # in the kernel, before they are accepted
_FINISH_SECONDS = 120  # how long running answers may take to be read after SIGTERM

Endpoint = Callable[[Request], Awaitable[Response]]


class Gateway:
    """The HTTP endpoints: a user's token opens that user's adapter and nothing else.

    `log` receives faults, for the operators of the server.
    """

    def __init__(
        self,
        generator: TextGenerator,
        access: AdapterAccess,
        tokens: Tokens,
        log: Callable[[str], None],
        policy_filter: PolicyFilter | None = None,
        limits: Limits | None = None,
        metrics: ServerMetrics | None = None,
        watch: LifetimeWatch | None = None,
    ) -> None:
        self._generator, self._access, self._tokens, self._log = generator, access, tokens, log
        self._policy_filter, self._limits = policy_filter or PolicyFilter(), limits or Limits()
        self._metrics, self._watch = metrics or ServerMetrics(), watch
        self._rate_limiter = RateLimiter(self._limits)
        self._uploads = RateLimiter(self._limits._replace(concurrent=sys.maxsize))  # bodies that arrive at present

    def app(self) -> FastAPI:
        """The ASGI app."""
        app = FastAPI(title="persona-rlhf", openapi_url=None, docs_url=None, redoc_url=None, lifespan=self._threads)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/metrics", self._with_errors(self._figures), methods=["GET"])
        app.add_api_route("/v1/models", self._with_errors(self._models), methods=["GET"])
        app.add_api_route("/v1/models/{model}", self._with_errors(self._model), methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._with_errors(self._completions), methods=["POST"])
        app.add_exception_handler(HTTPException, _not_found)
        app.add_middleware(_CountedRequests, metrics=self._metrics)
        return app

    @asynccontextmanager
    async def _threads(self, _: FastAPI) -> AsyncIterator[None]:
        """One thread per concurrent answer, and a few for short tasks."""
        current_default_thread_limiter().total_tokens = self._limits.concurrent + _SPARE_THREADS
        yield

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _figures(self, request: Request) -> Response:
        self._rate_limiter.count(self._holder(request, of_metrics=True))
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        slug = self._holder(request)
        self._rate_limiter.count(slug)
        try:
            await run_in_threadpool(self._access.admit, slug)
        except APIError:
            return JSONResponse(model_list([]))
        return JSONResponse(model_list([slug]))

    async def _model(self, request: Request) -> Response:
        slug = self._holder(request)
        self._rate_limiter.count(slug)
        _check_model(request.path_params["model"], slug)
        await run_in_threadpool(self._access.admit, slug)
        return JSONResponse(model_object(slug))

    async def _completions(self, request: Request) -> Response:
        slug = self._holder(request)
        self._rate_limiter.count(slug)
        with self._uploads.slot(slug):
            body = await read_body(request, self._limits.body)
        chat = parse(body, self._limits.tokens, self._limits.concurrent_each)
        _check_model(chat.model, slug)
        with ExitStack() as slots:
            for number in range(chat.choices):
                if number:
                    self._rate_limiter.count(slug)
                slots.enter_context(self._rate_limiter.slot(slug))
            adapter = await run_in_threadpool(self._access.admit, slug)
            if self._watch is not None:
                self._watch.offer(adapter, chat.messages, request.state.user)
            head = AnswerHead(slug, _fingerprint(adapter), chat.sampling.logprobs is not None)
            answers = [
                await run_in_threadpool(
                    self._policy_filter.answer,
                    self._generator,
                    adapter.result.user_id,
                    adapter,
                    chat.messages,
                    sampling,
                )
                for sampling in chat.samplings()
            ]
            answers = [self._metrics.counted(request.state.user, chunks) for chunks in answers]
            if chat.sampling.stream:
                stream = events(head, answers, chat.with_usage, partial(self._log_fault, request))
                return _Events(stream, slots.pop_all())
            whole = [await run_in_threadpool(join_chunks, chunks) for chunks in answers]
            return JSONResponse(completion(head, whole))

    def _holder(self, request: Request, of_metrics: bool = False) -> str:
        """The holder of the request's token: a user, or the reader of the metrics. Raises APIError (401) else."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        slug = self._tokens.holder(token.strip()) if scheme.lower() == "bearer" else None
        if slug is None or (slug == METRICS_READER) != of_metrics:
            raise APIError(401, "Send your token: `Authorization: Bearer TOKEN`.", "invalid_api_key")
        request.state.user = pseudonym(token.strip())
        return slug

    def _with_errors(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint whose exceptions become OpenAI's error responses."""

        async def respond(request: Request) -> Response:
            try:
                return await endpoint(request)
            except APIError as error:
                return _error_response(error)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)  # for the counts; nobody reads it
            except Exception as fault:
                self._log_fault(request, fault)
                return _error_response(internal_error())

        return respond

    def _log_fault(self, request: Request, fault: Exception) -> None:
        """Logs a request's id, and type and place of its fault; the fault's message may hold users' text."""
        last = traceback.extract_tb(fault.__traceback__)[-1]
        place = f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}"
        self._log(f"Internal fault in {request.state.request_id}: {place}")


class _CountedRequests:
    """ASGI middleware: counts every response, and puts a random `x-request-id` into its header."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "user": ""}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.count_request(state["user"], scope["path"], message["status"])
            await send(message)

        await self._app(scope, receive, send_with_id)


class _Events(StreamingResponse):
    """A stream of events that frees its slot at the end, however it ends."""

    def __init__(self, stream: Iterator[bytes], slot: AbstractContextManager[object]) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            await super().__call__(scope, receive, send)


def _check_model(model: str, slug: str) -> None:
    """Raises APIError (404) for every model but the user's."""
    if not hmac.compare_digest(model.encode("utf-8", "surrogatepass"), slug.encode()):
        raise APIError(404, "There is no such model, or it is not yours.", "model_not_found", "model")


def _fingerprint(adapter: AdmittedAdapter) -> str:
    """A name of the weights and the program: with equal ones, seed and request, an engine answers the same."""
    return f"fp_{hashlib.sha256(f'{__version__} {adapter.weights_sha256}'.encode()).hexdigest()[:12]}"


async def read_body(request: Request, most: int) -> bytes:
    """The body of at most `most` bytes. Raises APIError if it is longer or does not arrive in time."""
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


def _error_response(error: APIError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.to_json(), error.status, headers)


async def _not_found(request: Request, fault: Exception) -> Response:
    status = fault.status_code if isinstance(fault, HTTPException) else 404
    return _error_response(
        APIError(status, "There is nothing here; see /v1/models and /v1/chat/completions.", "not_found")
    )


def bind_socket(host: str, port: int, option: str = "--port") -> socket.socket:
    """A bound socket that does not listen yet (port 0: any free one). Raises InputError if it cannot be bound.

    `option` is the one that names the port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as fault:
        raise _cannot_listen(host, port, option, fault) from fault
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as fault:
        bound.close()
        raise _cannot_listen(host, port, option, fault) from fault
    return bound


def _cannot_listen(host: str, port: int, option: str, fault: OSError) -> InputError:
    sentence = (
        f"cannot listen on {host}:{port} ({fault.strerror}); name another {'--host or ' * (option == '--port')}{option}"
    )
    return InputError([Problem("serve", None, option, sentence)])


class _Server(uvicorn.Server):
    """uvicorn's server, with its event loop's faults in `log` and a queue for bursts of connections."""

    def __init__(self, config: uvicorn.Config, log: Callable[[str], None]) -> None:
        super().__init__(config)
        self._log = log

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(LoopFaults(self._log))
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_QUEUED_CONNECTIONS)


def http_server(app: FastAPI, log: Callable[[str], None], pool: ConnectionPool) -> uvicorn.Server:
    """The HTTP server of an app; `run(sockets=[...])` serves until SIGTERM or SIGINT.

    Then running answers are finished, new requests refused, and the signal is passed on.
    """
    config = uvicorn.Config(
        app,
        http=pool.protocol,  # type: ignore[arg-type]
        ws="none",
        log_level="error",  # its warnings are about requests, and anybody can cause them
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=pool.limits.head_bytes,
        timeout_graceful_shutdown=_FINISH_SECONDS,
    )
    return _Server(config, log)


@contextmanager
def served_beside(
    app: FastAPI, bound: socket.socket, log: Callable[[str], None], pool: ConnectionPool
) -> Iterator[None]:
    """Serves an app in a thread for a block."""
    server = http_server(app, log, pool)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="beside")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
