"""What an engine is asked to write and what comes of it: one form for the built-in engine and for one far away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from persona_rlhf.preferences.messages import Prompt

Finish = Literal["stop", "length", "content_filter"]
"""Why an answer ended, in OpenAI's words: the model or a stop string; `max_tokens` or the context; the policy."""


class Wish(NamedTuple):
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


class Piece(NamedTuple):
    """Some text of an answer; the last piece says why it ended and what it took."""

    text: str
    finish: Finish | None = None
    usage: Usage | None = None


@runtime_checkable  # for beartype in the tests
class Writer(Protocol):
    """Whatever writes answers with the adapters of a run."""

    def write(self, model: str | None, messages: Prompt, wish: Wish) -> Iterator[Piece]:
        """The answer under the adapter of this slug; None is the base.

        Raises Declined at once where the request cannot be taken; the iterator raises it where the engine fails later.
        Who stops listening closes the iterator, and the writing ends.
        """
        ...


class Declined(Exception):  # noqa: N818 - an answer to the client, not a fault
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
