"""Rendering for people: the table at the end of a run, static SVG charts, and the jinja2 templates."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from heapq import nsmallest
from math import floor
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import counted, visible
from persona_rlhf.common.version import __version__
from persona_rlhf.release.results import Result, RunSummary, summarise


def chart(kind: str, *values: Any) -> Markup:
    """An SVG chart, drawn by the macro of this name in `charts.html.j2` from its arguments."""
    macros: Any = _template("charts.html.j2").module
    return Markup(getattr(macros, kind)(*values))


def histogram(
    values: Sequence[float], low: float, high: float, bins: int, label: str, mark: float | None = None
) -> Markup:
    """A chart of counts of values in equal bins; `mark` draws a line, such as chance."""
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, floor((value - low) / (high - low) * bins)))] += 1
    return chart("histogram", counts, low, high, label, mark)


def bounds(rows: Sequence[tuple[str, float, float, float]], label: str) -> Markup:
    """A chart with one row per name: worst lower bound (left end), worst rate (right end), and demand (tick)."""
    low = min([0.9, *(min(bound, demand) for _, bound, _, demand in rows)])
    return chart("bounds", rows, floor(low * 20) / 20, label)


_MOST = 40  # users; the report shows more


def results_table(results: Iterable[Result]) -> Table:
    """One row per user, and the medians. Of large runs it shows the users with problems, then the first others.

    The results are read twice and never held all at once.
    """
    summary = summarise(results)
    caption = None
    if summary.users > _MOST:
        shown = nsmallest(_MOST, results, key=lambda r: (r.has_adapter and not r.alarm, r.alpha))
        caption = f"{_MOST} of {summary.users} users, those held back or in alarm first; the report shows more"
    else:
        shown = list(results)
    table = Table(caption=caption, caption_justify="left")
    table.add_column("user", overflow="ellipsis", max_width=28)
    table.add_column("status")
    for name in (
        "alpha",
        "held-out",
        "noise-free",
        "win rate",
        "over prior",
        "refused",
        "bound",
        "over-refusal",
        "look",
        "delta spent",
    ):
        table.add_column(name, justify="right")
    for result in shown:
        table.add_row(escape(visible(result.user_id)), _status(result), *_figures(result))
    table.add_section()
    table.add_row(
        f"median of {summary.users}",
        ", ".join(_counts(summary)),
        f"{summary.full_strength} at 1",
        share(summary.accuracy),
        share(summary.clean_accuracy),
        share(summary.win_rate),
        "",
        "",
        "" if summary.worst_bound is None else f">= {summary.worst_bound:.3f}",
        "",
        "" if summary.most_looks is None else f"<= {summary.most_looks}",
        "" if summary.most_spent is None else f"<= {summary.most_spent:.4f}",
        style="bold",
    )
    return table


def _counts(summary: RunSummary) -> Iterator[str]:
    """Users released; then those with the prior, held back, failed and in alarm, as far as there are any."""
    yield f"{summary.released} released"
    if summary.prior:
        yield f"{summary.prior} with the prior"
    held = f"held back ({summary.harmful} for harm)" if summary.harmful else "held back"
    for name, users in ((held, summary.held_back), ("failed", summary.failed), ("in alarm", summary.alarms)):
        if users:
            yield f"{users} {name}"


def _status(result: Result) -> str:
    words = {"released": "[green]released[/]", "prior": "[green]prior[/]", "held_back": "[yellow]held back[/]"}
    marks = [" [yellow]for harm[/]"] if result.harmful else []
    marks += [" [red]alarm[/]"] if result.alarm else []
    marks += [f" [yellow]{counted(result.broken_facts, 'fact')} changed[/]"] if result.broken_facts else []
    return words.get(result.status, f"[red]{result.status}[/]") + "".join(marks)


def _figures(result: Result) -> tuple[str, ...]:
    pooled, measures, spending = result.pooled, result.measures, result.spending
    over = measures.over_refusal
    return (
        f"{result.alpha:g}" if result.judged else "",
        share(measures.heldout_accuracy.adapted if measures.heldout_accuracy else None),
        share(measures.heldout_clean.adapted if measures.heldout_clean else None),
        share(measures.win_rate.value if measures.win_rate else None),
        f"{result.gain_over_prior.gain:+.2f}" if result.gain_over_prior else "",
        f"{pooled.refused}/{pooled.n}" if pooled else "",
        f"{pooled.lower_bound:.3f}" if pooled and result.looks else "",  # without a test there is no promise
        f"{(over.refused - over.base_refused) / over.n:+.1%}" if over and over.n else "",
        f"{spending.look}" if spending else "",
        f"{spending.spent:.4f}" if spending else "",
    )


def share(value: float | None) -> str:
    """A share with two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def render_template(template: str, **values: object) -> str:
    """A rendered template; `version` is in every one."""
    return _template(template).render(version=__version__, **values)


def _template(name: str) -> Template:
    """A template of pages (HTML, escaped) or of cards (Markdown). A missing value is an error."""
    return environment("persona_rlhf.release", html=name.endswith(".html.j2")).get_template(name)


@cache
def environment(package: str, html: bool) -> Environment:
    """Jinja2 with the templates of a package, whose values are escaped in HTML. A missing value is an error."""
    templates = Environment(
        loader=PackageLoader(package),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["printable"] = visible
    templates.filters["shell"] = shlex.quote
    return templates
