"""Token rows -> one packed batch with shared prompts; attention layout; deterministic gather."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.data.tokenize import Row

# ----------------------------------------------------------------------------------------------------
# A gather whose gradient is added up in a fixed order: the same bits on every run, on a GPU as on a CPU.
# ----------------------------------------------------------------------------------------------------


class DeterministicGather:
    """`x[index]` along the first dimension, where one source may be read several times.

    torch's own gradient of it adds with atomics on a GPU, in any order. Here each source's first reader is written,
    then its second is added, and so on. `runs` are (first source, first place, how many, turn): that many neighbouring
    places read as many neighbouring ones of the `sources`, for the `turn`-th time (from 0). `fill` says, as (source,
    how many) from the first place on, what a place reads that is in no run; no gradient comes back from it.
    """

    def __init__(
        self,
        sources: int,
        fill: Sequence[tuple[int, int]],
        runs: Sequence[tuple[int, int, int, int]],
        device: torch.device,
    ) -> None:
        index = np.repeat(*np.array(fill, dtype=np.int64).reshape(-1, 2).T)
        source, place, count, turn = np.array(runs, dtype=np.int64).reshape(-1, 4).T
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        reads = np.stack([np.repeat(source, count), np.repeat(place, count)]) + within
        index[reads[1]] = reads[0]
        turns = np.repeat(turn, count)
        first = np.full(sources, -1)
        first[reads[0, turns == 0]] = reads[1, turns == 0]
        later = [torch.from_numpy(reads[:, turns == n]).to(device) for n in range(1, turn.max(initial=0) + 1)]
        self.index: Int[Tensor, " places"] = torch.from_numpy(index).to(device)
        self.unread: Int[Tensor, " unread"] = torch.from_numpy(np.flatnonzero(first < 0)).to(device)
        self.first: Int[Tensor, " sources"] = torch.from_numpy(first.clip(0)).to(device)
        self.later: list[Int[Tensor, "2 reads"]] = later

    def in_parts(
        self, sources: Int[Tensor, "sources parts"], places: Int[Tensor, "places parts"]
    ) -> DeterministicGather:
        """This lookup where a source and a place are several rows each: those, of which every part reads its own."""
        made = copy(self)
        made.index, made.first = torch.empty_like(places).flatten(), torch.empty_like(sources).flatten()
        made.index[places.flatten()] = sources[self.index].flatten()
        made.first[sources.flatten()] = places[self.first].flatten()
        made.unread = sources[self.unread].flatten()
        made.later = [torch.stack([sources[read[0]].flatten(), places[read[1]].flatten()]) for read in self.later]
        return made

    def __call__(self, x: Float[Tensor, "sources width"]) -> Float[Tensor, "places width"]:
        found: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lookup: DeterministicGather) -> Tensor:
        ctx.lookup = lookup
        return x.index_select(0, lookup.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        lookup: DeterministicGather = ctx.lookup
        if not len(gradient):
            return gradient.new_zeros(len(lookup.first), *gradient.shape[1:]), None
        found = gradient.index_select(0, lookup.first).index_fill_(0, lookup.unread, 0)
        for sources, places in lookup.later:
            found.index_add_(0, sources, gradient.index_select(0, places))  # no source twice
        return found, None


# ----------------------------------------------------------------------------------------------------
# What attention sees of packed tokens: which of them ask, and which of them each may look at.
# ----------------------------------------------------------------------------------------------------

_LINES = 8  # rows of a call: those of like length go together, and a call costs little (on a CPU)
_MASK = 1 << 22  # most entries of a call's mask: longer rows are seen whole


class PackedRow(NamedTuple):
    """Where the `number`-th row lies among all tokens. `turn` counts the earlier rows with the same prompt; the
    completion is without its last token. A stand-in has no answer: it fills the line of a user who has no row."""

    number: int
    user: int
    prompt_at: int
    prompt: int
    turn: int
    completion_at: int
    completion: int
    answer: int

    @property
    def length(self) -> int:
        """Tokens that the row has as input."""
        return self.prompt + self.completion

    def runs(self, begin: int) -> list[tuple[int, int, int, int]]:
        """Neighbouring tokens of the row from `begin` on: (first one, its place from there, how many, which turn)."""
        asked = (self.prompt_at + begin, 0, self.prompt - begin, self.turn)
        answered = (self.completion_at, self.prompt - begin, self.completion, 0)
        return [run for run in (asked, answered) if run[2] > 0]


class AttentionCall(NamedTuple):
    """One call of attention over `lines` of `queries` tokens that ask, and `keys` tokens that they see: where `seen`,
    which is added to the scores, is 0; where that is None, the tokens are the same and each sees those before it.
    Leading dimensions of `seen` are the lines, however they are counted."""

    lines: int
    queries: int
    keys: int
    seen: Float[Tensor, "*lines queries keys"] | None


class AttentionLayout(NamedTuple):
    """Packed tokens laid out for some calls, one behind the other: those that ask, and those that are seen. `home`
    takes each token's result out of what the calls give. `last` is for a layer of which only those tokens are read
    that predict a completion: no others need to ask."""

    queries: DeterministicGather
    keys: DeterministicGather
    home: DeterministicGather
    calls: list[AttentionCall]
    last: AttentionLayout | None
    layouts: dict[tuple[int, int], AttentionLayout]

    @property
    def longest(self) -> int:
        """Tokens of the longest line of keys."""
        return max(call.keys for call in self.calls)

    def by_head(self, heads: int, groups: int) -> AttentionLayout:
        """The same for rows that are one head of a token each, `heads` of those that ask and `groups` of those that are
        seen. A line of a call is one group there, asked by its heads one behind the other, and always has a mask."""
        if (heads, groups) not in self.layouts:
            self.layouts[heads, groups] = self._split(heads, groups)
        return self.layouts[heads, groups]

    def _split(self, heads: int, groups: int) -> AttentionLayout:
        asked, seen = ([call.lines * getattr(call, side) for call in self.calls] for side in ("queries", "keys"))
        asking = _head_places(self.calls, asked, heads)
        known = _head_places(self.calls, seen, groups)
        tokens = len(self.home.index)
        own, others = (torch.arange(tokens * each).view(tokens, each) for each in (heads, groups))
        later = torch.full((self.longest, self.longest), -torch.inf).triu_(1)
        calls = []
        for lines, queries, keys, mask in self.calls:
            mask = later[:queries, :keys] if mask is None else mask[:, :, None]
            shape = (lines, groups, heads // groups, queries, keys)
            calls.append(AttentionCall(lines * groups, heads // groups * queries, keys, mask.expand(shape)))
        lookups = self.queries.in_parts(own, asking), self.keys.in_parts(others, known), self.home.in_parts(asking, own)
        return AttentionLayout(*lookups, calls, None, {})


def _head_places(calls: Sequence[AttentionCall], sizes: Sequence[int], heads: int) -> Int[Tensor, "places heads"]:
    """Where the heads of every token of calls with `sizes` tokens come to lie: line after line, head after head."""
    ordered = torch.arange(sum(sizes) * heads).split([size * heads for size in sizes])
    by_line = [own.view(call.lines, heads, -1).mT.reshape(-1, heads) for call, own in zip(calls, ordered, strict=True)]
    return torch.cat(by_line)


def attention_layout(
    parts: Sequence[PackedRow], widths: Sequence[int], device: torch.device, one_call: bool
) -> AttentionLayout:
    """The sight of the parts of users who have `widths` tokens.

    In `one_call` every row is seen whole. Else rows of like length go together; and where it costs less, of a prompt's
    rows only the first is seen whole: the others ask with their predicting tokens only, under a mask.
    """
    if one_call:
        return _laid([list(parts)], [], widths, device)
    rows = _alike(parts)
    firsts, others = (_alike([part for part in parts if (part.turn == 0) == first]) for first in (True, False))
    masked = [_masked(own) for own in rows]
    cost = sum(map(_whole, firsts)) + sum(map(_masked, others))
    if max(masked) > _MASK or cost >= sum(map(_whole, rows)):
        return _laid(rows, [], widths, device)
    return _laid(firsts, others, widths, device)._replace(last=_laid([], rows, widths, device))


def _alike(parts: Sequence[PackedRow]) -> list[list[PackedRow]]:
    """Groups of like length, the longest first."""
    ordered = sorted(parts, key=lambda part: part.length, reverse=True)
    return [ordered[n : n + _LINES] for n in range(0, len(ordered), _LINES)]


def _whole(rows: Sequence[PackedRow]) -> int:
    """Scores that a causal kernel computes of rows: in blocks of 32 queries (torch on a CPU)."""
    length = rows[0].length
    return len(rows) * length * (length + 32) // 2


def _masked(rows: Sequence[PackedRow]) -> int:
    """Scores of rows whose predicting tokens ask."""
    return len(rows) * max(1 + part.completion for part in rows) * rows[0].length


def _laid(
    whole: Sequence[Sequence[PackedRow]],
    read: Sequence[Sequence[PackedRow]],
    widths: Sequence[int],
    device: torch.device,
) -> AttentionLayout:
    """Calls over whole rows, and over rows whose predicting tokens ask."""
    calls, queries, keys, home = list[AttentionCall](), _Layout(widths), _Layout(widths), []
    results: dict[int, int] = {}
    for groups in (whole, read):
        for parts in groups:
            begins = [part.prompt - 1 if groups is read else 0 for part in parts]
            asked = max(part.length - begin for part, begin in zip(parts, begins, strict=True))
            seen = max(part.length for part in parts)
            for part, begin in zip(parts, begins, strict=True):
                runs = part.runs(begin)
                at = queries.line(part.user, asked, runs)
                keys.line(part.user, seen, part.runs(0))
                home += [
                    (at + n, token, count, 0)
                    for token, n, count, _ in runs
                    if part.turn == 0 or n + begin >= part.prompt
                ]
                results.setdefault(part.user, at)
            mask = None
            if groups is read:
                places = torch.tensor(begins)[:, None, None, None] + torch.arange(asked)[:, None]
                hidden = torch.arange(seen) > places
                mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).to(device)
            calls.append(AttentionCall(len(parts), asked, seen, mask))
    # What no result is meant for takes one of its user's.
    fill = [(results[user], width) for user, width in enumerate(widths)]
    back = DeterministicGather(queries.places, fill, home, device)
    return AttentionLayout(queries.lookup(device), keys.lookup(device), back, calls, None, {})


class _Layout:
    """Tokens in lines. Padding is a copy of its user's first token: a neighbour's might not be a number."""

    def __init__(self, widths: Sequence[int]) -> None:
        self._starts = [0, *accumulate(widths)]
        self._fill: list[tuple[int, int]] = []
        self.places = 0
        self._runs: list[tuple[int, int, int, int]] = []

    def line(self, user: int, length: int, runs: Sequence[tuple[int, int, int, int]]) -> int:
        """Adds a line with the runs of a part (see `Part.runs`); returns the place where it begins."""
        at = self.places
        self._fill.append((self._starts[user], length))
        self.places += length
        self._runs += [(token, at + n, count, turn) for token, n, count, turn in runs]
        return at

    def lookup(self, device: torch.device) -> DeterministicGather:
        return DeterministicGather(self._starts[-1], self._fill, self._runs, device)


# ----------------------------------------------------------------------------------------------------
# Token rows laid out for one forward pass, with the positions that predict a completion picked out.
# ----------------------------------------------------------------------------------------------------

EMPTY = Row((), ())
"""A row that fills a place: no completion, so it has no loss and no gradient."""


class RowPlace(NamedTuple):
    """Where a row, the `number`-th, stands among the tokens of a batch, all lines in a row: first token of its prompt
    and of its completion. `is_first`: no earlier row shares this prompt's tokens."""

    row: Row
    number: int
    prompt: int
    completion: int
    is_first: bool


class Batch(NamedTuple):
    """Rows of token ids; `source` reads the positions whose next token, `targets`, belongs to a completion.

    There is no attention mask: under causal attention a token never sees what lies to its right. `place` is where each
    completion token stands in the `[rows, longest completion]` grid. A completion's last token is no input: nothing is
    predicted from it. `positions` and `sight` are None where a line of `ids` is one row. `shares`: how many tokens each
    user has in the one line of all; None where users have equally many lines.
    """

    ids: Int[Tensor, "lines width"]
    positions: Int[Tensor, "lines width"] | None
    sight: AttentionLayout | None
    source: DeterministicGather
    targets: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    rows: int
    longest: int
    places: list[RowPlace]
    shares: list[int] | None

    def read(self, users: int) -> list[int]:
        """How many completion tokens each of the users has."""
        each, counts = self.rows // users, [0] * users
        for row, number, *_ in self.places:
            counts[number // each] += len(row.completion)
        return counts

    def spread(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "rows longest"]:
        """Values of the completion tokens as one row each, zero where a completion is shorter."""
        grid = values.new_zeros(self.rows * self.longest)
        return grid.index_copy(0, self.place, values).view(self.rows, self.longest)


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """One line a row, right-padded; an empty row becomes a single padding token."""
    width = max(1, *(len(row.prompt) + len(row.completion) - 1 for row in rows))
    ids, runs, places, start = [], [], [], 0
    for number, row in enumerate(rows):
        assert row.prompt or not row.completion, "a completion needs a prompt token to be predicted from"
        line = [*row.prompt, *row.completion[:-1]] if row.completion else []
        ids.append(line + [pad] * (width - len(line)))
        runs.append((number * width + len(row.prompt) - 1, start, len(row.completion), 0))
        if row.completion:
            places.append(RowPlace(row, number, number * width, number * width + len(row.prompt), True))
        start += len(row.completion)
    source = DeterministicGather(len(rows) * width, [(0, start)], runs, device)
    return Batch(torch.tensor(ids).to(device), None, None, source, *_answers(rows, device), places, None)


def pack(rows: Sequence[Row], users: int, pad: int, device: torch.device, even: bool = True) -> Batch:
    """One line a user: his rows behind one another, each prompt once. `rows` are user-major, equally many a user.

    All but attention looks at tokens one by one and need not know whose row a token is in. So nothing is spent on
    padding but what makes lines `even` (else they are one), nor twice on a prompt that rows share (Wang & Hegde 2024,
    "Accelerating direct preference optimization with prefix sharing"; see `sight.look`).
    """
    lines, positions, parts = _lines(rows, users, pad)
    width = max(map(len, lines))
    widths = [width] * users if even else [len(line) for line in lines]
    starts = [0, *accumulate(widths)]
    parts = [
        part._replace(prompt_at=start + part.prompt_at, completion_at=start + part.completion_at)
        for part in parts
        for start in [starts[part.user]]
    ]
    read, places, start = [], [], 0
    for part in parts:
        if part.answer:
            read += [(part.prompt_at + part.prompt - 1, start, 1, part.turn)]
            read += [(part.completion_at, start + 1, part.completion, 0)]
            places.append(RowPlace(rows[part.number], part.number, part.prompt_at, part.completion_at, part.turn == 0))
            start += part.answer
    ids = [line + [pad] * (width - len(line)) for line, width in zip(lines, widths, strict=True)]
    placed = [own + [0] * (width - len(own)) for own, width in zip(positions, widths, strict=True)]
    return Batch(
        torch.tensor(ids if even else [list(chain(*ids))]).to(device),
        torch.tensor(placed if even else [list(chain(*placed))]).to(device),
        attention_layout(parts, widths, device, one_call=even),
        DeterministicGather(sum(widths), [(0, start)], read, device),
        *_answers(rows, device),
        places,
        None if even else widths,
    )


def _lines(rows: Sequence[Row], users: int, pad: int) -> tuple[list[list[int]], list[list[int]], list[PackedRow]]:
    """Each user's tokens and their positions in their rows, and where in them each row lies."""
    lines: list[list[int]] = [[] for _ in range(users)]
    positions: list[list[int]] = [[] for _ in range(users)]
    parts = []
    each = len(rows) // users
    for user, (line, counted) in enumerate(zip(lines, positions, strict=True)):
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        for number in range(user * each, (user + 1) * each):
            prompt, completion = rows[number]
            if not completion:
                continue
            assert prompt, "a completion needs a prompt token to be predicted from"
            at, turn = prompts.get(prompt, (len(line), 0))
            prompts[prompt] = (at, turn + 1)
            if turn == 0:
                line += prompt
                counted += range(len(prompt))
            fed = len(completion) - 1
            parts.append(PackedRow(number, user, at, len(prompt), turn, len(line), fed, len(completion)))
            line += completion[:fed]
            counted += range(len(prompt), len(prompt) + fed)
        if not line:
            parts.append(PackedRow(user * each, user, 0, 1, 0, 1, 0, 0))
            line.append(pad)
            counted.append(0)
    return lines, positions, parts


def _answers(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """The tokens of all completions, their places in the grid, and its size."""
    longest = max(1, *(len(row.completion) for row in rows))
    targets = [token for row in rows for token in row.completion]
    place = [n * longest + m for n, row in enumerate(rows) for m in range(len(row.completion))]
    columns = [torch.tensor(column, dtype=torch.int64).to(device) for column in (targets, place)]
    return columns[0], columns[1], len(rows), longest
