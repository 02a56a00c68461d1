"""The page of `data check --report`: counts and distributions of preference files, without any of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.data.check import DataSummary, notes_of
from persona_rlhf.release.render import histogram, render_template

_BINS = 20


def write_data_report(summary: DataSummary, paths: Sequence[Path], file: Path) -> None:
    """Writes the page of preference files. It names users whose choices follow a pattern, and needs no network.

    Raises InputError if the folder of `file` does not exist, or if `file` is one of the preference files.
    """
    if not file.parent.is_dir() or file.is_dir():
        sentence = f"cannot write the report to {file}; name a file in a folder that exists"
        raise InputError([Problem("--report", None, None, sentence)])
    if any(path.resolve() == file.resolve() for path in paths):
        raise InputError([Problem("--report", None, None, f"{file} is a preference file; name another file")])
    page = render_template(
        "data_report.html.j2",
        names=[path.name for path in paths],
        summary=summary,
        notes=notes_of(summary),
        charts=list(_charts(summary)),
    )
    atomic_write(file, page)


def _charts(summary: DataSummary) -> Sequence[tuple[str, Markup]]:
    values = summary.distributions
    counts = [("Pairs per user", "users by their number of pairs", values.pairs_per_user)]
    counts += [(f"Words, {name}", "pairs by the words of this text", of_text) for name, of_text in values.words.items()]
    charts = [(title, histogram(of, 0, max(of) + 1, _BINS, label)) for title, label, of in counts]
    if values.longer_by_user:
        label = "users by the share of their pairs whose chosen answer is the longer one"
        charts.append(("Chosen is the longer", histogram(values.longer_by_user, 0, 1, _BINS, label, 0.5)))
    return charts
