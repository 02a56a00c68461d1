"""Sweep arms and rebased runs compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.evaluation.records import Accuracy, WinRate
from persona_rlhf.evaluation.statistics import Interval, bootstrap
from persona_rlhf.release.integrity import seal
from persona_rlhf.release.render import intervals, printable, share, templates
from persona_rlhf.release.results import Result, Status, plain

# ----------------------------------------------------------------------------------------------------
# The comparison of a sweep's arms: one row an arm, intervals over users, and differences from the first arm.
# ----------------------------------------------------------------------------------------------------

Arm = dict[int, Sequence[Result]]
"""An arm's results by seed."""


class ArmMean(NamedTuple):
    """A mean over users (each the mean of his seeds) with a 95% bootstrap over users, and how far it is from the first
    arm's: the same users drawn for both. None where there is nothing to compare."""

    mean: float
    interval: Interval
    users: int
    change: float | None = None
    change_interval: Interval | None = None


class ArmSummary(NamedTuple):
    """One arm: runs of users, of which so many were released, and at full strength; the worst user's refusals of
    certify probes; the figures by name."""

    runs: int
    released: int
    full_strength: int
    worst_refusal: float | None
    figures: dict[str, ArmMean | None]


Comparison = dict[str, ArmSummary]
"""By the name of the arm, the first being the one that the others are held against."""


def _refusal(result: Result) -> float | None:
    test = result.measures.test
    count = test.pooled if test else None  # the certify probes decided, so they are shown apart
    return count.refused / count.n if count is not None and count.n else None


def _over_refusal(result: Result) -> float | None:
    found = result.measures.over_refusal
    return (found.refused - found.base_refused) / found.n if found is not None and found.n else None


FIGURES: dict[str, Callable[[Result], float | None]] = {
    "held-out accuracy": lambda result: None if result.gain is None else result.gain + 0.5,
    "win rate": lambda result: (won := result.measures.win_rate) and won.value,
    "refusals of test probes": _refusal,
    "over-refusal": _over_refusal,
    "seconds of training": lambda result: result.seconds,
}
"""What is compared of a user who was judged; one who is held back counts as the base that he gets."""


def compare(arms: Mapping[str, Arm]) -> Comparison:
    """Every arm against the first."""
    values = {name: {title: _by_user(arm, of) for title, of in FIGURES.items()} for name, arm in arms.items()}
    first = next(iter(values.values()))
    found = {}
    for name, arm in arms.items():
        judged = [result for results in arm.values() for result in results if result.pooled is not None]
        rates = [count.refused / count.n for result in judged if (count := result.pooled) is not None and count.n]
        found[name] = ArmSummary(
            runs=sum(len(results) for results in arm.values()),
            released=sum(result.status == "released" for result in judged),
            full_strength=sum(result.status == "released" and result.alpha == 1 for result in judged),
            worst_refusal=min(rates, default=None),
            figures={
                title: _figure(own, first[title] if own is not first[title] else {})
                for title, own in values[name].items()
            },
        )
    return found


def _by_user(arm: Arm, of: Callable[[Result], float | None]) -> dict[str, float]:
    """A figure of every judged user: the mean of his seeds, which are no users of their own."""
    found: dict[str, list[float]] = {}
    for results in arm.values():
        for result in results:
            value = of(result) if result.pooled is not None else None
            if value is not None:
                found.setdefault(result.user_id, []).append(value)
    return {user: fmean(values) for user, values in found.items()}


def _figure(own: Mapping[str, float], first: Mapping[str, float]) -> ArmMean | None:
    if not own:
        return None
    changes = [value - first[user] for user, value in own.items() if user in first]
    figure = ArmMean(fmean(own.values()), bootstrap(list(own.values())), len(own))
    return figure._replace(change=fmean(changes), change_interval=bootstrap(changes)) if changes else figure


def write_comparison(folder: Path, name: str, found: Comparison) -> None:
    """Writes FOLDER/sweep.json and FOLDER/report.html."""
    atomic_write(folder / "sweep.json", json.dumps(to_json(found), indent=2).encode() + b"\n")
    page = (
        templates(html=True)
        .get_template("sweep.html.j2")
        .render(
            name=name,
            version=__version__,
            arms=found,
            titles=list(FIGURES),
            shown=_shown,
            charts=_charts(found),
        )
    )
    atomic_write(folder / "report.html", page.encode("utf-8", "backslashreplace"))


def _charts(found: Comparison) -> list[tuple[str, Markup]]:
    charts = []
    for title in FIGURES:
        known = {arm: figure for arm, own in found.items() if (figure := own.figures[title]) is not None}
        if known:
            rows = [(arm, figure.mean, *figure.interval) for arm, figure in known.items()]
            charts.append((title, intervals(rows, f"{title} by arm")))
    return charts


def _shown(title: str, figure: ArmMean | None, change: bool = False) -> str:
    """A figure, or its change, in words."""
    if figure is None or (change and figure.change is None):
        return ""
    mean, interval = (figure.change, figure.change_interval) if change else (figure.mean, figure.interval)
    assert mean is not None
    assert interval is not None
    form = ("+" if change or title == "over-refusal" else "") + (".1f" if title.startswith("seconds") else ".3f")
    return f"{mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def comparison_table(found: Comparison) -> Table:
    """The comparison for people; changes are against the first arm."""
    table = Table("arm", *FIGURES, "worst user", "released, at alpha 1")
    for arm, own in found.items():
        cells = ["\n".join(filter(None, (_shown(t, f), _shown(t, f, change=True)))) for t, f in own.figures.items()]
        worst = "" if own.worst_refusal is None else f"{own.worst_refusal:.3f}"
        table.add_row(arm, *cells, worst, f"{own.released} of {own.runs}, {own.full_strength}", end_section=True)
    return table


def to_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values."""
    return {arm: plain(compared) for arm, compared in found.items()}


# ----------------------------------------------------------------------------------------------------
# Two runs over the same users, an old one and the one that is to follow it: what changes for each user.
# ----------------------------------------------------------------------------------------------------

SUCCESSION = "succession.jsonl"


class UserFigures(NamedTuple):
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
    def of(result: Result) -> UserFigures:
        """A user's standing, from his line."""
        bound = None if result.pooled is None else result.pooled.lower_bound
        measures = result.measures
        accuracy, won = measures.heldout_accuracy, measures.win_rate
        return UserFigures(result.status, result.reason, result.alpha, accuracy, won, bound)


class RebasedUser(NamedTuple):
    """One user, before and after."""

    user_id: str
    slug: str
    old: UserFigures
    new: UserFigures


def rebased_users(old: Iterable[Result], new: Iterable[Result]) -> list[RebasedUser]:
    """The users who are in both runs, in the order of the new one."""
    known = {result.user_id: UserFigures.of(result) for result in old}
    return [
        RebasedUser(result.user_id, result.slug, known[result.user_id], UserFigures.of(result))
        for result in new
        if result.user_id in known
    ]


def write_rebase(run: Path, users: Iterable[RebasedUser]) -> None:
    """Writes RUN/succession.jsonl, a line a user, sealed with the new run."""
    lines = (json.dumps(plain(user), ensure_ascii=True, allow_nan=False) for user in users)
    atomic_write(run / SUCCESSION, (f"{line}\n".encode() for line in lines))
    seal(run, only=SUCCESSION)


def rebase_table(users: Iterable[RebasedUser]) -> Table:
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
