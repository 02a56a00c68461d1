"""The chat completion request of the OpenAI API, parsed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_rlhf.data.pairs import Prompt, prompt_of
from persona_rlhf.serving.openai_api import APIError, SamplingParams

_DEFAULT_TOKENS = 256
_MOST_SEED = 2**63


class ChatRequest(NamedTuple):
    """A parsed chat completion request for `choices` answers. `with_usage`: the stream ends with its token counts."""

    model: str
    messages: Prompt
    sampling: SamplingParams
    choices: int
    with_usage: bool

    def samplings(self) -> list[SamplingParams]:
        """The sampling of each choice: a seed counts up, so that the answers differ and can be repeated."""
        seed = self.sampling.seed
        return [
            self.sampling._replace(seed=None if seed is None else (seed + number) % _MOST_SEED)
            for number in range(self.choices)
        ]


_Nothing = Annotated[list[Any], Field(max_length=0)]
_Zero = Annotated[float, Field(ge=0, le=0)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]


class _Defaults(BaseModel):
    """Parameters that may only have the value that changes nothing."""

    tools: _Nothing | None = None
    functions: _Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    response_format: _ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class _Body(_Defaults):
    """The JSON body."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1_000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=_MOST_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # These change no answer:
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


def parse(body: bytes, most_tokens: int, most_choices: int) -> ChatRequest:
    """A body as a request for at most `most_choices` answers of at most `most_tokens` tokens.

    Raises APIError (400) naming the first mistake.
    """
    try:
        fields = _Body.model_validate_json(body)
    except ValidationError as fault:
        raise _validation_error(fault) from None
    if fields.top_logprobs is not None and not fields.logprobs:
        raise _invalid("top_logprobs needs logprobs: true", "top_logprobs")
    choices = fields.n or 1
    if choices > most_choices:
        raise _invalid(f"n is {choices}; this server writes at most {most_choices} answers to a request", "n")
    sampling = SamplingParams(
        max_tokens=_most_tokens(fields, most_tokens),
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=fields.seed,
        stop=_stop(fields),
        stream=bool(fields.stream),
        logprobs=fields.top_logprobs or 0 if fields.logprobs else None,
    )
    with_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    return ChatRequest(fields.model, _messages(fields.messages), sampling, choices, with_usage)


def _most_tokens(fields: _Body, most: int) -> int:
    name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    tokens = fields.max_completion_tokens or fields.max_tokens or min(_DEFAULT_TOKENS, most)
    if tokens > most:
        raise _invalid(f"{name} is {tokens}; this server writes at most {most}", name)
    return tokens


def _stop(fields: _Body) -> tuple[str, ...]:
    stop = tuple([fields.stop] if isinstance(fields.stop, str) else fields.stop or ())
    if len(stop) > 4 or not all(0 < len(text) <= 100 for text in stop):
        raise _invalid("stop takes up to 4 texts of 1 to 100 characters", "stop")
    return stop


def _messages(values: list[dict[str, Any]]) -> Prompt:
    """The messages: `developer` is the system's role, and parts of text are joined by line breaks, as vLLM does."""
    messages = prompt_of([_message(f"messages[{index}]", value) for index, value in enumerate(values)], "messages")
    if isinstance(messages, list):
        raise _invalid(f"{messages[0].key} {messages[0].sentence}", messages[0].key)
    return messages


def _message(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if value.get(name):
            raise _invalid(f"{key}.{name} is not supported by this server; leave it out", f"{key}.{name}")
    kept = {name: value[name] for name in ("role", "content") if name in value}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if isinstance(kept.get("content"), list):
        kept["content"] = _joined_parts(f"{key}.content", kept["content"])
    return kept


def _joined_parts(key: str, parts: list[Any]) -> str:
    if not parts:
        raise _invalid(f"{key} holds no part", key)
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            sentence = f'{key}[{number}] must be {{"type": "text", "text": ...}}; this server reads text alone'
            raise _invalid(sentence, f"{key}[{number}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _validation_error(fault: ValidationError) -> APIError:
    first = fault.errors(include_url=False, include_input=False)[0]
    key = str(first["loc"][0])[:60] if first["loc"] else ""
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return _invalid(f"{key} is not supported by this server; leave it out", key)
    if not key:
        return _invalid("The body is not a JSON object of OpenAI's chat completions.", None)
    if key in _Defaults.model_fields:
        return _invalid(f"{key} may only have its default on this server; leave it out", key)
    if key == "messages" and len(first["loc"]) > 1:
        key = f"messages[{first['loc'][1]}]"
    return _invalid(f"{key}: {first['msg']}", key)


def _invalid(message: str, param: str | None) -> APIError:
    return APIError(400, message, "invalid_value", param)
