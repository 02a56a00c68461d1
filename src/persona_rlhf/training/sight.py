"""What attention sees of packed tokens: which of them ask, and which of them each may look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
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
    which is added to the scores, is 0; where that is None, the tokens are the same and each sees those before it."""

    lines: int
    queries: int
    keys: int
    seen: Float[Tensor, "lines 1 queries keys"] | None


class Sight(NamedTuple):
    """Packed tokens laid out for some calls, one behind the other: those that ask, and those that are seen. `home`
    takes each token's result out of what the calls give. `last` is for a layer of which only those tokens are read
    that predict a completion: no others need to ask."""

    queries: Lookup
    keys: Lookup
    home: Lookup
    calls: list[Call]
    last: Sight | None


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
    return Sight(queries.lookup(device), keys.lookup(device), Lookup(fill, home, device), calls, None)


class _Layout:
    """Tokens in lines. Padding is a copy of its user's first token: a neighbour's might not be a number."""

    def __init__(self, widths: Sequence[int]) -> None:
        self._starts = [0, *accumulate(widths)]
        self._fill: list[tuple[int, int]] = []
        self._places = 0
        self._runs: list[tuple[int, int, int, int]] = []

    def line(self, user: int, length: int, runs: Sequence[tuple[int, int, int, int]]) -> int:
        """Adds a line with the runs of a part (see `Part.runs`); returns the place where it begins."""
        at = self._places
        self._fill.append((self._starts[user], length))
        self._places += length
        self._runs += [(token, at + n, count, turn) for token, n, count, turn in runs]
        return at

    def lookup(self, device: torch.device) -> Lookup:
        return Lookup(self._fill, self._runs, device)
