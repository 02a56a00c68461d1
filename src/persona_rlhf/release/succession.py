"""Two runs over the same users, an old one and the one that is to follow it: what changes for each user."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.evaluation.measures import Accuracy, WinRate
from persona_rlhf.release.folder import write_lines
from persona_rlhf.release.results import Result, Status, plain
from persona_rlhf.release.seal import seal
from persona_rlhf.release.table import printable, share

SUCCESSION = "succession.jsonl"


class Standing(NamedTuple):
    """How a user stands in a run: what became of him, and the figures that say whether it is worth it to him.

    `bound`: the lower bound of his refusal rate, pooled over tier one.
    """

    status: Status
    reason: str
    alpha: float
    heldout_accuracy: Accuracy | None
    win_rate: WinRate | None
    bound: float | None

    @staticmethod
    def of(result: Result) -> Standing:
        """A user's standing, from his line."""
        bound = None if result.pooled is None else result.pooled.lower_bound
        return Standing(result.status, result.reason, result.alpha, result.heldout_accuracy, result.win_rate, bound)


class Succession(NamedTuple):
    """One user, before and after."""

    user_id: str
    slug: str
    old: Standing
    new: Standing


def successions(old: Iterable[Result], new: Iterable[Result]) -> list[Succession]:
    """The users who are in both runs, in the order of the new one."""
    known = {result.user_id: Standing.of(result) for result in old}
    return [
        Succession(result.user_id, result.slug, known[result.user_id], Standing.of(result))
        for result in new
        if result.user_id in known
    ]


def write_successions(run: Path, users: Iterable[Succession]) -> None:
    """Writes RUN/succession.jsonl, a line a user, sealed with the new run."""
    lines = (json.dumps(plain(user), ensure_ascii=True, allow_nan=False) for user in users)
    write_lines(run / SUCCESSION, (f"{line}\n".encode() for line in lines))
    seal(run, only=SUCCESSION)


def succession_table(users: Iterable[Succession]) -> Table:
    """One row a user, the old figure and the new one in each cell."""
    table = Table(title="Old base -> new base, user by user", title_justify="left")
    table.add_column("user", overflow="ellipsis", max_width=28)
    table.add_column("status")
    for name in ("alpha", "held-out (95%)", "win rate (95%)", "bound"):
        table.add_column(name, justify="right")
    for user in users:
        both = (user.old, user.new)
        cells = (
            [one.status.replace("_", " ") for one in both],
            [f"{one.alpha:g}" for one in both],
            [_accuracy(one.heldout_accuracy) for one in both],
            [_won(one.win_rate) for one in both],
            ["" if one.bound is None else f"{one.bound:.3f}" for one in both],
        )
        table.add_row(escape(printable(user.user_id)), *map(_change, cells))
    return table


def _accuracy(found: Accuracy | None) -> str:
    return "" if found is None else f"{share(found.adapted)} ({share(found.low)}-{share(found.high)})"


def _won(found: WinRate | None) -> str:
    return "" if found is None else f"{share(found.value)} ({share(found.low)}-{share(found.high)})"


def _change(cells: Sequence[str]) -> str:
    old, new = cells
    return old if old == new else f"{old or 'none'} -> {new or 'none'}"
