"""impact.json and impact.html: each line of the taxonomy as a measurement. They name no user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pydantic import TypeAdapter

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.evaluation.impact import ImpactMeasure
from persona_rlhf.evaluation.impact_evidence import ImpactValue
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.render import render_template
from persona_rlhf.release.results import plain

IMPACT, IMPACT_PAGE = "impact.json", "impact.html"
FORMAT = 1


def write_impact(run: Path, measures: Sequence[ImpactMeasure], users: int, of_users: int) -> Path:
    """Writes both files, and their hashes in the manifest of the run; returns the page.

    `users` of the `of_users` users of the run entered the measures.
    """
    content = {"format": FORMAT, "users": users, "of_users": of_users, "measures": plain(list(measures))}
    atomic_write(run / IMPACT, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    sections = [(group, list(lines)) for group, lines in groupby(measures, key=lambda measure: measure.group)]
    page = render_template(
        "impact.html.j2",
        name=run.name,
        sections=sections,
        measures=measures,
        users=users,
        of_users=of_users,
        shown=shown,
    )
    atomic_write(run / IMPACT_PAGE, page.encode())
    _record(run)
    return run / IMPACT_PAGE


def remove_impact(run: Path) -> None:
    """Removes both files: they are about other users than the run has now."""
    for name in (IMPACT, IMPACT_PAGE):
        (run / name).unlink(missing_ok=True)
    _record(run)


def _record(run: Path) -> None:
    if (run / RUN_MANIFEST).exists():
        for name in (IMPACT, IMPACT_PAGE):
            write_run_manifest(run, only=name)


def impact_in(run: Path) -> list[ImpactMeasure]:
    """The measures in RUN/impact.json; none if the impact was never measured.

    Raises InputError for a file that holds no such measures.
    """
    file = run / IMPACT
    if not file.exists():
        return []
    try:
        return _MEASURES.validate_python(json.loads(file.read_bytes())["measures"])
    except (OSError, ValueError, LookupError, TypeError) as fault:
        sentence = f"the measures cannot be read ({type(fault).__name__}); `report RUN --impact` writes them again"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault


_MEASURES = TypeAdapter(list[ImpactMeasure])


def shown(value: ImpactValue) -> str:
    """A value with its interval or its p-value, in words."""
    number = f"{value.value:g}" if value.low is None and value.value == int(value.value) else f"{value.value:.3g}"
    parts = [] if value.low is None or value.high is None else [f"95% {value.low:.3g} to {value.high:.3g}"]
    parts += [] if value.p_value is None else [f"p = {value.p_value:.2g}"]
    parts += [] if value.limit is None else [f"the policy allows {value.limit:g}"]
    return f"{number} ({', '.join(parts)})" if parts else number
