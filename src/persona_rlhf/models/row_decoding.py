"""Decoding of rows without padding: a step computes one token of every unfinished row, whichever user's it is.

Keys and values lie in slots. A row that ends leaves its slot to the next one (continuous batching, Yu et al. 2022,
"Orca"), so that steps stay large. All layers but attention treat tokens one by one; see `packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.models.generation import Generated, inverse_sample
from persona_rlhf.models.packing import RowPlace


class LayerTokens(NamedTuple):
    """Keys, after their rotation, and values of the tokens of one pass in one layer."""

    keys: Float[Tensor, "tokens groups size"]
    values: Float[Tensor, "tokens groups value_size"]


class CachedTokens(NamedTuple):
    """The tokens of rows in one layer: row by row the places of its tokens, the first one repeated as padding."""

    tokens: LayerTokens
    places: Int[Tensor, "rows longest"]


@dataclass(slots=True)
class BegunAnswer:
    """An answer to the `number`-th prompt of a user (`prompt` tokens): its tokens so far, the last one not cached."""

    user: int
    number: int
    prompt: int
    ids: list[int]

    @property
    def cached(self) -> int:
        """Tokens of the row whose keys and values are cached."""
        return self.prompt + len(self.ids) - 1


class BegunRows(NamedTuple):
    """Answers that have begun, and their tokens in every layer."""

    answers: list[BegunAnswer]
    layers: list[CachedTokens]


def token_places(rows: Sequence[RowPlace], lengths: Sequence[int], device: torch.device) -> Int[Tensor, "rows longest"]:
    """The places in a pass of the first `lengths` tokens of each row; see `CachedTokens`."""
    columns = torch.arange(max(lengths))
    starts = torch.tensor([[start for start, _ in place.runs] for place in rows])
    shared = torch.tensor([place.prefix.length for place in rows])[:, None]
    prompts = torch.tensor([len(place.row.prompt) for place in rows])[:, None]
    of_prompt = torch.where(columns < shared, starts[:, :1] + columns, starts[:, 1:2] + columns - shared)
    places = torch.where(columns < prompts, of_prompt, starts[:, 2:] + columns - prompts)
    return torch.where(columns < torch.tensor(lengths)[:, None], places, places[:, :1]).to(device)


class RowCache:
    """Keys and values of unfinished rows, one slot a row, and the attention of one new token per row.

    slots: of each row, in the order of the step's tokens
    lengths: tokens of each slot
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        """`capacity`: most tokens of a row."""
        self._capacity, self._device = capacity, device
        self._layers: list[LayerTokens] = []
        self._layer = 0
        self.lengths: Int[Tensor, " slots"] = torch.zeros(0, dtype=torch.int64, device=device)
        self.slots: Int[Tensor, " rows"] = self.lengths
        self._mask: Float[Tensor, "slots 1 1 width"] | None = None

    def admit(self, layers: Sequence[CachedTokens], lengths: Sequence[int], keep: Sequence[int]) -> list[int]:
        """Adds rows to the slots that are not in `keep`, or to new ones; returns their slots."""
        taken, free = set(keep), list[int]()
        free = [slot for slot in range(len(self.lengths)) if slot not in taken][: len(lengths)]
        missing = len(lengths) - len(free)
        if missing:
            free += range(len(self.lengths), len(self.lengths) + missing)
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(missing)])
        slots = torch.tensor(free, device=self._device)
        self.lengths[slots] = torch.tensor(lengths, device=self._device)
        if not self._layers:
            empty = ((part.new_zeros(0, self._capacity, *part.shape[1:]) for part in tokens) for tokens, _ in layers)
            self._layers = [LayerTokens(*parts) for parts in empty]
        if missing:
            grown = ((torch.cat([p, p.new_zeros(missing, *p.shape[1:])]) for p in layer) for layer in self._layers)
            self._layers = [LayerTokens(*parts) for parts in grown]
        for layer, (tokens, places) in zip(self._layers, layers, strict=True):
            for part, new in zip(layer, tokens, strict=True):
                part[slots, : places.shape[1]] = new[places]
        return free

    def shrink(self, keep: Sequence[int]) -> None:
        """Keeps these slots only, in this order."""
        kept = torch.tensor(keep, device=self._device)
        self._layers = [LayerTokens(*(part.index_select(0, kept) for part in layer)) for layer in self._layers]
        self.lengths = self.lengths.index_select(0, kept)

    def begin_step(self, slots: Sequence[int]) -> Int[Tensor, "1 rows"]:
        """Begins the step of these rows; returns the positions of their new tokens."""
        self.slots, self._layer = torch.tensor(slots, device=self._device), 0
        positions = self.lengths[self.slots]
        hidden = torch.arange(int(positions.max()) + 1, device=self._device) > self.lengths[:, None, None, None]
        self._mask = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, -torch.inf)
        return positions[None]

    def end_step(self) -> None:
        """Ends a step: each of its rows is longer by a token."""
        self.lengths[self.slots] += 1

    def attend(
        self,
        query: Float[Tensor, "1 heads rows size"],
        key: Float[Tensor, "1 groups rows size"],
        value: Float[Tensor, "1 groups rows value_size"],
        scaling: float | None,
    ) -> Float[Tensor, "1 rows heads value_size"]:
        """The attention of the step's tokens in the next layer. Slots without a row are computed and dropped."""
        assert self._mask is not None
        layer, positions = self._layers[self._layer], self.lengths[self.slots]
        self._layer += 1
        for part, new in zip(layer, (key, value), strict=True):
            part[self.slots, positions] = new[0].transpose(0, 1)
        (_, heads, rows, size), groups = query.shape, key.shape[1]
        q = query.new_zeros(len(self.lengths), groups, heads // groups, size)  # the heads of a group read the same keys
        q[self.slots] = query[0].transpose(0, 1).reshape(rows, groups, heads // groups, size)
        keys, values = (part[:, : self._mask.shape[-1]].transpose(1, 2) for part in layer)
        output = F.scaled_dot_product_attention(q, keys, values, self._mask.to(q.dtype), scale=scaling)
        return output[self.slots].reshape(1, rows, heads, -1)


Step = Callable[[Sequence[int], RowCache, Sequence[int], Sequence[int]], Float[Tensor, "rows vocabulary"]]
"""Logits after one more token of every row: the tokens, the cache, the rows' slots and the rows of each user."""

ChooseToken = Callable[[Float[Tensor, "rows vocabulary"], Sequence[BegunAnswer]], list[int]]
"""Picks the next token of every answer."""


def token_chooser(temperature: float, seed: int, max_new_tokens: int) -> ChooseToken:
    """Greedy at temperature 0. A draw depends on `seed`, the number of the prompt and the place of the token."""
    draws: dict[int, list[float]] = {}

    def choose(logits: Float[Tensor, "rows vocabulary"], answers: Sequence[BegunAnswer]) -> list[int]:
        if temperature <= 0:
            return list(logits.argmax(-1).tolist())
        for answer in answers:
            if answer.number not in draws:
                stream = torch.Generator().manual_seed(seed * 1_000_003 + answer.number)
                draws[answer.number] = torch.rand(max_new_tokens, generator=stream).tolist()
        uniform = torch.tensor([draws[answer.number][len(answer.ids)] for answer in answers], device=logits.device)
        return list(inverse_sample(logits / temperature, uniform).tolist())

    return choose


class Decoding(NamedTuple):
    """The settings of a decoding: as in `generation.generate_answers`.

    capacity: most tokens of a row
    rows: most rows of a step
    """

    users: int
    ends: Sequence[int]
    context: int
    max_new_tokens: int
    capacity: int
    rows: int

    def over(self, answer: BegunAnswer) -> bool:
        """Whether an answer goes no further: it has ended, or fills its limit or the context."""
        full = len(answer.ids) >= self.max_new_tokens or answer.prompt + len(answer.ids) >= self.context
        return full or answer.ids[-1] in self.ends

    def generated(self, answer: BegunAnswer) -> Generated:
        """An answer that is over."""
        ended = answer.ids[-1] in self.ends
        return Generated(tuple(answer.ids[:-1] if ended else answer.ids), ended)

    def run(
        self, begun: Iterable[BegunRows], step: Step, choose: ChooseToken, device: torch.device
    ) -> dict[tuple[int, int], Generated]:
        """Decodes answers to their end, as room allows; by (user, number). None of `begun` is over."""
        written: dict[tuple[int, int], Generated] = {}
        cache, waiting, source = RowCache(self.capacity, device), BegunRows([], []), iter(begun)
        alive: list[tuple[BegunAnswer, int]] = []
        more = True
        while True:
            while more and len(alive) <= 3 * self.rows // 4:
                if not waiting.answers:
                    following = next(source, None)
                    more, waiting = following is not None, following or waiting
                    continue
                room = self.rows - len(alive)
                lengths = [answer.cached for answer in waiting.answers[:room]]
                first = [CachedTokens(layer.tokens, layer.places[:room]) for layer in waiting.layers]
                slots = cache.admit(first, lengths, [slot for _, slot in alive])
                alive = sorted([*alive, *zip(waiting.answers[:room], slots, strict=True)], key=lambda one: one[0].user)
                rest = [CachedTokens(layer.tokens, layer.places[room:]) for layer in waiting.layers]
                waiting = BegunRows(waiting.answers[room:], rest)
            if not alive:
                return written
            if 2 * len(alive) <= len(cache.lengths):
                cache.shrink([slot for _, slot in alive])
                alive = [(answer, place) for place, (answer, _) in enumerate(alive)]
            answers, places = [answer for answer, _ in alive], [slot for _, slot in alive]
            counts = [0] * self.users
            for answer in answers:
                counts[answer.user] += 1
            logits = step([answer.ids[-1] for answer in answers], cache, places, counts)
            for answer, token in zip(answers, choose(logits.float(), answers), strict=True):
                answer.ids.append(token)
            over = [self.over(answer) for answer in answers]
            written |= {(a.user, a.number): self.generated(a) for a, done in zip(answers, over, strict=True) if done}
            alive = [one for one, done in zip(alive, over, strict=True) if not done]
