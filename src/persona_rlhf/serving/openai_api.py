"""Request and response types of the OpenAI API, and the TextGenerator protocol that every engine implements."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_rlhf.data.pairs import Prompt, prompt_of
from persona_rlhf.release.results import Result

Finish = Literal["stop", "length", "content_filter"]
"""The reason why an answer ended: the model or a stop string; `max_tokens` or the context; the policy."""


class AdmittedAdapter(NamedTuple):
    """An adapter that passed its request's admission check (`AdapterAccess.admit`).

    A generator may use the weights with this sha256 without another check, and no others.
    """

    result: Result
    folder: Path
    weights_sha256: str

    @property
    def slug(self) -> str:
        """The name of its user's model."""
        return self.result.slug


class SamplingParams(NamedTuple):
    """How an answer is generated.

    `temperature` 0 is greedy; `seed` None draws differently each time. With `stream` the chunks come as they are
    generated, else all text comes in one.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


class Usage(NamedTuple):
    """Tokens of the prompt and of the answer."""

    prompt: int
    completion: int


class TextChunk(NamedTuple):
    """Part of an answer's text; the last one holds the finish reason and the usage."""

    text: str
    finish: Finish | None = None
    usage: Usage | None = None


@runtime_checkable  # for beartype in the tests
class TextGenerator(Protocol):
    """An engine that generates answers with the adapters of a run."""

    def generate(
        self, adapter: AdmittedAdapter | None, messages: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """The answer under an adapter; None is the base.

        Raises APIError at once if the request cannot be accepted; the iterator raises it if the engine fails later.
        Closing the iterator cancels the generation.
        """
        ...


class APIError(Exception):
    """The error response to a request. It holds nothing of another user's and no traceback."""

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
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


OWNER = "persona-rlhf"


def model_list(slugs: Iterable[str]) -> dict[str, Any]:
    """The list of a user's models."""
    return {"object": "list", "data": [{"id": s, "object": "model", "created": 0, "owned_by": OWNER} for s in slugs]}


def completion(model: str, answer: TextChunk) -> dict[str, Any]:
    """The response with a whole answer."""
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    return {**_head("chat.completion", model), "choices": [choice], "usage": _usage(answer.usage)}


def events(
    model: str, chunks: Iterable[TextChunk], with_usage: bool, log: Callable[[Exception], None]
) -> Iterator[bytes]:
    """The server-sent events of a streamed answer.

    A fault ends the stream with an error event and without `[DONE]`; internal ones go to `log`.
    """
    head = _head("chat.completion.chunk", model)
    yield _event(head | {"choices": [_delta({"role": "assistant", "content": ""}, None)]})
    usage = None
    try:
        for chunk in chunks:
            if chunk.text:
                yield _event(head | {"choices": [_delta({"content": chunk.text}, None)]})
            if chunk.finish is not None:
                usage = chunk.usage
                yield _event(head | {"choices": [_delta({}, chunk.finish)]})
    except APIError as fault:
        yield _event(fault.to_json())
        return
    except Exception as fault:
        log(fault)
        yield _event(internal_error().to_json())
        return
    if with_usage:
        yield _event(head | {"choices": [], "usage": _usage(usage)})
    yield b"data: [DONE]\n\n"


def internal_error() -> APIError:
    """The response to a request that an internal fault ended."""
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


_DEFAULT_TOKENS = 256


class ChatRequest(NamedTuple):
    """A parsed chat completion request. `with_usage`: the stream ends with its token counts."""

    model: str
    messages: Prompt
    sampling: SamplingParams
    with_usage: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class _Body(BaseModel):
    """The JSON body. Unsupported parameters may only have the value that changes nothing."""

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
    """A body as a request for at most `most_tokens` tokens. Raises APIError (400) naming the first mistake."""
    try:
        fields = _Body.model_validate_json(body)
    except ValidationError as fault:
        raise _validation_error(fault) from None
    messages = prompt_of(fields.messages)
    if isinstance(messages, list):
        raise _invalid(f"{messages[0].key} {messages[0].sentence}", "messages")
    stop = tuple([fields.stop] if isinstance(fields.stop, str) else fields.stop or ())
    if len(stop) > 4 or not all(0 < len(text) <= 100 for text in stop):
        raise _invalid("stop takes up to 4 texts of 1 to 100 characters", "stop")
    tokens = fields.max_completion_tokens or fields.max_tokens or min(_DEFAULT_TOKENS, most_tokens)
    if tokens > most_tokens:
        raise _invalid(f"max_tokens is {tokens}; this server writes at most {most_tokens}", "max_tokens")
    sampling = SamplingParams(
        max_tokens=tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=fields.seed,
        stop=stop,
        stream=bool(fields.stream),
    )
    return ChatRequest(
        fields.model, messages, sampling, bool(fields.stream_options and fields.stream_options.include_usage)
    )


def _validation_error(fault: ValidationError) -> APIError:
    first = fault.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return _invalid(f"{key[:60]} is not supported by this server; leave it out", key[:60])
    if not key:
        return _invalid("The body is not a JSON object of OpenAI's chat completions.", None)
    return _invalid(f"{key}: {first['msg']}", key)


def _invalid(message: str, param: str | None) -> APIError:
    return APIError(400, message, "invalid_value", param)
