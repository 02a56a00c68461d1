"""Answers in OpenAI's form: whole, and as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from persona_rlhf.apps.writing import Declined, Piece, Usage

OWNER = "persona-rlhf"


def model_list(slugs: Iterable[str]) -> dict[str, Any]:
    """The models that somebody may use."""
    return {"object": "list", "data": [{"id": s, "object": "model", "created": 0, "owned_by": OWNER} for s in slugs]}


def completion(model: str, piece: Piece) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": piece.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}
    return {**_head("chat.completion", model), "choices": [choice], "usage": _usage(piece.usage)}


def events(model: str, pieces: Iterable[Piece], with_usage: bool, tell: Callable[[Exception], None]) -> Iterator[bytes]:
    """Server-sent events. A fault on the way ends the stream with an event that says so, and no `[DONE]`; `tell` hears
    of one that is ours."""
    head = _head("chat.completion.chunk", model)
    yield _event(head | {"choices": [_delta({"role": "assistant", "content": ""}, None)]})
    usage = None
    try:
        for piece in pieces:
            if piece.text:
                yield _event(head | {"choices": [_delta({"content": piece.text}, None)]})
            if piece.finish is not None:
                usage = piece.usage
                yield _event(head | {"choices": [_delta({}, piece.finish)]})
    except Declined as fault:
        yield _event(fault.to_json())
        return
    except Exception as fault:
        tell(fault)
        yield _event(failed().to_json())
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": _usage(usage)})
    yield b"data: [DONE]\n\n"


def failed() -> Declined:
    """What a client hears of a fault that is ours."""
    return Declined(500, "The server failed at this request.", "internal_error")


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _delta(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    total = usage.prompt + usage.completion
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": total}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
