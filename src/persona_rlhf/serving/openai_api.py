"""Responses of the OpenAI API, types of a generated answer, and the TextGenerator protocol that engines implement."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from persona_rlhf.data.pairs import Prompt
from persona_rlhf.release.results import Result

Finish = Literal["stop", "length", "content_filter"]
"""The reason why an answer ended: the model or a stop string; `max_tokens` or the context; the policy."""


Filtered = Literal["redirect", "base", "fallback"]
"""The text in place of the adapter's answer: a redirect of the policy, the base's answer, or a fixed sentence."""


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
    generated, else all text comes in one. `logprobs` is the number of alternatives to each token that come with its
    log-probability; None is no log-probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    logprobs: int | None = None


class Usage(NamedTuple):
    """Tokens of the prompt and of the answer."""

    prompt: int
    completion: int


class TokenLogprob(NamedTuple):
    """A token's text, its natural log-probability at temperature 1, and the most likely tokens in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class TextChunk(NamedTuple):
    """Part of an answer's text; the last one holds the finish reason and the usage.

    `logprobs` are those of the tokens since the last chunk, without the end token; empty if they were not requested.
    The last chunk of an answer that the policy replaced says by which text (`filtered`).
    """

    text: str
    finish: Finish | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    filtered: Filtered | None = None


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


def model_object(slug: str) -> dict[str, Any]:
    """A user's model."""
    return {"id": slug, "object": "model", "created": 0, "owned_by": OWNER}


def model_list(slugs: Iterable[str]) -> dict[str, Any]:
    """The list of a user's models."""
    return {"object": "list", "data": [model_object(slug) for slug in slugs]}


class AnswerHead(NamedTuple):
    """The model of a response, the fingerprint of its weights, and whether log-probabilities were requested."""

    model: str
    fingerprint: str
    with_logprobs: bool = False

    def to_json(self, kind: str) -> dict[str, Any]:
        """The keys that all objects of a response share; each call makes another id."""
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def logprobs(self, chunk: TextChunk) -> dict[str, Any] | None:
        """The log-probabilities of a choice."""
        if not self.with_logprobs:
            return None
        content = [
            _logprob(one.token, one.logprob) | {"top_logprobs": [_logprob(*top) for top in one.top]}
            for one in chunk.logprobs
        ]
        return {"content": content, "refusal": None}


def completion(head: AnswerHead, answers: Sequence[TextChunk]) -> dict[str, Any]:
    """The response with whole answers, one a choice."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": head.logprobs(answer),
            "finish_reason": answer.finish,
        }
        for index, answer in enumerate(answers)
    ]
    return {**head.to_json("chat.completion"), "choices": choices, "usage": _usage([one.usage for one in answers])}


def events(
    head: AnswerHead, answers: Sequence[Iterator[TextChunk]], with_usage: bool, log: Callable[[Exception], None]
) -> Iterator[bytes]:
    """The server-sent events of streamed answers, one a choice.

    A fault ends the stream with an error event and without `[DONE]`; internal ones go to `log`.
    """
    start = head.to_json("chat.completion.chunk") | ({"usage": None} if with_usage else {})

    def event(index: int, delta: dict[str, str], chunk: TextChunk, finish: Finish | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": head.logprobs(chunk), "finish_reason": finish}
        return _event(start | {"choices": [choice]})

    for index in range(len(answers)):
        yield event(index, {"role": "assistant", "content": ""}, TextChunk(""))
    usages = []
    try:
        for index, chunk in interleaved(answers):
            if chunk.text or chunk.logprobs:
                yield event(index, {"content": chunk.text}, chunk)
            if chunk.finish is not None:
                usages.append(chunk.usage)
                yield event(index, {}, TextChunk(""), chunk.finish)
    except APIError as fault:
        yield _event(fault.to_json())
        return
    except Exception as fault:
        log(fault)
        yield _event(internal_error().to_json())
        return
    if with_usage:
        yield _event(start | {"choices": [], "usage": _usage(usages)})
    yield b"data: [DONE]\n\n"


def interleaved(answers: Sequence[Iterator[TextChunk]]) -> Iterator[tuple[int, TextChunk]]:
    """The chunks of several answers in turns, each with the number of its answer, until all have ended."""
    running = dict(enumerate(answers))
    while running:
        for index, chunks in list(running.items()):
            chunk = next(chunks, None)
            if chunk is None or chunk.finish is not None:
                del running[index]
            if chunk is not None:
                yield index, chunk


def internal_error() -> APIError:
    """The response to a request that an internal fault ended."""
    return APIError(500, "The server failed at this request.", "internal_error")


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    """A token in OpenAI's form; part of a character has no bytes of its own."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}


def _usage(usages: Sequence[Usage | None]) -> dict[str, int] | None:
    """The tokens of a request: its prompt once, and all its answers."""
    counted = [usage for usage in usages if usage is not None]
    if not counted:
        return None
    prompt, written = max(one.prompt for one in counted), sum(one.completion for one in counted)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
