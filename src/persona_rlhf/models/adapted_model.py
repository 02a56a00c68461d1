"""Base + the adapters of many users: score, generate, hidden states, OOM halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.attention import packed, window
from persona_rlhf.models.base import Base
from persona_rlhf.models.fast_paths import (
    EquivalenceCheck,
    ForwardPatch,
    LastLayerPruning,
    compiled,
    narrowing,
    written_down,
)
from persona_rlhf.models.generation import Generated, write_answers
from persona_rlhf.models.model_split import FrozenPrefix, States, cut, lay, split_model, token_logps
from persona_rlhf.models.multi_lora import FleetLinear, LayerSpan, attach, detach, join, matrices, targets
from persona_rlhf.models.packing import EMPTY, Batch, collate, pack

# ----------------------------------------------------------------------------------------------------
# Passes of bounded size over the rows of many users, and what becomes of one that the device has no memory for.
# ----------------------------------------------------------------------------------------------------

Places = list[tuple[int, int | None]]
"""User-major (user, place of the row), equally many rows a user; None fills."""


def in_passes(rows: Sequence[Sequence[Row]], budget: int, run: Callable[[Places], None]) -> None:
    """Runs over all rows, about `budget` tokens at a time; a pass that does not fit is run in halves.

    Longest first, but rows with the same prompt stay side by side, so that a pass can share it. Raises
    torch.OutOfMemoryError where one row a user is too much.
    """
    for places in _passes(rows, budget):
        _in_halves(places, len(rows), run)


def _in_halves(places: Places, users: int, run: Callable[[Places], None]) -> None:
    each = len(places) // users
    try:
        run(places)
        return
    except torch.OutOfMemoryError:
        if each == 1:
            raise
    release_cache()  # out of the handler, which holds on to the pass that failed
    for part in (range(each // 2), range(each // 2, each)):
        _in_halves([places[user * each + n] for user in range(users) for n in part], users, run)


def release_cache() -> None:
    """Gives back what the allocator keeps for a GPU, so that smaller pieces fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _passes(rows: Sequence[Sequence[Row]], budget: int) -> Iterator[Places]:
    lengths, order = [], []
    for own in rows:
        longest: dict[tuple[int, ...], int] = {}
        for row in own:
            longest[row.prompt] = max(longest.get(row.prompt, 0), len(row.prompt) + len(row.completion))
        order.append(sorted(range(len(own)), key=lambda n, own=own, of=longest: (-of[own[n].prompt], own[n].prompt)))  # type: ignore[misc]
        lengths.append([longest[own[n].prompt] for n in order[-1]])
    start, most = 0, max((len(own) for own in rows), default=0)
    while start < most:
        widest = max(1, *(own[start] for own in lengths if start < len(own)))
        stop = min(most, start + max(1, budget // (widest * len(rows))))
        block = range(start, stop)
        yield [(user, own[n] if n < len(own) else None) for user, own in enumerate(order) for n in block]
        start = stop


# ----------------------------------------------------------------------------------------------------
# What the model says of a completion: how likely it is, and what it would have said instead.
# ----------------------------------------------------------------------------------------------------


class RowScore(NamedTuple):
    """`logp`: log-probability of a completion in nats, summed to its end token; `tokens`: its length."""

    logp: float
    tokens: int


class GreedyScore(NamedTuple):
    """A score, and what the model would have said: of how many of the completion's first tokens each is the most likely
    one (`agreed`), and the most likely one after these (`instead`; None: no more)."""

    logp: float
    tokens: int
    agreed: int
    instead: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding writes exactly this completion."""
        return self.agreed == self.tokens


# ----------------------------------------------------------------------------------------------------
# The base with the adapters of many users switched on at once: scores completions and writes answers for all.
# ----------------------------------------------------------------------------------------------------

_Found = TypeVar("_Found")
_Shortcut = TypeVar("_Shortcut")


class AdaptedModel:
    """A frozen base whose linear layers hold a stack of adapters, one a user.

    The flat state `[users, params]` is laid out by `spans`. Nothing is on until `using`; then rows are user-major.
    `notice` names what of the base cannot be adapted, for people; None where that is nothing.
    """

    def __init__(self, base: Base, lora: LoraSettings) -> None:
        self.base = base
        self.scale = lora.alpha / lora.rank
        names, first, self.notice = targets(base.model, lora)
        self.spans = attach(base.model, names, lora.rank, self.scale)
        self._layers = [self.layer(span) for span in self.spans.values()]
        self.quicker: ForwardPatch | None = None
        self._narrowing: LastLayerPruning | None = None
        self._trial = EquivalenceCheck(base)
        with torch.no_grad():
            join(self._layers, lambda: self._run(base.model, self._trial.collated(self._trial.rows)))
        self.params_per_user = max(span.stop for span in self.spans.values())
        self.tokens_per_pass = 4_096 if base.device.type == "cpu" else 131_072  # a CPU wants what its cache holds
        self.tokens_per_cache = 24_576 if base.device.type == "cpu" else 131_072  # more is no faster on a CPU
        self._even = base.device.type != "cpu"  # a GPU would rather compute some padding than one user after the other
        self._halves = split_model(base.model)
        self._trunk = FrozenPrefix(base.model, first) if first else None
        self._window = window(base.model.config.get_text_config())
        self._trial.expect(self.logits)
        self.packs = self._can_pack()
        if not self._can_start_above():
            self._trunk = None
        self.quicker = self._if_exact("quicker", self._quicker())
        self._narrowing = self._if_exact("_narrowing", self._narrowed())

    @property
    def starts_above(self) -> bool:
        """Whether frozen layers lie below the first adapted one, whose states `below` gives."""
        return self._trunk is not None

    @property
    def pads(self) -> bool:
        """Whether a step computes every user's tokens at the length of the longest one's."""
        return self._even or not self.packs

    def close(self) -> None:
        """Gives the base back as it was."""
        detach(self.base.model, list(self.spans))

    def layer(self, span: LayerSpan) -> FleetLinear:
        """The stacked layer that lies at `span`."""
        layer = self.base.model.get_submodule(span.name)
        assert isinstance(layer, FleetLinear)
        return layer

    @contextmanager
    def using(
        self, flat: Float[Tensor, "users params"] | None, alphas: Float[Tensor, " users"] | None = None
    ) -> Iterator[None]:
        """Switches these adapters on, each at its own `alpha` (folded into B, as the export does); None: the base.

        Where `flat` requires a gradient, a backward pass inside gives it one. After it, all is as it was before.
        """
        outer = [(layer.a, layer.b) for layer in self._layers]
        inner: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(outer)
        if flat is not None:
            stacks = matrices(flat, list(self.spans.values()))
            inner = [(a, b if alphas is None else b * alphas.to(b)[:, None, None]) for a, b in stacks]
        try:
            for layer, (a, b) in zip(self._layers, inner, strict=True):
                layer.a, layer.b = a, b
            yield
        finally:
            for layer, (a, b) in zip(self._layers, outer, strict=True):
                layer.a, layer.b = a, b
                layer.siblings.forget()

    def keep(self, users: Sequence[int]) -> None:
        """Within `using`: of the adapters that are on, those at these places stay, in this order."""
        for layer in self._layers:
            assert layer.a is not None and layer.b is not None  # noqa: PT018
            chosen = torch.tensor(users, device=layer.a.device)
            layer.a, layer.b = layer.a[chosen], layer.b[chosen]

    def logits(self, batch: Batch, states: Sequence[States] = ()) -> Float[Tensor, "tokens vocabulary"]:
        """Logits at the positions that predict a completion token, and nowhere else.

        With `states`, one entry a user (see `below`), only the layers from the first adapted one on are computed.
        """
        found = self._read(batch, states)
        return self._halves.head(found) if self._halves else found

    def _read(self, batch: Batch, states: Sequence[States]) -> Float[Tensor, "tokens hidden"]:
        """What the decoder gives at the positions that predict a completion token; a model in one piece, its logits."""
        if self._trunk is None or not states or not batch.places:
            return self._picked(batch)
        with self._trunk.from_states(lay(batch, states)):
            return self._picked(batch)

    def _picked(self, batch: Batch) -> Float[Tensor, "tokens hidden"]:
        if self._halves is None:
            whole: Tensor = self._run(self.base.model, batch).logits
            return batch.source(whole.flatten(0, 1))
        if self._narrowing is None or not batch.places:
            hidden: Tensor = self._run(self._halves.decoder, batch).last_hidden_state
            return batch.source(hidden.flatten(0, 1))
        first = self._layers[0].a
        with self._narrowing.to(batch.source, batch.read(1 if first is None else len(first))):
            narrow: Tensor = self._run(self._halves.decoder, batch).last_hidden_state
            return narrow.squeeze(0)

    def _run(self, module: nn.Module, batch: Batch) -> Any:
        with ExitStack() as inside:
            for layer in self._layers:
                layer.shares = batch.shares
                inside.callback(layer.finish)
            if self.quicker is not None:
                inside.enter_context(self.quicker.on())
            if batch.sight is None:
                return module(input_ids=batch.ids, use_cache=False)
            inside.enter_context(packed(self.base.model.config.get_text_config()))
            return module(input_ids=batch.ids, use_cache=False, position_ids=batch.positions, sight=batch.sight)

    @torch.no_grad()
    def below(self, rows: Sequence[Row]) -> States:
        """Hidden states of rows where the adapted layers begin; {} where nothing lies below them.

        What it gives depends on `rows` alone, so it can be forgotten and computed again to the bit.
        """
        found: dict[Row, Tensor] = {}
        trunk, distinct = self._trunk, list(dict.fromkeys(row for row in rows if row.completion))
        if trunk is None:
            return found
        module = self._halves.decoder if self._halves else self.base.model

        def run(places: Places) -> None:
            batch = self.batch([distinct[place] for _, place in places if place is not None], 1)
            found.update(cut(batch, trunk.states(lambda: self._run(module, batch))))

        in_passes([distinct], self.tokens_per_pass, run)
        return found

    def below_bytes(self, rows: Sequence[Row]) -> int:
        """Bytes that `below` would hold for rows; 0 where nothing lies below."""
        tokens = sum(len(row.prompt) + len(row.completion) for row in rows)
        config = self.base.model.config.get_text_config()
        return tokens * config.hidden_size * self.base.model.dtype.itemsize if self._trunk else 0

    def batch(self, rows: Sequence[Row], users: int) -> Batch:
        """Lays user-major rows out: packed, where the base's attention can be told about rows as long as these."""
        pad, device = self.base.pad_id, self.base.device
        fits = max((row.length for row in rows), default=0) <= self._window
        return pack(rows, users, pad, device, self._even) if self.packs and fits else collate(rows, pad, device)

    def _can_pack(self) -> bool:
        """Whether packed rows give the logits of rows one by one: windows are asked about, all else is tried out."""
        pad, device = self.base.pad_id, self.base.device
        fits = self._trial.longest <= self._window
        return fits and self._trial.passes(lambda rows: self.logits(pack(rows, 1, pad, device)))

    def _can_start_above(self) -> bool:
        """Whether upper layers that begin with the lower ones' states give the logits of the whole model."""
        if self._trunk is None:
            return False
        return self._trial.passes(lambda rows: self.logits(self.batch(rows, 1), [self.below(rows)]))

    def _quicker(self) -> ForwardPatch | None:
        """Norms, rotations and their like in fewer passes over memory; on a CPU none for types that round more, which
        would be rounded elsewhere than in the model."""
        if self.base.device.type == "cuda":
            return compiled(self.base.model)
        return written_down(self.base.model) if self.base.model.dtype in (torch.float32, torch.float64) else None

    def _narrowed(self) -> LastLayerPruning | None:
        """A last layer that computes no more than is read."""
        if self._halves is None or self.base.device.type != "cpu":
            return None
        return narrowing(self.base.model, lambda: self._picked(self._trial.collated(self._trial.rows)))

    def _if_exact(self, name: str, shortcut: _Shortcut | None) -> _Shortcut | None:
        """A shortcut; None where it, as the attribute `name`, would not give the logits of the model without it."""

        def tried(batch: Batch) -> Tensor:
            setattr(self, name, shortcut)
            try:
                return self.logits(batch)
            finally:
                setattr(self, name, None)

        layouts: tuple[Callable[[list[Row]], Batch], ...] = (lambda rows: self.batch(rows, 1), self._trial.collated)
        exact = shortcut is not None and all(
            self._trial.passes(lambda rows, lay=lay: tried(lay(rows)))  # type: ignore[misc]
            for lay in layouts
        )
        return shortcut if exact else None

    def row_logps(self, batch: Batch, states: Sequence[States] = ()) -> Float[Tensor, "rows longest"]:
        """Log-probability in nats of every completion token, one row a completion."""
        found = self._read(batch, states)
        logps = self._halves.head.logps if self._halves else token_logps
        return batch.spread(logps(found, batch.targets))

    def score(self, rows: Sequence[Sequence[Row]], states: Sequence[States] = ()) -> list[list[RowScore]]:
        """Scores the rows of every user under his own adapter, in length-sorted passes of bounded size."""

        def scored(batch: Batch, picked: Sequence[Row]) -> list[RowScore]:
            sums = self.row_logps(batch, states).double().sum(1).tolist()
            return [RowScore(logp, len(row.completion)) for logp, row in zip(sums, picked, strict=True)]

        return self._each(rows, scored)

    def read(self, rows: Sequence[Sequence[Row]], states: Sequence[States] = ()) -> list[list[GreedyScore]]:
        """As `score`, and what every model would have said in place of each row."""

        def compared(batch: Batch, picked: Sequence[Row]) -> list[GreedyScore]:
            logits = self.logits(batch, states)
            sums = batch.spread(token_logps(logits, batch.targets)).double().sum(1).tolist()
            likeliest = logits.argmax(-1)
            agreed = batch.spread((likeliest == batch.targets).double()).cumprod(1).sum(1).long().tolist()
            instead = batch.spread(likeliest.double()).long().tolist()
            tokens = [len(row.completion) for row in picked]
            ends = [own[same] if same < n else None for own, same, n in zip(instead, agreed, tokens, strict=True)]
            return [GreedyScore(*figures) for figures in zip(sums, tokens, agreed, ends, strict=True)]

        return self._each(rows, compared)

    @torch.no_grad()
    def _each(
        self, rows: Sequence[Sequence[Row]], of: Callable[[Batch, Sequence[Row]], list[_Found]]
    ) -> list[list[_Found]]:
        """What `of` finds of every row, in length-sorted passes of bounded size."""
        found: list[list[_Found | None]] = [[None] * len(own) for own in rows]

        def run(places: Places) -> None:
            picked = [EMPTY if place is None else rows[user][place] for user, place in places]
            for (user, place), value in zip(places, of(self.batch(picked, len(rows)), picked), strict=True):
                if place is not None:
                    found[user][place] = value

        in_passes(rows, self.tokens_per_pass, run)
        return [[value for value in own if value is not None] for own in found]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[tuple[int, ...]]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[Generated]]:
        """Every user's answers to his own prompts; temperature 0 is greedy. See `generation.write_answers`.

        A sampled answer depends on `seed` and the prompt's place in its user's list, not on who else is in the pass.
        """
        rows = [[Row(prompt, (0,) * max_new_tokens) for prompt in own] for own in prompts]
        answers: list[list[Generated | None]] = [[None] * len(own) for own in prompts]

        def run(places: Places) -> None:
            picked = [(self.base.eos_ids[:1] if place is None else prompts[user][place]) for user, place in places]
            seeds = [None if place is None else seed * 1_000_003 + place for _, place in places]
            written = write_answers(self.base, len(prompts), picked, seeds, max_new_tokens, temperature)
            for (user, place), answer in zip(places, written, strict=True):
                if place is not None:
                    answers[user][place] = answer

        in_passes(rows, self.tokens_per_cache, run)
        return [[answer for answer in own if answer is not None] for own in answers]
