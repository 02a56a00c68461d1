"""Clients without a token, slow ones and those that leave: others are answered, and the log stays short."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from persona_rlhf.common.errors import InputError
from persona_rlhf.serving.connections import ConnectionLimits, ConnectionPool, LoopFaults
from tests.serving.live import live

HALF = b"GET /health HTTP/1.1\r\nHost: here\r\nX-Slow: "


class Site:
    """An app with a fast answer, one that waits, and one that never ends."""

    def __init__(self):
        self.waits, self.open = threading.Event(), threading.Event()
        self.app = FastAPI()
        self.app.add_api_route("/health", lambda: {"status": "ok"})
        self.app.add_api_route("/wait", self.wait)
        self.app.add_api_route("/endless", self.endless)

    def wait(self):
        self.waits.set()
        assert self.open.wait(20)

    def endless(self):
        return StreamingResponse(iter(lambda: b"x" * 65_536, None))


@pytest.fixture
def site():
    site = Site()
    yield site
    site.open.set()


def pool_of(**limits) -> ConnectionPool:
    return ConnectionPool(ConnectionLimits(**limits))


def connected(port, sent=b"", buffer=None) -> socket.socket:
    client = socket.socket()
    client.settimeout(10)
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", port))
    client.sendall(sent)
    return client


def closed(client) -> bool:
    """Whether the server closed a connection, with or without a reset."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def trickle(client, seconds=10.0):
    """Sends a byte now and then until the server closes the connection."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.sendall(b"x")
        time.sleep(0.02)


def health(port) -> int:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, trust_env=False).status_code


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("half", [b"", HALF], ids=["silent", "half a head"])
def test_silent_connections_beyond_the_limit_do_not_keep_others_out(site, log, half):
    pool = pool_of(connections=8, head_seconds=60)
    with live(site.app, log.append, pool) as port:
        silent = [connected(port, half) for _ in range(40)]
        for _ in range(20):
            assert health(port) == 200
        assert len(pool.open) <= 8
        assert all(closed(client) for client in silent[:30])
        assert pool.closed_early >= 32
        for client in silent:
            client.close()
    assert log == []


def test_a_head_that_trickles_in_ends_at_its_deadline(site):
    pool = pool_of(head_seconds=0.4)
    with live(site.app, pool=pool) as port, connected(port, HALF) as client:
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            trickle(client)
        assert 0.3 < time.monotonic() - start < 5
        until(lambda: not pool.open)


def test_after_a_response_a_trickle_does_not_hold_the_connection(site):
    """Neither the body that nobody reads, nor the head of the next request."""
    head = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with live(site.app, pool=pool_of(head_seconds=0.4)) as port, connected(port, head) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 405")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            trickle(client)


def test_a_connection_at_work_keeps_its_place_and_a_new_one_gets_503(site):
    pool = pool_of(connections=2, head_seconds=0.3)
    with live(site.app, pool=pool) as port:
        request = b"GET /wait HTTP/1.1\r\nHost: here\r\n\r\n"
        working = [connected(port, request) for _ in range(2)]
        until(lambda: len(pool.open) == 2 and not pool.waiting)
        with connected(port, b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n") as late:
            assert late.recv(4096).startswith(b"HTTP/1.1 503")
        time.sleep(0.5)  # past the deadline of a head
        site.open.set()
        for client in working:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            client.close()
        assert health(port) == 200


def test_a_response_that_nobody_reads_is_given_up(site):
    pool = pool_of(stall_seconds=0.4)
    request = b"GET /endless HTTP/1.1\r\nHost: here\r\n\r\n"
    with live(site.app, pool=pool) as port, connected(port, request, buffer=4096):
        until(lambda: len(pool.open) == 1 and not pool.waiting)
        until(lambda: not pool.open)
        assert pool.closed_early == 1


def test_a_long_head_is_refused_and_nothing_is_logged(site, log, capfd):
    with live(site.app, log.append, pool_of(head_bytes=2_000)) as port:
        for sent in (
            HALF + b"x" * 5_000,
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1x\r\n\r\n",
        ):
            with connected(port, sent) as client:
                assert client.recv(4096).startswith(b"HTTP/1.1 400")
        assert health(port) == 200
    assert log == []
    assert capfd.readouterr() == ("", "")


def test_a_server_with_waiting_connections_ends(site):
    with live(site.app, pool=pool_of(head_seconds=60)) as port:
        clients = [connected(port, half) for half in (b"", HALF) for _ in range(3)]
        assert health(port) == 200
    assert all(closed(client) for client in clients)
    for client in clients:
        client.close()


@pytest.mark.parametrize(("files", "connections"), [(resource.RLIM_INFINITY, 512), (20_000, 512), (256, 64)])
def test_connections_stay_below_the_limit_of_open_files(monkeypatch, files, connections):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert ConnectionLimits().within_files().connections == connections


def test_too_few_open_files_are_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    with pytest.raises(InputError, match="ulimit -n 1024"):
        ConnectionLimits().within_files()


def test_a_fault_of_the_loop_is_logged_once_a_minute_without_its_text():
    now, log = [0.0], []
    faults, loop = LoopFaults(log.append, lambda: now[0]), asyncio.new_event_loop()
    accept = {"message": "socket.accept() out of system resource", "exception": OSError("the words of bob")}
    for _ in range(1_000):
        faults(loop, accept)
    faults(loop, {"message": "another"})
    now[0] = 61.0
    faults(loop, accept)
    loop.close()
    line = "The event loop reports: socket.accept() out of system resource (OSError)"
    assert log == [line, "The event loop reports: another (NoneType)", line]
