"""Passes over the rows of many users that fit memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.device import is_out_of_memory, release_cache

PassRows = list[tuple[int, int | None]]
"""Rows of one pass as (user, number of the user's row), user-major and equally many per user; None pads."""


def run_in_passes(rows: Sequence[Sequence[Row]], budget: int, run: Callable[[PassRows], None]) -> int:
    """Calls `run` for all rows of all users, about `budget` tokens at a time; returns the budget that fits memory.

    A pass that does not fit halves the budget for itself and all later ones. Long rows come first, and rows with one
    prompt stay together, so that a pass can share it. Raises the error of a full memory where one row per user is too
    much.
    """
    users, start = _Ordered(rows), 0
    while start < users.most:
        stop = users.stop(start, budget)
        try:
            run(users.block(start, stop))
        except Exception as fault:
            if not is_out_of_memory(fault) or stop - start == 1:
                raise
            half = (stop - start) // 2 * users.width(start)
        else:
            start = stop
            continue
        release_cache()  # outside of the handler, which holds on to the pass that failed
        budget = half
    return budget


def plan_passes(rows: Sequence[Sequence[Row]], budget: int) -> Iterator[PassRows]:
    """The passes of `run_in_passes` where all of them fit."""
    users, start = _Ordered(rows), 0
    while start < users.most:
        stop = users.stop(start, budget)
        yield users.block(start, stop)
        start = stop


class _Ordered:
    """Every user's rows in the order of the passes; `most` rows of one user."""

    def __init__(self, rows: Sequence[Sequence[Row]]) -> None:
        self._lengths: list[list[int]] = []
        self._order: list[list[int]] = []
        for user_rows in rows:
            longest: dict[tuple[int, ...], int] = {}  # by prompt
            for row in user_rows:
                longest[row.prompt] = max(longest.get(row.prompt, 0), len(row.prompt) + len(row.completion))
            keys = [(-longest[row.prompt], row.prompt) for row in user_rows]
            self._order.append(sorted(range(len(user_rows)), key=keys.__getitem__))
            self._lengths.append([longest[user_rows[n].prompt] for n in self._order[-1]])
        self.most = max(map(len, rows), default=0)

    def width(self, start: int) -> int:
        """Tokens of all users' longest row from the `start`-th on, padded to the longest of all."""
        return max(1, *(lengths[start] for lengths in self._lengths if start < len(lengths))) * len(self._order)

    def stop(self, start: int, budget: int) -> int:
        """The end of the pass that begins with the `start`-th rows."""
        return min(self.most, start + max(1, budget // self.width(start)))

    def block(self, start: int, stop: int) -> PassRows:
        """The rows of a pass."""
        block = range(start, stop)
        return [(user, ns[n] if n < len(ns) else None) for user, ns in enumerate(self._order) for n in block]
