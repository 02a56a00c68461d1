"""A live server on loopback, in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from persona_rlhf.serving.connections import ConnectionLimits, ConnectionPool
from persona_rlhf.serving.server import bind_socket, http_server


@contextmanager
def live(app, log=print, pool: ConnectionPool | None = None) -> Iterator[int]:
    """Serves an app; yields the port."""
    with bind_socket("127.0.0.1", 0) as bound:
        server = http_server(app, log, pool or ConnectionPool(ConnectionLimits()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"
