"""The built-in engine: what waits within a few milliseconds is written together, each answer under its own adapter."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.apps.sampling import pick
from persona_rlhf.apps.unfolding import Unfolding
from persona_rlhf.apps.writing import Declined, Finish, Piece, Usage, Wish
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.generation import decode

WAIT_SECONDS = 0.004
"""How long the first request of a batch waits for others: less than the base takes for a token or two."""


class Engine:
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

    def write(self, adapter: Float[Tensor, " params"] | None, prompt: tuple[int, ...], wish: Wish) -> Iterator[Piece]:
        """The pieces of an answer to `prompt` (token ids, shorter than the context); None is the base."""
        job = _Job(self._adapted, adapter, prompt, wish)
        with self._closing:
            if self._closed:
                raise Declined(503, "The server is shutting down.", "shutting_down")
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
            if max(j.room for j in (*batch, job)) * (len(batch) + 1) > self._adapted.tokens_per_cache:
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
            return pick(logits, [batch[row].wish for row in rows], [batch[row].stream for row in rows])

        with self._adapted.using(flat):
            for step in decode(base, len(batch), [job.prompt for job in batch], choose, done, self._adapted.keep):
                for row, token in zip(step.rows, step.tokens, strict=True):
                    done[row] = done[row] or batch[row].take(token, token in ends)


class _Job:
    """One request: what is written of it so far, and the way to whoever asked."""

    def __init__(self, adapted: AdaptedModel, adapter: Tensor | None, prompt: tuple[int, ...], wish: Wish) -> None:
        room = adapted.base.context - len(prompt)
        assert room > 0, "a prompt leaves room for an answer"
        self.adapter, self.prompt, self.wish = adapter, prompt, wish
        self.pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self.stream = torch.Generator()
        if wish.seed is None:
            self.stream.seed()
        else:
            self.stream.manual_seed(wish.seed)
        self._most = min(wish.max_tokens, room)
        self._text, self._held = Unfolding(adapted.base.tokenizer, wish.stop), ""
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
        self.pieces.put(Piece(self._held + self._text.end(), finish, usage))
        return True

    def _tell(self, text: str) -> None:
        if not self.wish.stream:
            self._held += text
        elif text:
            self.pieces.put(Piece(text))

    def listen(self) -> Iterator[Piece]:
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
