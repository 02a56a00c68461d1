"""Passes of bounded size over the rows of many users, and what becomes of one that the device has no memory for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from persona_rlhf.preferences.tokens import Row

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
