"""Limits on the connections of the HTTP server, so that clients without a token cannot keep others out.

It needs the extra `serve`, as `server` does.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

from persona_rlhf.common.errors import InputError, Problem

ACCEPTED_AT_ONCE = 32
"""Connections that the event loop accepts in one turn, before it closes any."""

_RESERVED_FILES = 64 + 4 * ACCEPTED_AT_ONCE  # those of the process, and connections accepted but not yet counted
_REPEAT_SECONDS = 60.0
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


class ConnectionLimits(NamedTuple):
    """The limits of a server's connections.

    `connections` are open at the same time. The head of a request has at most `head_bytes`, and arrives within
    `head_seconds` of the connection or of the last response, however slowly it trickles in. A response that the client
    does not read is given up after `stall_seconds`.
    """

    connections: int = 512
    head_bytes: int = 16 << 10
    head_seconds: float = 10.0
    stall_seconds: float = 30.0

    def within_files(self) -> ConnectionLimits:
        """The limits under the process's limit of open files. Raises InputError if that leaves too few connections.

        Beyond it `accept` fails (EMFILE), and the event loop logs that failure without end.
        """
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = self.connections if files == resource.RLIM_INFINITY else files - _RESERVED_FILES
        if most < 16:
            sentence = f"the limit of open files is {files}, too low for a server; raise it: ulimit -n 1024"
            raise InputError([Problem("serve", None, None, sentence)])
        return self._replace(connections=min(self.connections, most))


class ConnectionPool:
    """The open connections of a server; `protocol` makes them, for `uvicorn.Config(http=...)`.

    At the limit, a new connection takes the place of the one that has waited longest for a request. Without a waiting
    one, the new connection gets a 503. uvicorn's `limit_concurrency` is no such limit: it counts silent connections,
    and refuses the requests of others.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: set[LimitedConnection] = set()
        self.waiting: dict[LimitedConnection, None] = {}  # no request in progress; the longest wait is first
        self.closed_early = 0

    def protocol(self, **of_uvicorn: Any) -> LimitedConnection:
        """A connection in the pool, from the arguments that uvicorn gives its protocol class."""
        return LimitedConnection(self, **of_uvicorn)


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP connection with the deadlines and the limit of its pool."""

    def __init__(self, pool: ConnectionPool, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._pool = pool
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Enters the pool, perhaps in another connection's place."""
        super().connection_made(transport)
        pool = self._pool
        if len(pool.open) >= pool.limits.connections:
            if not pool.waiting:
                pool.closed_early += 1
                transport.write(_BUSY)
                transport.close()
                return
            next(iter(pool.waiting)).drop()
        pool.open.add(self)
        self._track_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leaves the pool."""
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads; the deadline of a request's head stays."""
        super().data_received(data)
        self._track_request()

    def on_response_complete(self) -> None:
        """Waits for the next request, which may be here already."""
        super().on_response_complete()
        self._track_request()

    def pause_writing(self) -> None:
        """The client does not read: it has some seconds to go on."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._pool.limits.stall_seconds, self.drop)

    def resume_writing(self) -> None:
        """The client reads again."""
        _cancel(self._stall_timer)
        super().resume_writing()

    def drop(self) -> None:
        """Closes the connection at once, without its unread output."""
        if self in self._pool.open:
            self._pool.closed_early += 1
        self._leave()
        self.transport.abort()

    def _track_request(self) -> None:
        """Starts the deadline of a request's head when the connection begins to wait; ends it with the head."""
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._pool.waiting.pop(self, None)
            _cancel(self._head_timer)
        elif self in self._pool.open and self not in self._pool.waiting:
            self._pool.waiting[self] = None
            self._head_timer = self.loop.call_later(self._pool.limits.head_seconds, self.drop)

    def _leave(self) -> None:
        self._pool.open.discard(self)
        self._pool.waiting.pop(self, None)
        _cancel(self._head_timer)
        _cancel(self._stall_timer)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class LoopFaults:
    """The event loop's exception handler: one line for a kind of fault, and again after a minute at the earliest."""

    def __init__(self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._logged: dict[str, float] = {}

    def __call__(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs the loop's message and the type of the exception; its text may hold users' text."""
        kind = f"{context.get('message')} ({type(context.get('exception')).__name__})"
        now = self._clock()
        if now - self._logged.get(kind, -_REPEAT_SECONDS) >= _REPEAT_SECONDS:
            self._logged[kind] = now
            self._log(f"The event loop reports: {kind}")
