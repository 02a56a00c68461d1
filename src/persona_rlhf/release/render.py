"""Rendering for people: the table at the end of a run, static SVG charts, and the jinja2 templates.

Charts take their colours from the page, and their labels say in words what they show.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from heapq import nsmallest
from math import floor

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.markup import escape as escape_markup
from rich.table import Table

from persona_rlhf.release.results import Result, summarise

_WIDTH, _HEIGHT, _PAD = 340, 190, 34


def histogram(
    values: Sequence[float], low: float, high: float, bins: int, label: str, mark: float | None = None
) -> Markup:
    """A chart of counts of values in equal bins; `mark` draws a line, such as chance."""
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, floor((value - low) / (high - low) * bins)))] += 1
    most, step = max([1, *counts]), (_WIDTH - 2 * _PAD) / bins
    bars = [
        f'<rect class="bar" x="{_x(low + k * (high - low) / bins, low, high) + 0.5:.1f}" y="{_y(count / most):.1f}" '
        f'width="{step - 1:.1f}" height="{_HEIGHT - _PAD - _y(count / most):.1f}"><title>{count} users</title></rect>'
        for k, count in enumerate(counts)
        if count
    ]
    return _figure([*bars, *_line(mark, low, high), *_axis(low, high), *_count_axis(most)], label)


def bars(named: Sequence[tuple[str, int]], label: str) -> Markup:
    """A chart with one bar per name."""
    most = max([1, *(count for _, count in named)])
    step = (_WIDTH - 2 * _PAD) / max(1, len(named))
    parts: list[str] = []
    for k, (name, count) in enumerate(named):
        left = _PAD + k * step
        parts.append(
            f'<rect class="bar" x="{left + step * 0.15:.1f}" y="{_y(count / most):.1f}" width="{step * 0.7:.1f}" '
            f'height="{_HEIGHT - _PAD - _y(count / most):.1f}"/>'
            f'<text x="{left + step / 2:.1f}" y="{_HEIGHT - _PAD + 14}" text-anchor="middle">{escape(name)}</text>'
            f'<text x="{left + step / 2:.1f}" y="{_y(count / most) - 4:.1f}" text-anchor="middle">{count}</text>'
        )
    return _figure(parts, label)


def scatter(points: Sequence[tuple[float, float]], low: float, high: float, label: str, across: str, up: str) -> Markup:
    """A chart with one dot per user, and the line of equal values."""
    dots = [
        f'<circle class="dot" cx="{_x(x, low, high):.1f}" cy="{_y((y - low) / (high - low)):.1f}" r="3"/>'
        for x, y in points
    ]
    same = (
        f'<line class="mark" x1="{_x(low, low, high):.1f}" y1="{_y(0):.1f}" x2="{_x(high, low, high):.1f}" '
        f'y2="{_y(1):.1f}"/>'
    )
    middle = _HEIGHT / 2
    names = (
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(up)}</text>'
    )
    return _figure([same, *dots, *_axis(low, high), names], label)


def bounds(rows: Sequence[tuple[str, float, float, float]], label: str) -> Markup:
    """A chart with one row per name: worst lower bound (left end), worst rate (right end), and demand (tick)."""
    low = min([0.9, *(min(bound, demand) for _, bound, _, demand in rows)])
    low = floor(low * 20) / 20
    height = 24 * len(rows) + 30
    parts: list[str] = []
    for k, (name, bound, rate, demand) in enumerate(rows):
        y = 24 * k + 16
        left, right, tick = (130 + (value - low) / (1 - low) * 200 for value in (bound, rate, demand))
        parts.append(
            f'<text x="124" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line class="range" x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}"/>'
            f'<circle class="dot solid" cx="{right:.1f}" cy="{y}" r="4"/>'
            f'<line class="mark" x1="{tick:.1f}" y1="{y - 8}" x2="{tick:.1f}" y2="{y + 8}"/>'
        )
    axis = (
        f'<text x="130" y="{height - 4}">{low:.0%}</text><text x="330" y="{height - 4}" text-anchor="end">100%</text>'
    )
    return _figure([*parts, axis], label, height)


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> Markup:
    """A chart with one row per name: a mean (dot) with its interval (line)."""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    span = (high - low) or 1.0
    height = 24 * len(rows) + 30
    parts: list[str] = []
    for k, (name, mean, below, above) in enumerate(rows):
        y = 24 * k + 16
        left, dot, right = (140 + (value - low) / span * 190 for value in (below, mean, above))
        parts.append(
            f'<text x="132" y="{y + 4}" text-anchor="end">{escape(name[:24])}</text>'
            f'<line class="range" x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}"/>'
            f'<circle class="dot solid" cx="{dot:.1f}" cy="{y}" r="4"><title>{mean:.4g}</title></circle>'
        )
    ends = (
        f'<text x="140" y="{height - 4}">{low:.3g}</text>'
        f'<text x="330" y="{height - 4}" text-anchor="end">{high:.3g}</text>'
    )
    return _figure([*parts, ends], label, height)


def _figure(parts: Sequence[str], label: str, height: int = _HEIGHT) -> Markup:
    return Markup(  # the parts hold numbers and escaped names only
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _x(value: float, low: float, high: float) -> float:
    return _PAD + (value - low) / (high - low) * (_WIDTH - 2 * _PAD)


def _y(share: float) -> float:
    return _HEIGHT - _PAD - share * (_HEIGHT - 2 * _PAD)


def _axis(low: float, high: float) -> list[str]:
    ends = ((low, "start"), ((low + high) / 2, "middle"), (high, "end"))
    base = f'<line class="axis" x1="{_PAD}" y1="{_HEIGHT - _PAD}" x2="{_WIDTH - _PAD}" y2="{_HEIGHT - _PAD}"/>'
    return [base] + [
        f'<text x="{_x(value, low, high):.1f}" y="{_HEIGHT - _PAD + 14}" text-anchor="{anchor}">{value:.3g}</text>'
        for value, anchor in ends
    ]


def _count_axis(most: int) -> list[str]:
    return [f'<text x="{_PAD - 6}" y="{_y(1) + 4:.1f}" text-anchor="end">{most}</text>']


def _line(mark: float | None, low: float, high: float) -> list[str]:
    if mark is None:
        return []
    x = _x(mark, low, high)
    return [f'<line class="mark" x1="{x:.1f}" y1="{_y(1):.1f}" x2="{x:.1f}" y2="{_y(0):.1f}"/>']


_MOST = 40  # users; the report shows more


def results_table(results: Iterable[Result]) -> Table:
    """One row per user, and the medians. Of large runs it shows the users with problems, then the first others.

    The results are read twice and never held all at once.
    """
    summary = summarise(results)
    caption = None
    if summary.users > _MOST:
        shown = nsmallest(_MOST, results, key=lambda r: (r.status == "released" and not r.alarm, r.alpha))
        caption = f"{_MOST} of {summary.users} users, those held back or in alarm first; the report shows more"
    else:
        shown = list(results)
    table = Table(caption=caption, caption_justify="left")
    table.add_column("user", overflow="ellipsis", max_width=28)
    table.add_column("status")
    for name in ("alpha", "held-out", "noise-free", "win rate", "refused", "bound", "over-refusal"):
        table.add_column(name, justify="right")
    for result in shown:
        table.add_row(escape_markup(printable(result.user_id)), _status(result), *_figures(result))
    table.add_section()
    table.add_row(
        f"median of {summary.users}",
        f"{summary.released} released",
        f"{summary.full_strength} at 1",
        share(summary.accuracy),
        share(summary.clean_accuracy),
        share(summary.win_rate),
        "",
        "" if summary.worst_bound is None else f">= {summary.worst_bound:.3f}",
        "",
        style="bold",
    )
    return table


def _status(result: Result) -> str:
    words = {"released": "[green]released[/]", "held_back": "[yellow]held back[/]"}
    return words.get(result.status, f"[red]{result.status}[/]") + (" [red]alarm[/]" if result.alarm else "")


def _figures(result: Result) -> tuple[str, ...]:
    pooled, measures = result.pooled, result.measures
    over = measures.over_refusal
    return (
        f"{result.alpha:g}" if result.status in ("released", "held_back") else "",
        share(measures.heldout_accuracy.adapted if measures.heldout_accuracy else None),
        share(measures.heldout_clean.adapted if measures.heldout_clean else None),
        share(measures.win_rate.value if measures.win_rate else None),
        f"{pooled.refused}/{pooled.n}" if pooled else "",
        f"{pooled.lower_bound:.3f}" if pooled else "",
        f"{(over.refused - over.base_refused) / over.n:+.1%}" if over and over.n else "",
    )


def share(value: float | None) -> str:
    """A share with two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def printable(text: str) -> str:
    """A user id for a terminal or a page, with control characters and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@cache
def templates(html: bool) -> Environment:
    """The templates of pages (HTML, escaped) or of cards (Markdown). A missing name is an error."""
    environment = Environment(
        loader=PackageLoader("persona_rlhf.release"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.filters["shell"] = shlex.quote
    return environment
