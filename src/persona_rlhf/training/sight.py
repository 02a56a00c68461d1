"""What attention sees of packed tokens: which of them ask, and which of them each may look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.training.lookup import Lookup

_LINES = 8  # rows of a call: those of like length go together, and a call costs little (on a CPU)
_MASK = 1 << 22  # most entries of a call's mask: longer rows are seen whole


class Part(NamedTuple):
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


class Call(NamedTuple):
    """One call of attention over `lines` of `queries` tokens that ask, and `keys` tokens that they see: where `seen`,
    which is added to the scores, is 0; where that is None, the tokens are the same and each sees those before it.
    Leading dimensions of `seen` are the lines, however they are counted."""

    lines: int
    queries: int
    keys: int
    seen: Float[Tensor, "*lines queries keys"] | None


class Sight(NamedTuple):
    """Packed tokens laid out for some calls, one behind the other: those that ask, and those that are seen. `home`
    takes each token's result out of what the calls give. `last` is for a layer of which only those tokens are read
    that predict a completion: no others need to ask."""

    queries: Lookup
    keys: Lookup
    home: Lookup
    calls: list[Call]
    last: Sight | None
    layouts: dict[tuple[int, int], Sight]

    @property
    def longest(self) -> int:
        """Tokens of the longest line of keys."""
        return max(call.keys for call in self.calls)

    def by_head(self, heads: int, groups: int) -> Sight:
        """The same for rows that are one head of a token each, `heads` of those that ask and `groups` of those that are
        seen. A line of a call is one group there, asked by its heads one behind the other, and always has a mask."""
        if (heads, groups) not in self.layouts:
            self.layouts[heads, groups] = self._split(heads, groups)
        return self.layouts[heads, groups]

    def _split(self, heads: int, groups: int) -> Sight:
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
            calls.append(Call(lines * groups, heads // groups * queries, keys, mask.expand(shape)))
        lookups = self.queries.in_parts(own, asking), self.keys.in_parts(others, known), self.home.in_parts(asking, own)
        return Sight(*lookups, calls, None, {})


def _head_places(calls: Sequence[Call], sizes: Sequence[int], heads: int) -> Int[Tensor, "places heads"]:
    """Where the heads of every token of calls with `sizes` tokens come to lie: line after line, head after head."""
    ordered = torch.arange(sum(sizes) * heads).split([size * heads for size in sizes])
    by_line = [own.view(call.lines, heads, -1).mT.reshape(-1, heads) for call, own in zip(calls, ordered, strict=True)]
    return torch.cat(by_line)


def look(parts: Sequence[Part], widths: Sequence[int], device: torch.device, one_call: bool) -> Sight:
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


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Groups of like length, the longest first."""
    ordered = sorted(parts, key=lambda part: part.length, reverse=True)
    return [ordered[n : n + _LINES] for n in range(0, len(ordered), _LINES)]


def _whole(rows: Sequence[Part]) -> int:
    """Scores that a causal kernel computes of rows: in blocks of 32 queries (torch on a CPU)."""
    length = rows[0].length
    return len(rows) * length * (length + 32) // 2


def _masked(rows: Sequence[Part]) -> int:
    """Scores of rows whose predicting tokens ask."""
    return len(rows) * max(1 + part.completion for part in rows) * rows[0].length


def _laid(
    whole: Sequence[Sequence[Part]], read: Sequence[Sequence[Part]], widths: Sequence[int], device: torch.device
) -> Sight:
    """Calls over whole rows, and over rows whose predicting tokens ask."""
    calls, queries, keys, home = list[Call](), _Layout(widths), _Layout(widths), []
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
            calls.append(Call(len(parts), asked, seen, mask))
    # What no result is meant for takes one of its user's.
    fill = [(results[user], width) for user, width in enumerate(widths)]
    back = Lookup(queries.places, fill, home, device)
    return Sight(queries.lookup(device), keys.lookup(device), back, calls, None, {})


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

    def lookup(self, device: torch.device) -> Lookup:
        return Lookup(self._starts[-1], self._fill, self._runs, device)
