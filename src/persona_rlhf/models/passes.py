"""Passes over the rows of many users that fit memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from persona_rlhf.data.tokenize import Row

PassRows = list[tuple[int, int | None]]
"""Rows of one pass as (user, number of the user's row), user-major and equally many per user; None pads."""


def run_in_passes(rows: Sequence[Sequence[Row]], budget: int, run: Callable[[PassRows], None]) -> None:
    """Calls `run` for all rows of all users, about `budget` tokens at a time.

    A pass that does not fit memory is run in halves. Long rows come first, and rows with one prompt stay together, so
    that a pass can share it. Raises torch.OutOfMemoryError where one row per user is too much.
    """
    for pass_rows in plan_passes(rows, budget):
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


def plan_passes(rows: Sequence[Sequence[Row]], budget: int) -> Iterator[PassRows]:
    """The passes of `run_in_passes`."""
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
