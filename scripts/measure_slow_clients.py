#!/usr/bin/env python3
"""Time of an answer of `serve` while other clients hold connections and never finish a request.

python scripts/measure_slow_clients.py RUN    # 1,000 connections; 40 answers before, during and after
python scripts/measure_slow_clients.py RUN --connections 400 --answers 20

The server runs under a limit of 1,024 open files. A third of the hostile connections is silent, a third sends a byte
of a head each second, a third sends a body without a token. Each is opened again 0.1 s after the server closed it.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

SERVE = (sys.executable, "-m", "persona_rlhf", "serve")
HEADS = (
    b"",
    b"GET /health HTTP/1.1\r\nHost: here\r\nX-Slow: ",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 100000\r\n\r\n",
)


class Phase(NamedTuple):
    """Seconds of each answer, and the number of requests without one."""

    seconds: list[float]
    failed: int


async def hold(port: int, number: int) -> None:
    """One hostile connection, opened again for ever."""
    head = HEADS[number % len(HEADS)]
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            while not writer.is_closing():
                await asyncio.sleep(1)
                writer.write(b"x" if head else b"")
        except OSError:
            pass
        await asyncio.sleep(0.1)


async def attack(port: int, connections: int) -> None:
    """All hostile connections."""
    await asyncio.gather(*(hold(port, number) for number in range(connections)))


def phase(port: int, model: str, token: str, answers: int) -> Phase:
    """Answers to one request after another, each over a connection of its own."""
    seconds, failed = [], 0
    body = {"model": model, "messages": [{"role": "user", "content": "How do I boil an egg?"}], "temperature": 0}
    for _ in range(answers):
        start = time.perf_counter()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {token}"}
            client.request("POST", "/v1/chat/completions", json.dumps(body | {"max_tokens": 24}), headers)
            failed += client.getresponse().status != 200
            seconds.append(time.perf_counter() - start)
        except OSError:
            failed += 1
        finally:
            client.close()
    return Phase(seconds, failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--connections", type=int, default=1_000)
    parser.add_argument("--answers", type=int, default=40)
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.attack:
        asyncio.run(attack(asked.attack, asked.connections))
    with tempfile.TemporaryDirectory() as folder:
        options = (str(asked.run), "--tokens", str(Path(folder) / "tokens"), "--rate", "1000000")
        made = subprocess.run([*SERVE, *options, "--make-tokens"], stdout=subprocess.PIPE, text=True, check=True)
        user = json.loads(made.stdout.splitlines()[0])
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            command = [*SERVE, *options, "--port", "0"]
            server = subprocess.Popen(command, stderr=stderr, preexec_fn=limit_files)
        while "Serving" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        port = int(log.read_text().split("http://127.0.0.1:")[1].split("/")[0])
        of_start = log.stat().st_size
        phases = {"before": phase(port, user["model"], user["token"], asked.answers)}
        words = [sys.executable, __file__, str(asked.run), "--connections", str(asked.connections), "--attack"]
        attacker = subprocess.Popen([*words, str(port)])
        time.sleep(3)
        phases["during"] = phase(port, user["model"], user["token"], asked.answers)
        attacker.kill()
        attacker.wait()
        phases["after"] = phase(port, user["model"], user["token"], asked.answers)
        server.terminate()
        server.wait()
        grown = log.stat().st_size - of_start
    for name, one in phases.items():
        middle, longest = median(one.seconds) * 1000, max(one.seconds) * 1000
        print(f"{name}: median {middle:.0f} ms, longest {longest:.0f} ms, n = {asked.answers}, {one.failed} failed")
    print(f"the log grew by {grown} bytes")


def limit_files() -> None:
    """1,024 open files, the limit of many systems."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


if __name__ == "__main__":
    main()
