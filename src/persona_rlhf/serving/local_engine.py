"""Batching engine, adapter LRU cache, streaming detokenizer."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.data.tokenize import ChatTokenizer, prompt_ids
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.models.generation import decode, inverse_sample, nucleus
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.openai_api import APIError, Finish, SamplingParams, TextChunk, Usage

# ----------------------------------------------------------------------------------------------------
# The next token of every answer in a batch, each as its own request wants it.
# ----------------------------------------------------------------------------------------------------


def sample_tokens(
    logits: Float[Tensor, "rows vocabulary"], wishes: Sequence[SamplingParams], streams: Sequence[torch.Generator]
) -> Tensor:
    """A token a row: the most likely one at temperature 0, else one drawn from the row's own stream."""
    tokens = logits.argmax(-1)
    warm = [row for row, wish in enumerate(wishes) if wish.temperature > 0]
    if not warm:
        return tokens
    temperatures = torch.tensor([wishes[row].temperature for row in warm], device=logits.device)
    shares = torch.tensor([wishes[row].top_p for row in warm], device=logits.device)
    draws = torch.cat([1 - torch.rand(1, generator=streams[row], dtype=torch.float64) for row in warm])
    kept = nucleus(logits[warm] / temperatures[:, None], shares)
    tokens[warm] = inverse_sample(kept, draws.to(logits.device))  # draws lie in (0, 1]: none falls on a zero
    return tokens


# ----------------------------------------------------------------------------------------------------
# Tokens that become text as they are written: never half a character, and nothing of a stop string.
# ----------------------------------------------------------------------------------------------------

_HALF = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class StreamDecoder:
    """The text of one answer. What `add` and `end` return, put together, is the text up to the first stop string.

    Tokens are decoded with a few before them, since the text of one may depend on its neighbours (a word's space).
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # tokens decoded as neighbours, and those whose text is known
        self._text, self._told = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """One more token; the text that can be told now."""
        self._ids.append(token)
        self._take(final=False)
        return self._tell(len(self._text) - self._begun())

    def end(self) -> str:
        """No more tokens; the rest of the text."""
        if not self.stopped:
            self._take(final=True)
        return self._tell(len(self._text))

    def _take(self, final: bool) -> None:
        before = self._decoded(self._ids[self._from : self._read])
        now = self._decoded(self._ids[self._from :])
        if len(now) > len(before) and (final or not now.endswith(_HALF)):
            known = len(self._text)
            self._text += now[len(before) :]
            self._from, self._read = self._read, len(self._ids)
            self._cut(known)

    def _cut(self, known: int) -> None:
        """Ends the text before the stop string that is complete first, of those that end after `known` characters."""
        found = [(self._text.find(stop, max(0, known - len(stop) + 1)), len(stop)) for stop in self._stop]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)[1]], True

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)

    def _tell(self, upto: int) -> str:
        new = self._text[self._told : upto]
        self._told = max(self._told, upto)
        return new

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


# ----------------------------------------------------------------------------------------------------
# The built-in engine: what waits within a few milliseconds is written together, each answer under its own adapter.
# ----------------------------------------------------------------------------------------------------

WAIT_SECONDS = 0.004
"""How long the first request of a batch waits for others: less than the base takes for a token or two."""


class BatchingEngine:
    """Writes answers in a thread of its own, a batch at a time; each row of a batch has its own place in the stack.

    There is no scheduler: what comes while a batch is written waits until its longest answer is done.
    """

    def __init__(self, adapted: AdaptedModel, most: int = 32) -> None:
        """`most` answers are written at once."""
        self._adapted, self._most = adapted, most
        self._asked: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._next: _Job | None = None  # it did not fit into the last batch
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def write(
        self, adapter: Float[Tensor, " params"] | None, prompt: tuple[int, ...], wish: SamplingParams
    ) -> Iterator[TextChunk]:
        """The pieces of an answer to `prompt` (token ids, shorter than the context); None is the base."""
        job = _Job(self._adapted, adapter, prompt, wish)
        with self._closing:
            if self._closed:
                raise APIError(503, "The server is shutting down.", "shutting_down")
            self._asked.put(job)
        return job.listen()

    def close(self) -> None:
        """Writes what is asked already, and ends."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while batch := self._gathered():
            try:
                self._write(batch)
            except Exception as fault:  # it is told to whoever asked, and the next batch is another matter
                for job in batch:
                    job.pieces.put(fault)

    def _gathered(self) -> list[_Job]:
        """The next batch, of bounded size; empty where there is none to come."""
        first = self._next or self._asked.get()
        self._next = None
        if first is None:
            return []
        batch, until = [first], time.monotonic() + WAIT_SECONDS
        while len(batch) < self._most:
            try:
                job = self._asked.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._asked.put(None)  # it stays the last
                break
            if max(j.room for j in (*batch, job)) * (len(batch) + 1) > self._adapted.tokens_per_generation:
                self._next = job
                break
            batch.append(job)
        return batch

    @torch.inference_mode()
    def _write(self, batch: Sequence[_Job]) -> None:
        base, device = self._adapted.base, self._adapted.base.device
        zero = torch.zeros(self._adapted.params_per_user)  # the base is the adapter that adds nothing
        flat = torch.stack([(zero if job.adapter is None else job.adapter).to(device) for job in batch])
        ends, done = set(base.eos_ids), [False] * len(batch)

        def choose(logits: Float[Tensor, "rows vocabulary"], rows: Sequence[int]) -> Tensor:
            return sample_tokens(logits, [batch[row].wish for row in rows], [batch[row].stream for row in rows])

        with self._adapted.using(flat):
            for step in decode(base, len(batch), [job.prompt for job in batch], choose, done, self._adapted.keep_users):
                for row, token in zip(step.rows, step.tokens, strict=True):
                    done[row] = done[row] or batch[row].take(token, token in ends)


class _Job:
    """One request: what is written of it so far, and the way to whoever asked."""

    def __init__(
        self, adapted: AdaptedModel, adapter: Tensor | None, prompt: tuple[int, ...], wish: SamplingParams
    ) -> None:
        room = adapted.base.context - len(prompt)
        assert room > 0, "a prompt leaves room for an answer"
        self.adapter, self.prompt, self.wish = adapter, prompt, wish
        self.pieces: queue.SimpleQueue[TextChunk | Exception] = queue.SimpleQueue()
        self.stream = torch.Generator()
        if wish.seed is None:
            self.stream.seed()
        else:
            self.stream.manual_seed(wish.seed)
        self._most = min(wish.max_tokens, room)
        self._text, self._held = StreamDecoder(adapted.base.tokenizer, wish.stop), ""
        self._written = 0
        self._gone = False

    @property
    def room(self) -> int:
        """Tokens that it may fill."""
        return len(self.prompt) + self._most

    def take(self, token: int, ends: bool) -> bool:
        """One more token, the end of the answer where it `ends` one; whether that was the last."""
        if self._gone:
            return True
        self._written += 1
        if not ends:
            self._tell(self._text.add(token))
        finish: Finish | None = (
            "stop" if ends or self._text.stopped else "length" if self._written >= self._most else None
        )
        if finish is None:
            return False
        usage = Usage(len(self.prompt), self._written)
        self.pieces.put(TextChunk(self._held + self._text.end(), finish, usage))
        return True

    def _tell(self, text: str) -> None:
        if not self.wish.stream:
            self._held += text
        elif text:
            self.pieces.put(TextChunk(text))

    def listen(self) -> Iterator[TextChunk]:
        """The pieces as they come; whoever stops before the last takes the request back."""
        try:
            while True:
                piece = self.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self._gone = True


# ----------------------------------------------------------------------------------------------------
# Adapters in memory: loaded when they are asked for, the least used put away when the room is full.
# ----------------------------------------------------------------------------------------------------


class AdapterCache:
    """The adapters of the users who are admitted, within a budget in bytes.

    One that is being written with stays alive with its request; the newest is kept, however small the budget.
    """

    def __init__(self, admitted: AdapterAccess, spans: Sequence[LayerSpan], budget: int) -> None:
        self._admitted, self._spans, self._budget = admitted, list(spans), budget
        self._held: OrderedDict[str, Float[Tensor, " params"]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, slug: str) -> Float[Tensor, " params"]:
        """The adapter of a user. Raises Declined where it may not be served: one that was loaded goes too."""
        with self._lock:
            try:
                return self._get(slug)
            except Exception:
                self._held.pop(slug, None)
                raise

    def _get(self, slug: str) -> Float[Tensor, " params"]:
        if slug in self._held:
            self._admitted.check(slug)
        else:
            self._admitted.check(slug, again=True)
            self._held[slug] = read_adapter(self._admitted.folder(slug), self._spans)
            self._admitted.check(slug, again=True)  # what was read is what was checked, before and after
        self._held.move_to_end(slug)
        while self.bytes > self._budget and len(self._held) > 1:
            self._held.popitem(last=False)
        return self._held[slug]

    @property
    def bytes(self) -> int:
        """Bytes of the adapters that are held."""
        return sum(flat.nbytes for flat in self._held.values())

    @property
    def slugs(self) -> list[str]:
        """Whose adapters are held, the least lately used first."""
        return list(self._held)


# ----------------------------------------------------------------------------------------------------
# The built-in engine as a writer: chat messages to tokens, a slug to its adapter.
# ----------------------------------------------------------------------------------------------------


class LocalGenerator(NamedTuple):
    """Writes with the adapters of a shelf (see `writing.Writer`)."""

    base: Base
    shelf: AdapterCache
    engine: BatchingEngine

    def write(self, model: str | None, messages: Prompt, wish: SamplingParams) -> Iterator[TextChunk]:
        """See `Writer.write`."""
        adapter = None if model is None else self.shelf.get(model)
        return self.engine.write(adapter, self._prompt(messages), wish)

    def _prompt(self, messages: Prompt) -> tuple[int, ...]:
        try:
            ids = prompt_ids(messages, self.base.tokenizer)
        except InputError as fault:
            raise APIError(400, fault.problems[0].sentence, "invalid_value", "messages") from None
        except jinja2.TemplateError:
            sentence = "The base's chat template does not take these messages; let user and assistant take turns."
            raise APIError(400, sentence, "invalid_value", "messages") from None
        if len(ids) >= self.base.context:
            sentence = f"The messages have {len(ids)} tokens; the context holds {self.base.context}."
            raise APIError(400, sentence, "context_length_exceeded", "messages")
        return ids
