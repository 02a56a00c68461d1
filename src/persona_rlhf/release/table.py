"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from rich.markup import escape
from rich.table import Table

from persona_rlhf.release.results import Result, summarise

_MOST = 40  # users; a table of thousands is the report's to show


def results_table(results: Iterable[Result]) -> Table:
    """One row a user (of large runs those who need a look, then the first), and the medians.

    The results are gone through twice and never held all at once.
    """
    summary = summarise(results)
    caption = None
    if summary.users > _MOST:
        shown = nsmallest(_MOST, results, key=lambda r: (r.status == "released" and not r.alarm, r.alpha))
        caption = f"{_MOST} of {summary.users} users, those held back or in alarm first; the report says more"
    else:
        shown = list(results)
    table = Table(caption=caption, caption_justify="left")
    table.add_column("user", overflow="ellipsis", max_width=28)
    table.add_column("status")
    for name in ("alpha", "held-out", "noise-free", "win rate", "refused", "bound", "over-refusal"):
        table.add_column(name, justify="right")
    for result in shown:
        table.add_row(escape(printable(result.user_id)), _status(result), *_figures(result))
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
    pooled, over = result.pooled, result.over_refusal
    return (
        f"{result.alpha:g}" if result.status in ("released", "held_back") else "",
        share(result.heldout_accuracy.adapted if result.heldout_accuracy else None),
        share(result.heldout_clean.adapted if result.heldout_clean else None),
        share(result.win_rate.value if result.win_rate else None),
        f"{pooled.refused}/{pooled.n}" if pooled else "",
        f"{pooled.lower_bound:.3f}" if pooled else "",
        f"{(over.refused - over.base_refused) / over.n:+.1%}" if over and over.n else "",
    )


def share(value: float | None) -> str:
    """A share with two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def printable(text: str) -> str:
    """A user id as a terminal or a page may show it: control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
