"""The frozen base with the adapters of many users: scoring, generation, hidden states, in passes that fit memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.attention import packed_attention
from persona_rlhf.models.base import Base
from persona_rlhf.models.device import device_bytes
from persona_rlhf.models.fast_paths import EquivalenceCheck, ForwardPatch, compiled_patch, handwritten_patch
from persona_rlhf.models.generation import Generated, generate_answers
from persona_rlhf.models.last_layer import LastLayerPruning, last_layer_pruning
from persona_rlhf.models.model_split import (
    FrozenPrefix,
    HiddenStates,
    OfLogits,
    max_row_length,
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
    places_of_b,
    scaled_factors,
)
from persona_rlhf.models.packing import EMPTY, Batch, RowPlace, collate, pack
from persona_rlhf.models.passes import PassRows, run_in_passes
from persona_rlhf.models.row_answers import decode_answers, stepped_logits
from persona_rlhf.models.row_decoding import CachedTokens, LayerTokens, RowCache, token_places
from persona_rlhf.models.scores import GreedyScore, RowScore, greedy_scores, logps_and_greedy
from persona_rlhf.models.target_layers import target_layers

_Value = TypeVar("_Value")

OnRows = Callable[[float, int], None]
"""Receives the rows completed since the last call, in fractions while answers are written, and rows newly begun."""


def _tokens_per_pass(device: torch.device) -> tuple[int, int]:
    """Tokens of a pass that scores and of one that generates. A pass that does not fit lowers them for good."""
    if device.type == "cpu":
        return 4_096, 24_576  # what a CPU's cache holds; more is no faster
    tokens = max(4_096, min(131_072, device_bytes(device) // _BYTES_PER_TOKEN))
    return tokens, tokens


_BYTES_PER_TOKEN = 640 << 10  # of a GPU's memory: 131,072 tokens on 80 GiB, and fewer on a smaller one


def _row_count(pass_rows: PassRows) -> int:
    return sum(n is not None for _, n in pass_rows)


class AdaptedModel:
    """A frozen base whose linear layers hold a stack of adapters, one per user.

    A user's adapter is a flat vector of `params_per_user` numbers, laid out by `spans`. Adapters are on within `using`
    only; rows are user-major there. `notice` is a sentence on layers that cannot be adapted, None without such layers.
    `on_rows` is told of rows that are scored or generated, for displays of progress.
    """

    def __init__(self, base: Base, lora: LoraSettings) -> None:
        self.base = base
        self.scale = lora.alpha / lora.rank
        names, first, self.notice = target_layers(base.model, lora)
        self.spans = attach(base.model, names, lora.rank)
        self._layers = [self.layer(span) for span in self.spans.values()]
        self.on_rows: OnRows = lambda completed, begun: None
        self.patch: ForwardPatch | None = None
        self._check = EquivalenceCheck(base)
        with torch.no_grad():
            group_by_input(self._layers, lambda: self._run(base.model, self._check.collated(self._check.rows)))
        self.params_per_user = max(span.stop for span in self.spans.values())
        self._in_b = places_of_b(list(self.spans.values())).to(base.device)
        self._factor_dtype = base.model.dtype if lora.products == "base" else torch.float32
        self.tokens_per_pass, self.tokens_per_generation = _tokens_per_pass(base.device)
        self._equal_lines = base.device.type != "cpu"  # a GPU prefers padding to one user after the other
        self._split = split_model(base.model)
        self._prefix = FrozenPrefix(base.model, first) if first else None
        self._max_row_length = max_row_length(base.model.config.get_text_config())
        self._check.expect(self.logits)
        self.packs_rows = self._packing_is_exact()
        if not self._prefix_is_exact():
            self._prefix = None
        self.patch = self._exact_patch()
        self._pruning: LastLayerPruning | None = None
        self._pruning = self._exact_pruning()
        self._steps_are_exact = self.packs_rows and self._check.passes(lambda rows: stepped_logits(self, rows))

    @property
    def has_frozen_prefix(self) -> bool:
        """Whether frozen layers lie below the lowest adapted one; `prefix_states` gives their hidden states."""
        return self._prefix is not None

    @property
    def pads_users(self) -> bool:
        """Whether a step computes the same number of tokens for every user, that of the longest."""
        return self._equal_lines or not self.packs_rows

    @property
    def products(self) -> str:
        """The type of the adapters' matrix products, by name."""
        return str(self._factor_dtype).removeprefix("torch.")

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

        `flat` may lie on any device. If it requires a gradient, a backward pass inside gives it one. Afterwards the
        outer adapters are on again.
        """
        outer = [(layer.a, layer.b) for layer in self._layers]
        inner: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(outer)
        if flat is not None:
            factors = scaled_factors(flat.to(self.base.device), self._in_b, self.scale, alphas)
            factors = factors.to(torch.float64 if flat.dtype == torch.float64 else self._factor_dtype)
            inner = [*lora_matrices(factors, list(self.spans.values()))]
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

    def logits(
        self, batch: Batch, states: Sequence[HiddenStates] = (), passed: list[LayerTokens] | None = None
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Logits at the positions that predict a completion token, and nowhere else.

        With `states` (one entry per user, see `prefix_states`) the frozen layers below the adapters are skipped. Keys
        and values of the batch in the layers that are computed are appended to `passed`.
        """
        hidden = self._hidden(batch, states, passed)
        return self._split.head(hidden) if self._split else hidden

    def by_token(
        self,
        batch: Batch,
        function: OfLogits,
        states: Sequence[HiddenStates] = (),
        passed: list[LayerTokens] | None = None,
    ) -> list[Tensor]:
        """The results of `function`, which treats tokens one by one, without all logits of `logits` in memory."""
        hidden = self._hidden(batch, states, passed)
        if self._split is None:
            return list(function(hidden, batch.targets))
        return self._split.head.by_token(hidden, batch.targets, function)

    def _hidden(
        self, batch: Batch, states: Sequence[HiddenStates], passed: list[LayerTokens] | None = None
    ) -> Float[Tensor, "tokens hidden"]:
        """Last hidden states at the predicting positions; for a model that cannot be split, its logits."""
        if self._prefix is None or not states or not batch.row_places:
            return self._forward(batch, passed)
        with self._prefix.start_from(pack_states(batch, states)):
            return self._forward(batch, passed)

    def _forward(self, batch: Batch, passed: list[LayerTokens] | None) -> Float[Tensor, "tokens hidden"]:
        widths = batch.tokens_per_user
        if passed is not None and self._pruning is not None and batch.row_places and widths is not None:
            with self._pruning.to(batch.predictors, batch.targets_per_user(len(widths))):
                return self._output(self._run(self._module, batch, passed))
        return batch.predictors(self._output(self._run(self._module, batch, passed)))

    @property
    def _module(self) -> nn.Module:
        """The decoder, or the whole model where it cannot be split."""
        return self._split.decoder if self._split else self.base.model

    def _output(self, output: Any) -> Float[Tensor, "tokens width"]:
        """Hidden states of an output of `_module`; of a whole model, logits."""
        values: Tensor = output.last_hidden_state if self._split else output.logits
        return values.flatten(0, 1)

    def _run(self, module: nn.Module, batch: Batch, passed: list[LayerTokens] | None = None) -> Any:
        if batch.layout is None:
            with self._pass(batch.tokens_per_user):
                return module(input_ids=batch.input_ids, use_cache=False)
        with self._pass(batch.tokens_per_user), packed_attention(self.base.model.config.get_text_config()):
            positions, layout = batch.position_ids, batch.layout
            inputs = {"input_ids": batch.input_ids, "position_ids": positions, "layout": layout}
            return module(use_cache=False, **inputs, **({} if passed is None else {"passed": passed}))

    @contextmanager
    def _pass(self, rows_per_user: Sequence[int] | None) -> Iterator[None]:
        """One forward pass, with so many tokens of each user."""
        with ExitStack() as inside:
            for layer in self._layers:
                layer.rows_per_user = rows_per_user
                inside.callback(layer.end_pass)
            inside.enter_context(self.patched())
            yield

    def patched(self) -> AbstractContextManager[None]:
        """Inside, the base computes by its fast equivalents, where there are any."""
        return nullcontext() if self.patch is None else self.patch.on()

    def step(
        self, tokens: Sequence[int], cache: RowCache, slots: Sequence[int], rows_per_user: Sequence[int]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits after one more token of each row; see `row_decoding`."""
        inputs = {"input_ids": torch.tensor([tokens], device=self.base.device), "position_ids": cache.begin_step(slots)}
        with self._pass(rows_per_user), packed_attention(self.base.model.config.get_text_config()):
            hidden = self._output(self._module(use_cache=False, layout=cache, **inputs))
        cache.end_step()
        return self._split.head(hidden) if self._split else hidden

    @torch.no_grad()
    def prefix_states(self, rows: Sequence[Row]) -> HiddenStates:
        """Hidden states of rows at the lowest adapted layer; {} where no frozen layer lies below it.

        They depend on `rows` alone, so computing them again gives the same bits.
        """
        states: dict[Row, Tensor] = {}
        prefix, distinct = self._prefix, list(dict.fromkeys(row for row in rows if row.completion))
        if prefix is None:
            return states

        def run(pass_rows: PassRows) -> None:
            batch = self.batch([distinct[n] for _, n in pass_rows if n is not None], 1)
            states.update(unpack_states(batch, prefix.run(lambda: self._run(self._module, batch))))

        self.tokens_per_pass = run_in_passes([distinct], self.tokens_per_pass, run)
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

    def _exact_pruning(self) -> LastLayerPruning | None:
        """A last layer that computes the predicting tokens only, for passes that are kept, if it is exact."""
        if not self.packs_rows or self._equal_lines or self._split is None:
            return None
        rows = self._check.rows
        self._pruning = last_layer_pruning(self.base.model, lambda: self._forward(self._check.collated(rows), None))
        exact = self._check.passes(lambda rows: self.logits(self.batch(rows, 1), (), []))
        return self._pruning if exact else None

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
            return greedy_scores(batch, batch_rows, *self.by_token(batch, logps_and_greedy, states))

        return self._map_rows(rows, score_batch)

    def decodes_rows(self, rows: Sequence[Sequence[Row]], max_new_tokens: int) -> bool:
        """Whether answers to the prompts of these rows can be decoded without padding; see `row_decoding`."""
        longest = max(len(row.prompt) + max(len(row.completion), max_new_tokens) for user in rows for row in user)
        return self._steps_are_exact and self.packs_rows and not self._equal_lines and longest <= self._max_row_length

    def cached_tokens(
        self, places: Sequence[RowPlace], lengths: Sequence[int], passed: Sequence[LayerTokens], from_states: bool
    ) -> list[CachedTokens]:
        """The first `lengths` tokens of rows of a pass, in every layer. Frozen ones that it skipped are run now."""
        skipped, device = list[LayerTokens](), self.base.device
        layers = [CachedTokens(tokens, token_places(places, lengths, device)) for tokens in passed]
        if self._prefix is not None and from_states:
            needed = dict[Row, int]()
            for (row, *_), length in zip(places, lengths, strict=True):
                needed[row] = max(length, needed.get(row, 0))
            begun = [row._replace(completion=row.completion[: 1 + n - len(row.prompt)]) for row, n in needed.items()]
            batch = self.batch(begun, 1)
            self._prefix.run(lambda: self._run(self._module, batch, skipped))
            of_row = dict(zip(needed, batch.row_places, strict=True))
            below = token_places([of_row[place.row] for place in places], lengths, device)
            layers = [*(CachedTokens(tokens, below) for tokens in skipped), *layers]
        return layers

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
            self.on_rows(_row_count(pass_rows), 0)

        self.on_rows(0.0, sum(map(len, rows)))
        self.tokens_per_pass = run_in_passes(rows, self.tokens_per_pass, run)
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
        if any(rows) and self.decodes_rows(rows, max_new_tokens):
            return decode_answers(self, prompts, max_new_tokens, temperature, seed)
        answers: list[list[Generated | None]] = [[None] * len(user_prompts) for user_prompts in prompts]

        def run(pass_rows: PassRows) -> None:
            inputs = [(self.base.eos_ids[:1] if n is None else prompts[user][n]) for user, n in pass_rows]
            seeds = [None if n is None else seed * 1_000_003 + n for _, n in pass_rows]
            count, steps = _row_count(pass_rows), 0

            def on_step() -> None:
                nonlocal steps
                steps += 1
                self.on_rows(count / max_new_tokens, 0)

            with self.patched():
                generated = generate_answers(
                    self.base, len(prompts), inputs, seeds, max_new_tokens, temperature, on_step
                )
            self.on_rows(count * (1 - steps / max_new_tokens), 0)
            for (user, n), answer in zip(pass_rows, generated, strict=True):
                if n is not None:
                    answers[user][n] = answer

        self.on_rows(0.0, sum(map(len, rows)))
        self.tokens_per_generation = run_in_passes(rows, self.tokens_per_generation, run)
        return [[answer for answer in user_answers if answer is not None] for user_answers in answers]
