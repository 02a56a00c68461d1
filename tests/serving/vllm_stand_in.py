#!/usr/bin/env python3
"""Stands in for vLLM: answers chat completions as a stream of events, and keeps what it was asked."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class StandIn(BaseHTTPRequestHandler):
    """`server.fault` is a status to fail with, or `half`, `nonsense` or `error`: a stream that goes wrong."""

    def do_GET(self) -> None:
        names = {"data": [{"id": name} for name in ("base", *self.server.adapters)]}
        known = self.path in ("/health", "/v1/models")
        self._answer(200 if known else 404, "application/json", json.dumps(names).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        fault = self.server.fault
        if isinstance(fault, int):
            self._answer(fault, "application/json", b'{"error": {"message": "a traceback, and the words of bob"}}')
            return
        words = [f"{self.server.mixed_up(body['model'])} ", "says ", body["messages"][-1]["content"]]
        events = [{"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in words]
        if body.get("logprobs"):
            top = [{"token": "x", "logprob": -0.5, "bytes": [120]}] * body["top_logprobs"]
            for event, word in zip(events, words, strict=True):
                content = [{"token": word, "logprob": -1.5, "bytes": None, "top_logprobs": top}]
                event["choices"][0]["logprobs"] = {"content": content}
        if fault == "error":
            events.append({"error": {"message": "the words of bob"}})
        elif fault != "half":
            events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            events.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + [": a comment\n\n", "data: [DONE]\n\n"]
        if fault == "nonsense":
            lines.insert(1, "data: {half\n\n")
        self._answer(200, "text/event-stream", "".join(lines).encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def stand_in() -> Iterator[ThreadingHTTPServer]:
    """One that runs on a free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.requests, server.fault = [], None
        server.adapters, server.mixed_up = [], lambda name: name
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":  # as the command `vllm`
    place = sys.argv[sys.argv.index("--port") + 1]
    seen = {"command": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY")}
    Path("asked.json").write_text(json.dumps(seen))
    with ThreadingHTTPServer(("127.0.0.1", int(place)), StandIn) as server:
        server.requests, server.fault = [], None
        server.mixed_up = lambda name: name
        server.adapters = [word.partition("=")[0] for word in sys.argv if "=adapters/" in word]
        server.serve_forever()
