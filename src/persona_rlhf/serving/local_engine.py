"""The built-in text generator: a batching engine, an LRU cache of adapters and an incremental detokenizer."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.data.tokenize import ChatTokenizer, prompt_ids
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, conditions_of, load_base
from persona_rlhf.models.device import to_device
from persona_rlhf.models.generation import decode, inverse_sample, nucleus
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.release.adapter import adapter_vector
from persona_rlhf.release.compatibility import WEIGHTS
from persona_rlhf.serving.access import AdapterAccess, ServedRun
from persona_rlhf.serving.openai_api import (
    AdmittedAdapter,
    APIError,
    Finish,
    SamplingParams,
    TextChunk,
    TokenLogprob,
    Usage,
)


def sample_tokens(
    logits: Float[Tensor, "rows vocabulary"],
    sampling: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The next token of every row: the most likely one at temperature 0, else one drawn with the row's generator."""
    tokens = logits.argmax(-1)
    sampled = [row for row, params in enumerate(sampling) if params.temperature > 0]
    if not sampled:
        return tokens
    settings = torch.tensor([[sampling[row].temperature, sampling[row].top_p] for row in sampled])
    draws = torch.cat([1 - torch.rand(1, generator=generators[row], dtype=torch.float64) for row in sampled])
    settings, draws, places = to_device([settings, draws, torch.tensor(sampled)], logits.device)
    kept = nucleus(logits[places] / settings[:, :1], settings[:, 1])
    tokens[places] = inverse_sample(kept, draws)  # draws lie in (0, 1]: none selects a zero
    return tokens


_LEAST_LOGPROB = -9999.0  # of an impossible token: JSON has no -inf, and OpenAI writes this number


def token_logprob(
    logits: Float[Tensor, " vocabulary"], token: int, most: int, tokenizer: ChatTokenizer
) -> TokenLogprob:
    """A token's log-probability under these logits, and those of the `most` likeliest tokens."""
    logprobs = torch.log_softmax(logits, dim=-1).clamp(min=_LEAST_LOGPROB)
    values, ids = logprobs.topk(min(most, len(logprobs)))
    texts = [str(tokenizer.decode([one])) for one in (token, *ids.tolist())]
    return TokenLogprob(texts[0], float(logprobs[token]), tuple(zip(texts[1:], values.tolist(), strict=True)))


_REPLACEMENT = "\ufffd"  # decoded from the first bytes of an incomplete character


class StreamDecoder:
    """Incremental detokenizer with stop strings.

    The results of `add` and `end` together are the text up to the first stop string. A token is decoded with a few
    tokens before it, since its text may depend on them (the space before a word).

    `tokenizers.decoders.DecodeStream` does the same for tokenizers of that library, but raises "Invalid prefix" when
    a model with byte-fallback tokens generates bytes that are not UTF-8. This class continues after such bytes.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context, self._decoded = 0, 0  # tokens before these: not decoded again, and already in the text
        self._text, self._emitted = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token; returns the new text that is certain."""
        self._ids.append(token)
        self._decode_new(final=False)
        return self._emit(len(self._text) - self._possible_stop())

    def end(self) -> str:
        """Ends the answer; returns the rest of the text."""
        if not self.stopped:
            self._decode_new(final=True)
        return self._emit(len(self._text))

    def _decode_new(self, final: bool) -> None:
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if len(now) > len(before) and (final or not now.endswith(_REPLACEMENT)):
            length = len(self._text)
            self._text += now[len(before) :]
            self._context, self._decoded = self._decoded, len(self._ids)
            self._cut_at_stop(length)

    def _cut_at_stop(self, length: int) -> None:
        """Cuts the text before the stop string that ends first, of those that end after `length` characters."""
        starts = [(self._text.find(stop, max(0, length - len(stop) + 1)), len(stop)) for stop in self._stop]
        ends = [(start + size, start) for start, size in starts if start >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)[1]], True

    def _possible_stop(self) -> int:
        """Number of characters at the end that may begin a stop string."""
        if self.stopped:
            return 0
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)

    def _emit(self, end: int) -> str:
        new = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


WAIT_SECONDS = 0.004
"""How long the first request of a batch waits for others: less than the base takes for a token or two."""


class BatchingEngine:
    """A thread that generates answers batch by batch, each row of a batch under its own adapter.

    There is no scheduler: requests wait until the longest answer of the running batch is done.
    """

    def __init__(self, adapted: AdaptedModel, most: int = 32) -> None:
        """At most `most` answers form a batch."""
        self._adapted, self._most = adapted, most
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._next: _Job | None = None  # it did not fit into the last batch
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(
        self, adapter: Float[Tensor, " params"] | None, prompt: tuple[int, ...], sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """The chunks of an answer to `prompt` (token ids, shorter than the context); None is the base."""
        job = _Job(self._adapted, adapter, prompt, sampling)
        with self._closing:
            if self._closed:
                raise APIError(503, "The server is shutting down.", "shutting_down")
            self._queue.put(job)
        return job.listen()

    @property
    def waiting(self) -> int:
        """Answers that no batch holds yet."""
        return self._queue.qsize() + (self._next is not None)

    def close(self) -> None:
        """Finishes the requests in the queue, and ends the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._generate(batch)
            except Exception as fault:  # its requests raise it; the engine continues with the next batch
                for job in batch:
                    job.chunks.put(fault)

    def _next_batch(self) -> list[_Job]:
        """The next batch, of bounded size; empty when the engine is closed."""
        first = self._next or self._queue.get()
        self._next = None
        if first is None:
            return []
        batch, deadline = [first], time.monotonic() + WAIT_SECONDS
        while len(batch) < self._most:
            try:
                job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)  # it stays the last
                break
            if max(j.tokens for j in (*batch, job)) * (len(batch) + 1) > self._adapted.tokens_per_generation:
                self._next = job
                break
            batch.append(job)
        return batch

    @torch.inference_mode()
    def _generate(self, batch: Sequence[_Job]) -> None:
        base, device = self._adapted.base, self._adapted.base.device
        zero = torch.zeros(self._adapted.params_per_user)  # the base is the adapter that adds nothing
        flat = torch.stack([(zero if job.adapter is None else job.adapter).to(device) for job in batch])
        ends, done = set(base.eos_ids), [False] * len(batch)

        def choose(logits: Float[Tensor, "rows vocabulary"], rows: Sequence[int]) -> Tensor:
            jobs = [batch[row] for row in rows]
            tokens = sample_tokens(logits, [job.sampling for job in jobs], [job.generator for job in jobs])
            for n, job in enumerate(jobs):
                if job.sampling.logprobs is not None:
                    job.logprob = token_logprob(logits[n], int(tokens[n]), job.sampling.logprobs, base.tokenizer)
            return tokens

        with self._adapted.patched(), self._adapted.using(flat):
            for step in decode(base, len(batch), [job.prompt for job in batch], choose, done, self._adapted.keep_users):
                for row, token in zip(step.rows, step.tokens, strict=True):
                    done[row] = done[row] or batch[row].add(token, token in ends)


class _Job:
    """One request: its answer so far, and the queue through which it is returned."""

    def __init__(
        self, adapted: AdaptedModel, adapter: Tensor | None, prompt: tuple[int, ...], sampling: SamplingParams
    ) -> None:
        room = adapted.base.context - len(prompt)
        assert room > 0, "a prompt leaves room for an answer"
        self.adapter, self.prompt, self.sampling = adapter, prompt, sampling
        self.chunks: queue.SimpleQueue[TextChunk | Exception] = queue.SimpleQueue()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._most = min(sampling.max_tokens, room)
        self._decoder, self._held = StreamDecoder(adapted.base.tokenizer, sampling.stop), ""
        self.logprob: TokenLogprob | None = None  # of the next token to be added
        self._logprobs: list[TokenLogprob] = []  # of the tokens since the last chunk
        self._generated = 0
        self._cancelled = False

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of the longest possible answer."""
        return len(self.prompt) + self._most

    def add(self, token: int, ends: bool) -> bool:
        """Adds a token, which `ends` the answer or not; returns whether the answer is done."""
        if self._cancelled:
            return True
        self._generated += 1
        if not ends:
            if self.logprob is not None:
                self._logprobs.append(self.logprob)
            self._emit(self._decoder.add(token))
        finish: Finish | None = (
            "stop" if ends or self._decoder.stopped else "length" if self._generated >= self._most else None
        )
        if finish is None:
            return False
        usage = Usage(len(self.prompt), self._generated)
        self.chunks.put(TextChunk(self._held + self._decoder.end(), finish, usage, tuple(self._logprobs)))
        return True

    def _emit(self, text: str) -> None:
        if not self.sampling.stream:
            self._held += text
        elif text:
            self.chunks.put(TextChunk(text, logprobs=tuple(self._logprobs)))
            self._logprobs.clear()

    def listen(self) -> Iterator[TextChunk]:
        """The chunks as they come; closing the iterator before the last one cancels the request."""
        try:
            while True:
                chunk = self.chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            self._cancelled = True


class _Loaded(NamedTuple):
    flat: Float[Tensor, " params"]
    weights_sha256: str


class AdapterCache:
    """LRU cache of adapters in memory, limited in bytes.

    An adapter in use stays alive with its request. The newest one is kept, however small the budget.
    """

    def __init__(self, access: AdapterAccess, spans: Sequence[LayerSpan], budget: int) -> None:
        """`budget` is in bytes; adapters that `access` refuses are dropped."""
        self._spans, self._budget = list(spans), budget
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._lock = threading.Lock()
        access.on_refusal(self._drop)

    def get(self, adapter: AdmittedAdapter) -> Float[Tensor, " params"]:
        """The parameters of an admitted adapter.

        Raises APIError (403) if its file no longer has the admitted hash.
        """
        with self._lock:
            loaded = self._loaded.get(adapter.slug)
            if loaded is None or loaded.weights_sha256 != adapter.weights_sha256:
                self._loaded.pop(adapter.slug, None)
                loaded = self._loaded[adapter.slug] = _Loaded(self._read(adapter), adapter.weights_sha256)
            self._loaded.move_to_end(adapter.slug)
            while self.bytes > self._budget and len(self._loaded) > 1:
                self._loaded.popitem(last=False)
            return loaded.flat

    def _read(self, adapter: AdmittedAdapter) -> Float[Tensor, " params"]:
        try:
            weights = (adapter.folder / WEIGHTS).read_bytes()
        except OSError:
            weights = b""
        if hashlib.sha256(weights).hexdigest() != adapter.weights_sha256:
            raise APIError(403, "The adapter behind this model may not be served at present.", "adapter_not_served")
        return adapter_vector(weights, self._spans)

    def _drop(self, slug: str) -> None:
        with self._lock:
            self._loaded.pop(slug, None)

    def size(self) -> tuple[int, int]:
        """The number of loaded adapters, and their bytes."""
        with self._lock:
            return len(self._loaded), self.bytes

    @property
    def bytes(self) -> int:
        """Bytes of the loaded adapters."""
        return sum(loaded.flat.nbytes for loaded in self._loaded.values())

    @property
    def slugs(self) -> list[str]:
        """The users whose adapters are loaded, the least recently used first."""
        return list(self._loaded)


class LocalGenerator:
    """The TextGenerator over the built-in engine and a cache of adapters."""

    def __init__(self, base: Base, cache: AdapterCache, engine: BatchingEngine) -> None:
        self.base, self.cache, self.engine = base, cache, engine
        longest = max(map(len, base.tokenizer.get_vocab()))
        self._most_characters = base.context * (longest + 1)  # a token, and a space that belongs to none

    def generate(
        self, adapter: AdmittedAdapter | None, messages: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """See `TextGenerator.generate`."""
        flat = None if adapter is None else self.cache.get(adapter)
        return self.engine.generate(flat, self._prompt(messages), sampling)

    def figures(self) -> dict[str, float]:
        """Its gauges for `ServerMetrics`."""
        count, size = self.cache.size()
        return {"waiting_answers": self.engine.waiting, "adapters_in_memory": count, "adapter_bytes_in_memory": size}

    def _prompt(self, messages: Prompt) -> tuple[int, ...]:
        characters = sum(len(message.content) for message in messages)
        if characters > self._most_characters:  # before the work of tokenising it
            sentence = f"The messages have {characters} characters; the context holds {self._most_characters} at most."
            raise APIError(400, sentence, "context_length_exceeded", "messages")
        try:
            ids = prompt_ids(messages, self.base.tokenizer)
        except InputError as fault:
            raise APIError(400, fault.problems[0].sentence, "invalid_value", "messages") from None
        except jinja2.TemplateError:
            sentence = "The base's chat template rejects these messages; let user and assistant take turns."
            raise APIError(400, sentence, "invalid_value", "messages") from None
        if len(ids) >= self.base.context:
            sentence = f"The messages have {len(ids)} tokens; the context holds {self.base.context}."
            raise APIError(400, sentence, "context_length_exceeded", "messages")
        return ids


@contextmanager
def local_run(
    run: Path, base: BaseSettings, lora: LoraSettings, adapter_bytes: int, log: Callable[[str], None]
) -> Iterator[ServedRun]:
    """The built-in engine over the adapters of a run, with at most `adapter_bytes` of them in memory.

    Raises InputError if the base cannot be loaded, or the run has no results.
    """
    adapted = AdaptedModel(load_base(base), lora)
    running = conditions_of(adapted.base)._asdict() | {"products": adapted.products}
    access = AdapterAccess(run, adapted.base.weights_hash, lora, log, running=running)
    cache = AdapterCache(access, list(adapted.spans.values()), adapter_bytes)
    engine = BatchingEngine(adapted)
    try:
        generator = LocalGenerator(adapted.base, cache, engine)
        yield ServedRun(generator, access, generator.figures)
    finally:
        engine.close()
