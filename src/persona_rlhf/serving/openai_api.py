"""Request/response types of the OpenAI API; the TextGenerator protocol."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_rlhf.data.pairs import Prompt, prompt_of

# ----------------------------------------------------------------------------------------------------
# What an engine is asked to write and what comes of it: one form for the built-in engine and for one far away.
# ----------------------------------------------------------------------------------------------------

Finish = Literal["stop", "length", "content_filter"]
"""Why an answer ended, in OpenAI's words: the model or a stop string; `max_tokens` or the context; the policy."""


class SamplingParams(NamedTuple):
    """How an answer is to be written. `temperature` 0 is greedy; `seed` None draws anew each time; with `stream` the
    pieces come as they are written, else all at once."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


class Usage(NamedTuple):
    """Tokens read and written."""

    prompt: int
    completion: int


class TextChunk(NamedTuple):
    """Some text of an answer; the last piece says why it ended and what it took."""

    text: str
    finish: Finish | None = None
    usage: Usage | None = None


@runtime_checkable  # for beartype in the tests
class TextGenerator(Protocol):
    """Whatever writes answers with the adapters of a run."""

    def write(self, model: str | None, messages: Prompt, wish: SamplingParams) -> Iterator[TextChunk]:
        """The answer under the adapter of this slug; None is the base.

        Raises Declined at once where the request cannot be taken; the iterator raises it where the engine fails later.
        Who stops listening closes the iterator, and the writing ends.
        """
        ...


class APIError(Exception):
    """A request that is not answered, in OpenAI's form: nothing in it comes from another user or from a traceback."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def to_json(self) -> dict[str, object]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# ----------------------------------------------------------------------------------------------------
# Answers in OpenAI's form: whole, and as the events of a stream.
# ----------------------------------------------------------------------------------------------------

OWNER = "persona-rlhf"


def model_list(slugs: Iterable[str]) -> dict[str, Any]:
    """The models that somebody may use."""
    return {"object": "list", "data": [{"id": s, "object": "model", "created": 0, "owned_by": OWNER} for s in slugs]}


def completion(model: str, piece: TextChunk) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": piece.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}
    return {**_head("chat.completion", model), "choices": [choice], "usage": _usage(piece.usage)}


def events(
    model: str, pieces: Iterable[TextChunk], with_usage: bool, tell: Callable[[Exception], None]
) -> Iterator[bytes]:
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
    except APIError as fault:
        yield _event(fault.to_json())
        return
    except Exception as fault:
        tell(fault)
        yield _event(failed().to_json())
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": _usage(usage)})
    yield b"data: [DONE]\n\n"


def failed() -> APIError:
    """What a client hears of a fault that is ours."""
    return APIError(500, "The server failed at this request.", "internal_error")


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


# ----------------------------------------------------------------------------------------------------
# The body of a chat completion in OpenAI's form: what is taken from it, and what is wrong with it.
# ----------------------------------------------------------------------------------------------------

_DEFAULT_TOKENS = 256


class ChatRequest(NamedTuple):
    """A request that can be answered. `with_usage`: the stream is to end with the tokens it took."""

    model: str
    messages: Prompt
    wish: SamplingParams
    with_usage: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class _Body(BaseModel):
    """What would change the answer and is not done here may only have the value that changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


def parse(body: bytes, most_tokens: int) -> ChatRequest:
    """A body as a request for at most `most_tokens` tokens. Raises Declined (400) naming the first thing wrong."""
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as fault:
        raise _declined(fault) from None
    messages = prompt_of(asked.messages)
    if isinstance(messages, list):
        raise _wrong(f"{messages[0].key} {messages[0].sentence}", "messages")
    stop = tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ())
    if len(stop) > 4 or not all(0 < len(text) <= 100 for text in stop):
        raise _wrong("stop takes up to 4 texts of 1 to 100 characters", "stop")
    tokens = asked.max_completion_tokens or asked.max_tokens or min(_DEFAULT_TOKENS, most_tokens)
    if tokens > most_tokens:
        raise _wrong(f"max_tokens is {tokens}; this server writes at most {most_tokens}", "max_tokens")
    wish = SamplingParams(
        max_tokens=tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=stop,
        stream=bool(asked.stream),
    )
    return ChatRequest(asked.model, messages, wish, bool(asked.stream_options and asked.stream_options.include_usage))


def _declined(fault: ValidationError) -> APIError:
    first = fault.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return _wrong(f"{key[:60]} is not supported by this server; leave it out", key[:60])
    if not key:
        return _wrong("The body is not a JSON object of OpenAI's chat completions.", None)
    return _wrong(f"{key}: {first['msg']}", key)


def _wrong(message: str, param: str | None) -> APIError:
    return APIError(400, message, "invalid_value", param)
