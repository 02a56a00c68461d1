"""Comparisons of runs: the arms of a sweep, and a rebased run with its predecessor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import visible
from persona_rlhf.common.files import atomic_write
from persona_rlhf.evaluation.records import Accuracy, WinRate
from persona_rlhf.evaluation.statistics import FEWEST_OF_INTERVAL, Interval, interval_over_users
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.render import chart, render_template, share
from persona_rlhf.release.results import Result, Status, plain

Arm = dict[int, Sequence[Result]]
"""The results of an arm of a sweep, by seed."""


class ArmMean(NamedTuple):
    """A mean over users, each the mean over seeds, with a 95% bootstrap over users where they are enough.

    `change` is the paired difference from the first arm, over the same users; None if there is nothing to compare.
    """

    mean: float
    interval: Interval | None
    users: int
    change: float | None = None
    change_interval: Interval | None = None


class ArmSummary(NamedTuple):
    """One arm: counts of runs of users, the worst user's refusal rate on certify probes, and the figures by name."""

    runs: int
    released: int
    full_strength: int
    worst_refusal: float | None
    figures: dict[str, ArmMean | None]


Comparison = dict[str, ArmSummary]
"""The summaries by the name of the arm. The others are compared with the first."""


def _refusal(result: Result) -> float | None:
    test = result.measures.test
    count = test.pooled if test else None  # the certify probes decided the verdict, so they are shown separately
    return count.refused / count.n if count is not None and count.n else None


def _over_refusal(result: Result) -> float | None:
    over = result.measures.over_refusal
    return (over.refused - over.base_refused) / over.n if over is not None and over.n else None


FIGURES: dict[str, Callable[[Result], float | None]] = {
    "held-out accuracy": lambda result: None if result.gain is None else result.gain + 0.5,
    "win rate": lambda result: (won := result.measures.win_rate) and won.value,
    "refusals of test probes": _refusal,
    "over-refusal": _over_refusal,
    "seconds of training": lambda result: result.seconds,
}
"""The compared figures of a judged user. Users who are held back get the base and count as the base."""


def compare(arms: Mapping[str, Arm]) -> Comparison:
    """The summary of every arm, with changes from the first."""
    values = {name: {title: _by_user(arm, of) for title, of in FIGURES.items()} for name, arm in arms.items()}
    first = next(iter(values.values()))
    summaries = {}
    for name, arm in arms.items():
        judged = [result for results in arm.values() for result in results if result.pooled is not None]
        rates = [count.refused / count.n for result in judged if (count := result.pooled) is not None and count.n]
        summaries[name] = ArmSummary(
            runs=sum(len(results) for results in arm.values()),
            released=sum(result.has_adapter for result in judged),
            full_strength=sum(result.has_adapter and result.alpha == 1 for result in judged),
            worst_refusal=min(rates, default=None),
            figures={
                title: _figure(by_user, first[title] if by_user is not first[title] else {})
                for title, by_user in values[name].items()
            },
        )
    return summaries


def _by_user(arm: Arm, of: Callable[[Result], float | None]) -> dict[str, float]:
    """A figure of every judged user: the mean over seeds."""
    by_user: dict[str, list[float]] = {}
    for results in arm.values():
        for result in results:
            value = of(result) if result.pooled is not None else None
            if value is not None:
                by_user.setdefault(result.user_id, []).append(value)
    return {user: fmean(values) for user, values in by_user.items()}


def _figure(by_user: Mapping[str, float], first: Mapping[str, float]) -> ArmMean | None:
    if not by_user:
        return None
    changes = [value - first[user] for user, value in by_user.items() if user in first]
    figure = ArmMean(fmean(by_user.values()), interval_over_users(list(by_user.values())), len(by_user))
    return figure._replace(change=fmean(changes), change_interval=interval_over_users(changes)) if changes else figure


def write_comparison(folder: Path, name: str, comparison: Comparison) -> None:
    """Writes FOLDER/sweep.json and FOLDER/report.html."""
    atomic_write(folder / "sweep.json", json.dumps(to_json(comparison), indent=2).encode() + b"\n")
    page = render_template(
        "sweep.html.j2",
        name=name,
        arms=comparison,
        titles=list(FIGURES),
        shown=_shown,
        charts=_charts(comparison),
        fewest=FEWEST_OF_INTERVAL,
    )
    atomic_write(folder / "report.html", page.encode("utf-8", "backslashreplace"))


def _charts(comparison: Comparison) -> list[tuple[str, Markup]]:
    charts = []
    for title in FIGURES:
        rows = [
            (arm, figure.mean, *(figure.interval or (figure.mean, figure.mean)))
            for arm, summary in comparison.items()
            if (figure := summary.figures[title]) is not None
        ]
        if rows:
            charts.append((title, chart("intervals", rows, f"{title} by arm")))
    return charts


def _shown(title: str, figure: ArmMean | None, change: bool = False) -> str:
    """A figure, or its change, as text with its interval."""
    if figure is None or (change and figure.change is None):
        return ""
    mean, interval = (figure.change, figure.change_interval) if change else (figure.mean, figure.interval)
    assert mean is not None
    form = ("+" if change or title == "over-refusal" else "") + (".1f" if title.startswith("seconds") else ".3f")
    between = "" if interval is None else f" ({interval.low:{form}} to {interval.high:{form}})"
    return f"{mean:{form}}{between}"


def comparison_table(comparison: Comparison) -> Table:
    """The comparison as a table; changes are from the first arm."""
    table = Table("arm", *FIGURES, "worst user", "released, at alpha 1")
    for arm, summary in comparison.items():
        figures = summary.figures.items()
        cells = ["\n".join(filter(None, (_shown(t, f), _shown(t, f, change=True)))) for t, f in figures]
        worst = "" if summary.worst_refusal is None else f"{summary.worst_refusal:.3f}"
        released = f"{summary.released} of {summary.runs}, {summary.full_strength}"
        table.add_row(arm, *cells, worst, released, end_section=True)
    return table


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values."""
    return {arm: plain(summary) for arm, summary in comparison.items()}


SUCCESSION = "succession.jsonl"


class UserFigures(NamedTuple):
    """A user's status in a run, and the figures to compare. `bound` is the lower bound of the refusal rate, pooled over
    tier one."""

    status: Status
    reason: str
    alpha: float
    heldout_accuracy: Accuracy | None
    win_rate: WinRate | None
    bound: float | None

    @staticmethod
    def of(result: Result) -> UserFigures:
        """The figures of a result."""
        bound = None if result.pooled is None else result.pooled.lower_bound
        measures = result.measures
        accuracy, won = measures.heldout_accuracy, measures.win_rate
        return UserFigures(result.status, result.reason, result.alpha, accuracy, won, bound)


class RebasedUser(NamedTuple):
    """One user in the old and the new run."""

    user_id: str
    slug: str
    old: UserFigures
    new: UserFigures


def rebased_users(old: Iterable[Result], new: Iterable[Result]) -> list[RebasedUser]:
    """The users in both runs, in the order of the new one."""
    before = {result.user_id: UserFigures.of(result) for result in old}
    return [
        RebasedUser(result.user_id, result.slug, before[result.user_id], UserFigures.of(result))
        for result in new
        if result.user_id in before
    ]


def write_rebase(run: Path, users: Iterable[RebasedUser]) -> None:
    """Writes RUN/succession.jsonl, one line per user, and its hash in the run's manifest."""
    lines = (json.dumps(plain(user), ensure_ascii=True, allow_nan=False) for user in users)
    atomic_write(run / SUCCESSION, (f"{line}\n".encode() for line in lines))
    write_run_manifest(run, only=SUCCESSION)


def rebase_table(users: Iterable[RebasedUser]) -> Table:
    """One row per user, with the old and the new figure in each cell."""
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
        table.add_row(escape(visible(user.user_id)), *map(_change, cells))
    return table


def _accuracy(value: Accuracy | None) -> str:
    return "" if value is None else f"{share(value.adapted)} ({share(value.low)}-{share(value.high)})"


def _won(rate: WinRate | None) -> str:
    return "" if rate is None else f"{share(rate.value)} ({share(rate.low)}-{share(rate.high)})"


def _change(cells: Sequence[str]) -> str:
    old, new = cells
    return old if old == new else f"{old or 'none'} -> {new or 'none'}"
