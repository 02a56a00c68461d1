"""An OpenAI-style server behind the gateway (vLLM) as a writer: what it says of a fault stays here."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from persona_rlhf.apps.vllm_layout import BASE_NAME
from persona_rlhf.apps.writing import Declined, Finish, Piece, Usage, Wish
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.messages import Prompt

_TIMEOUT_SECONDS = 300.0
_COMPLETIONS = "/v1/chat/completions"


class Upstream(NamedTuple):
    """Writes with the adapters that a server at `place` has loaded (see `writing.Writer`)."""

    place: SplitResult
    key: str | None

    def write(self, model: str | None, messages: Prompt, wish: Wish) -> Iterator[Piece]:
        """See `Writer.write`."""
        connection, response = self._asked(_body(model or BASE_NAME, messages, wish))
        return _pieces(connection, response)

    def _asked(self, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = connect(self.place, _TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            connection.request("POST", self.place.path.rstrip("/") + _COMPLETIONS, json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise Declined(502, "The engine behind this server cannot be reached.", "engine_unreachable") from None
        if response.status != 200:
            response.close()
            connection.close()
            if response.status == 400:
                raise Declined(400, "The engine did not take this request; is it too long?", "invalid_value")
            raise Declined(502, "The engine behind this server failed.", "engine_failed")
        return connection, response


def upstream_place(url: str) -> SplitResult:
    """The address of an upstream. Raises InputError where it is none."""
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise InputError(
            [Problem("serve", None, "--upstream", f"`{url}` is no address; such as http://127.0.0.1:8001")]
        )
    return place


def connect(place: SplitResult, timeout: float) -> http.client.HTTPConnection:
    """A connection to a server, not opened yet."""
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    assert place.hostname is not None
    return kind(place.hostname, place.port, timeout=timeout)


def _body(model: str, messages: Prompt, wish: Wish) -> dict[str, Any]:
    """Always a stream: so a client who goes away ends the writing."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [message._asdict() for message in messages],
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},  # as in training and at the gate
    }
    if wish.stop:
        body["stop"] = list(wish.stop)
    if wish.seed is not None:
        body["seed"] = wish.seed
    return body


def _pieces(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[Piece]:
    """The events of an answer as pieces; the last one waits for the count of tokens that comes after it."""
    finish: Finish | None = None
    usage = None
    with closing(connection), response:
        try:
            for event in _events(response):
                if (counted := event.get("usage")) is not None:
                    usage = Usage(int(counted["prompt_tokens"]), int(counted["completion_tokens"]))
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield Piece(str(text))
                    if (reason := choice.get("finish_reason")) is not None:
                        finish = "length" if reason == "length" else "stop"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
            raise Declined(502, "The engine behind this server failed.", "engine_failed") from None
    if finish is None:
        raise Declined(502, "The engine behind this server ended without an end of its answer.", "engine_failed")
    yield Piece("", finish, usage)


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    for line in response:
        name, _, value = line.partition(b":")
        if name == b"data" and value.strip() == b"[DONE]":
            return
        if name == b"data":
            yield json.loads(value)
