"""The body of a chat completion in OpenAI's form: what is taken from it, and what is wrong with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_rlhf.apps.writing import Declined, Wish
from persona_rlhf.preferences.messages import Prompt, prompt_of

_DEFAULT_TOKENS = 256


class ChatRequest(NamedTuple):
    """A request that can be answered. `with_usage`: the stream is to end with the tokens it took."""

    model: str
    messages: Prompt
    wish: Wish
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
    wish = Wish(
        max_tokens=tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=stop,
        stream=bool(asked.stream),
    )
    return ChatRequest(asked.model, messages, wish, bool(asked.stream_options and asked.stream_options.include_usage))


def _declined(fault: ValidationError) -> Declined:
    first = fault.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return _wrong(f"{key[:60]} is not supported by this server; leave it out", key[:60])
    if not key:
        return _wrong("The body is not a JSON object of OpenAI's chat completions.", None)
    return _wrong(f"{key}: {first['msg']}", key)


def _wrong(message: str, param: str | None) -> Declined:
    return Declined(400, message, "invalid_value", param)
