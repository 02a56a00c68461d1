"""The frozen base with the adapters of many users: scoring, generation, hidden states, in passes that fit memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.attention import max_row_length, packed_attention
from persona_rlhf.models.base import Base
from persona_rlhf.models.fast_paths import (
    EquivalenceCheck,
    ForwardPatch,
    compiled_patch,
    handwritten_patch,
)
from persona_rlhf.models.generation import Generated, generate_answers
from persona_rlhf.models.model_split import (
    FrozenPrefix,
    HiddenStates,
    pack_states,
    split_model,
    token_logps,
    unpack_states,
)
from persona_rlhf.models.multi_lora import (
    LayerSpan,
    MultiLoRALinear,
    attach,
    detach,
    group_by_input,
    lora_matrices,
    target_layers,
)
from persona_rlhf.models.packing import EMPTY, Batch, collate, pack

PassRows = list[tuple[int, int | None]]
"""Rows of one pass as (user, number of the user's row), user-major and equally many per user; None pads."""


def run_in_passes(rows: Sequence[Sequence[Row]], budget: int, run: Callable[[PassRows], None]) -> None:
    """Calls `run` for all rows of all users, about `budget` tokens at a time.

    A pass that does not fit memory is run in halves. Long rows come first, and rows with one prompt stay together, so
    that a pass can share it. Raises torch.OutOfMemoryError where one row per user is too much.
    """
    for pass_rows in _plan_passes(rows, budget):
        _run_or_halve(pass_rows, len(rows), run)


def _run_or_halve(pass_rows: PassRows, users: int, run: Callable[[PassRows], None]) -> None:
    per_user = len(pass_rows) // users
    try:
        run(pass_rows)
        return
    except torch.OutOfMemoryError:
        if per_user == 1:
            raise
    release_cache()  # outside of the handler, which holds on to the pass that failed
    for half in (range(per_user // 2), range(per_user // 2, per_user)):
        _run_or_halve([pass_rows[user * per_user + n] for user in range(users) for n in half], users, run)


def release_cache() -> None:
    """Frees the GPU memory that torch's allocator caches, so that smaller pieces fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plan_passes(rows: Sequence[Sequence[Row]], budget: int) -> Iterator[PassRows]:
    lengths, order = [], []
    for user_rows in rows:
        longest: dict[tuple[int, ...], int] = {}  # by prompt
        for row in user_rows:
            longest[row.prompt] = max(longest.get(row.prompt, 0), len(row.prompt) + len(row.completion))
        keys = [(-longest[row.prompt], row.prompt) for row in user_rows]
        order.append(sorted(range(len(user_rows)), key=keys.__getitem__))
        lengths.append([longest[user_rows[n].prompt] for n in order[-1]])
    start, most = 0, max((len(user_rows) for user_rows in rows), default=0)
    while start < most:
        widest = max(1, *(user_lengths[start] for user_lengths in lengths if start < len(user_lengths)))
        stop = min(most, start + max(1, budget // (widest * len(rows))))
        block = range(start, stop)
        yield [(user, ns[n] if n < len(ns) else None) for user, ns in enumerate(order) for n in block]
        start = stop


class RowScore(NamedTuple):
    """Log-probability of a completion in nats, summed over its `tokens` with the end token."""

    logp: float
    tokens: int


class GreedyScore(NamedTuple):
    """A score with the greedy alternative.

    matched: how many of the completion's first tokens are the most likely ones
    next_token: the most likely token after these; None if all match
    """

    logp: float
    tokens: int
    matched: int
    next_token: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding writes exactly this completion."""
        return self.matched == self.tokens


_Value = TypeVar("_Value")


class AdaptedModel:
    """A frozen base whose linear layers hold a stack of adapters, one per user.

    A user's adapter is a flat vector of `params_per_user` numbers, laid out by `spans`. Adapters are on within `using`
    only; rows are user-major there. `notice` is a sentence on layers that cannot be adapted, None without such layers.
    """

    def __init__(self, base: Base, lora: LoraSettings) -> None:
        self.base = base
        self.scale = lora.alpha / lora.rank
        names, first, self.notice = target_layers(base.model, lora)
        self.spans = attach(base.model, names, lora.rank, self.scale)
        self._layers = [self.layer(span) for span in self.spans.values()]
        self.patch: ForwardPatch | None = None
        self._check = EquivalenceCheck(base)
        with torch.no_grad():
            group_by_input(self._layers, lambda: self._run(base.model, self._check.collated(self._check.rows)))
        self.params_per_user = max(span.stop for span in self.spans.values())
        self.tokens_per_pass = 4_096 if base.device.type == "cpu" else 131_072  # a CPU wants what its cache holds
        self.tokens_per_generation = 24_576 if base.device.type == "cpu" else 131_072  # more is no faster on a CPU
        self._equal_lines = base.device.type != "cpu"  # a GPU prefers padding to one user after the other
        self._split = split_model(base.model)
        self._prefix = FrozenPrefix(base.model, first) if first else None
        self._max_row_length = max_row_length(base.model.config.get_text_config())
        self._check.expect(self.logits)
        self.packs_rows = self._packing_is_exact()
        if not self._prefix_is_exact():
            self._prefix = None
        self.patch = self._exact_patch()

    @property
    def has_frozen_prefix(self) -> bool:
        """Whether frozen layers lie below the lowest adapted one; `prefix_states` gives their hidden states."""
        return self._prefix is not None

    @property
    def pads_users(self) -> bool:
        """Whether a step computes the same number of tokens for every user, that of the longest."""
        return self._equal_lines or not self.packs_rows

    def close(self) -> None:
        """Removes the stacked layers from the base."""
        detach(self.base.model, list(self.spans))

    def layer(self, span: LayerSpan) -> MultiLoRALinear:
        """The stacked layer of a span."""
        layer = self.base.model.get_submodule(span.name)
        assert isinstance(layer, MultiLoRALinear)
        return layer

    @contextmanager
    def using(
        self, flat: Float[Tensor, "users params"] | None, alphas: Float[Tensor, " users"] | None = None
    ) -> Iterator[None]:
        """Switches these adapters on inside, each scaled by its `alpha` (in B, as in the export); None: the base alone.

        If `flat` requires a gradient, a backward pass inside gives it one. Afterwards the outer adapters are on again.
        """
        outer = [(layer.a, layer.b) for layer in self._layers]
        inner: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(outer)
        if flat is not None:
            stacks = lora_matrices(flat, list(self.spans.values()))
            inner = [(a, b if alphas is None else b * alphas.to(b)[:, None, None]) for a, b in stacks]
        try:
            for layer, (a, b) in zip(self._layers, inner, strict=True):
                layer.a, layer.b = a, b
            yield
        finally:
            for layer, (a, b) in zip(self._layers, outer, strict=True):
                layer.a, layer.b = a, b
                layer.group.clear()

    def keep_users(self, positions: Sequence[int]) -> None:
        """Within `using`, keeps only the adapters at these positions on, in this order."""
        for layer in self._layers:
            assert layer.a is not None and layer.b is not None  # noqa: PT018
            chosen = torch.tensor(positions, device=layer.a.device)
            layer.a, layer.b = layer.a[chosen], layer.b[chosen]

    def logits(self, batch: Batch, states: Sequence[HiddenStates] = ()) -> Float[Tensor, "tokens vocabulary"]:
        """Logits at the positions that predict a completion token, and nowhere else.

        With `states` (one entry per user, see `prefix_states`) the frozen layers below the adapters are skipped.
        """
        hidden = self._hidden(batch, states)
        return self._split.head(hidden) if self._split else hidden

    def _hidden(self, batch: Batch, states: Sequence[HiddenStates]) -> Float[Tensor, "tokens hidden"]:
        """Last hidden states at the predicting positions; for a model that cannot be split, its logits."""
        if self._prefix is None or not states or not batch.row_places:
            return self._forward(batch)
        with self._prefix.start_from(pack_states(batch, states)):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Float[Tensor, "tokens hidden"]:
        if self._split is None:
            logits: Tensor = self._run(self.base.model, batch).logits
            return batch.predictors(logits.flatten(0, 1))
        hidden: Tensor = self._run(self._split.decoder, batch).last_hidden_state
        return batch.predictors(hidden.flatten(0, 1))

    def _run(self, module: nn.Module, batch: Batch) -> Any:
        with ExitStack() as inside:
            for layer in self._layers:
                layer.rows_per_user = batch.tokens_per_user
                inside.callback(layer.end_pass)
            if self.patch is not None:
                inside.enter_context(self.patch.on())
            if batch.layout is None:
                return module(input_ids=batch.input_ids, use_cache=False)
            inside.enter_context(packed_attention(self.base.model.config.get_text_config()))
            return module(
                input_ids=batch.input_ids, use_cache=False, position_ids=batch.position_ids, layout=batch.layout
            )

    @torch.no_grad()
    def prefix_states(self, rows: Sequence[Row]) -> HiddenStates:
        """Hidden states of rows at the lowest adapted layer; {} where no frozen layer lies below it.

        They depend on `rows` alone, so computing them again gives the same bits.
        """
        states: dict[Row, Tensor] = {}
        prefix, distinct = self._prefix, list(dict.fromkeys(row for row in rows if row.completion))
        if prefix is None:
            return states
        module = self._split.decoder if self._split else self.base.model

        def run(pass_rows: PassRows) -> None:
            batch = self.batch([distinct[n] for _, n in pass_rows if n is not None], 1)
            states.update(unpack_states(batch, prefix.run(lambda: self._run(module, batch))))

        run_in_passes([distinct], self.tokens_per_pass, run)
        return states

    def prefix_bytes(self, rows: Sequence[Row]) -> int:
        """Memory that `prefix_states` of rows needs, in bytes; 0 without a frozen prefix."""
        tokens = sum(len(row.prompt) + len(row.completion) for row in rows)
        config = self.base.model.config.get_text_config()
        return tokens * config.hidden_size * self.base.model.dtype.itemsize if self._prefix else 0

    def batch(self, rows: Sequence[Row], users: int) -> Batch:
        """Batch of user-major rows: packed, if that is exact for the base and the length of these rows."""
        pad, device = self.base.pad_id, self.base.device
        if self.packs_rows and max((row.length for row in rows), default=0) <= self._max_row_length:
            return pack(rows, users, pad, device, self._equal_lines)
        return collate(rows, pad, device)

    def _packing_is_exact(self) -> bool:
        """Whether packed rows give the logits of rows one by one. The config tells of windows, a check of all else."""
        pad, device = self.base.pad_id, self.base.device
        fits = self._check.longest <= self._max_row_length
        return fits and self._check.passes(lambda rows: self.logits(pack(rows, 1, pad, device)))

    def _prefix_is_exact(self) -> bool:
        """Whether the upper layers, started from the states of the lower ones, give the logits of the whole model."""
        if self._prefix is None:
            return False
        return self._check.passes(lambda rows: self.logits(self.batch(rows, 1), [self.prefix_states(rows)]))

    def _exact_patch(self) -> ForwardPatch | None:
        """Norms, rotary embeddings and the like in fewer passes over memory, if the logits stay the same.

        On a CPU there is none for 16-bit types, which would be rounded elsewhere than in the model.
        """
        model = self.base.model
        if self.base.device.type == "cuda":
            return self._if_exact(compiled_patch(model))
        return self._if_exact(handwritten_patch(model)) if model.dtype in (torch.float32, torch.float64) else None

    def _if_exact(self, patch: ForwardPatch) -> ForwardPatch | None:
        """The patch if it leaves the logits of the model unchanged; else None."""
        self.patch = patch
        batches: tuple[Callable[[list[Row]], Batch], ...] = (lambda rows: self.batch(rows, 1), self._check.collated)
        exact = all(self._check.passes(lambda rows, batch=batch: self.logits(batch(rows))) for batch in batches)  # type: ignore[misc]
        self.patch = None
        return patch if exact else None

    def row_logps(self, batch: Batch, states: Sequence[HiddenStates] = ()) -> Float[Tensor, "rows longest"]:
        """Log-probability in nats of every completion token, one row per completion, padded with zeros."""
        hidden = self._hidden(batch, states)
        logps = self._split.head.logps if self._split else token_logps
        return batch.to_grid(logps(hidden, batch.targets))

    def score(self, rows: Sequence[Sequence[Row]], states: Sequence[HiddenStates] = ()) -> list[list[RowScore]]:
        """Scores of every user's rows under the user's adapter, computed in passes of bounded size."""

        def score_batch(batch: Batch, batch_rows: Sequence[Row]) -> list[RowScore]:
            sums = self.row_logps(batch, states).double().sum(1).tolist()
            return [RowScore(logp, len(row.completion)) for logp, row in zip(sums, batch_rows, strict=True)]

        return self._map_rows(rows, score_batch)

    def score_greedy(
        self, rows: Sequence[Sequence[Row]], states: Sequence[HiddenStates] = ()
    ) -> list[list[GreedyScore]]:
        """Scores as in `score`, with the greedy alternative to each row."""

        def score_batch(batch: Batch, batch_rows: Sequence[Row]) -> list[GreedyScore]:
            logits = self.logits(batch, states)
            sums = batch.to_grid(token_logps(logits, batch.targets)).double().sum(1).tolist()
            greedy = logits.argmax(-1)
            matched = batch.to_grid((greedy == batch.targets).double()).cumprod(1).sum(1).long().tolist()
            grid = batch.to_grid(greedy.double()).long().tolist()
            tokens = [len(row.completion) for row in batch_rows]
            nexts = [ids[same] if same < n else None for ids, same, n in zip(grid, matched, tokens, strict=True)]
            return [GreedyScore(*figures) for figures in zip(sums, tokens, matched, nexts, strict=True)]

        return self._map_rows(rows, score_batch)

    @torch.no_grad()
    def _map_rows(
        self, rows: Sequence[Sequence[Row]], function: Callable[[Batch, Sequence[Row]], list[_Value]]
    ) -> list[list[_Value]]:
        """Values of `function`, one per row, computed in passes of bounded size."""
        values: list[list[_Value | None]] = [[None] * len(user_rows) for user_rows in rows]

        def run(pass_rows: PassRows) -> None:
            batch_rows = [EMPTY if n is None else rows[user][n] for user, n in pass_rows]
            batch = self.batch(batch_rows, len(rows))
            for (user, n), value in zip(pass_rows, function(batch, batch_rows), strict=True):
                if n is not None:
                    values[user][n] = value

        run_in_passes(rows, self.tokens_per_pass, run)
        return [[value for value in user_values if value is not None] for user_values in values]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[tuple[int, ...]]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[Generated]]:
        """Every user's answers to the user's prompts; temperature 0 is greedy. See `generation.generate_answers`.

        A sampled answer depends on `seed` and on the prompt's place in its user's list, not on the rest of the pass.
        """
        rows = [[Row(prompt, (0,) * max_new_tokens) for prompt in user_prompts] for user_prompts in prompts]
        answers: list[list[Generated | None]] = [[None] * len(user_prompts) for user_prompts in prompts]

        def run(pass_rows: PassRows) -> None:
            inputs = [(self.base.eos_ids[:1] if n is None else prompts[user][n]) for user, n in pass_rows]
            seeds = [None if n is None else seed * 1_000_003 + n for _, n in pass_rows]
            generated = generate_answers(self.base, len(prompts), inputs, seeds, max_new_tokens, temperature)
            for (user, n), answer in zip(pass_rows, generated, strict=True):
                if n is not None:
                    answers[user][n] = answer

        run_in_passes(rows, self.tokens_per_generation, run)
        return [[answer for answer in user_answers if answer is not None] for user_answers in answers]
