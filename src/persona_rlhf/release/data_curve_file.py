"""RUN/data_curve.json: the data-need curves of `evaluate RUN --data-curve`: file, table and section of the report.

`users` holds the curves of users; `all_users` and `need` follow from them, so a deletion computes them again. Without a
basis a deletion removes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from math import log2
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem, visible
from persona_rlhf.common.files import atomic_write
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.evaluation.data_curve import CurvePoint, DataNeed, UserCurve, data_need, over_users
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.render import render_template
from persona_rlhf.release.results import plain

DATA_CURVE = "data_curve.json"
FORMAT = 1
NOTE = (
    "These are curves of the labels: a reward is fitted to growing random parts of each user's pairs, and orders the "
    "user's held-out pairs. Adapters were not trained anew; they learn less than the reward."
)


class DataCurve(NamedTuple):
    """The curves of a run's users, and the kind of reward that is fitted."""

    reward: Literal["basis", "features"]
    users: Sequence[UserCurve]

    @property
    def all_users(self) -> list[CurvePoint]:
        """The curve over users."""
        return over_users(self.users)

    @property
    def need(self) -> DataNeed | None:
        """The pairs needed, by these users."""
        return data_need(self.users)

    def to_json(self) -> dict[str, Any]:
        """The file as plain JSON values."""
        return {
            "format": FORMAT,
            "note": NOTE,
            "reward": self.reward,
            "need": plain(self.need),
            "all_users": plain(self.all_users),
            "users": plain(self.users),
        }


_CURVE = TypeAdapter(DataCurve)


def write_data_curve(run: Path, curve: DataCurve) -> Path:
    """Writes or replaces RUN/data_curve.json, and its hash in the run's manifest if there is one."""
    text = json.dumps(curve.to_json(), indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    atomic_write(run / DATA_CURVE, text.encode())
    if (run / RUN_MANIFEST).exists():
        write_run_manifest(run, only=DATA_CURVE)
    return run / DATA_CURVE


def data_curve_of(run: Path) -> DataCurve | None:
    """The curves in RUN/data_curve.json; None where there is none.

    Raises InputError for a file that holds no curves.
    """
    file = run / DATA_CURVE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_bytes())
        curve = _CURVE.validate_python({key: content[key] for key in DataCurve._fields})
        if not curve.users or not all(user.points for user in curve.users):
            raise ValueError("a curve without a point")
        return curve
    except (OSError, ValueError, LookupError, TypeError) as fault:
        sentence = f"the curves cannot be read ({type(fault).__name__}); `evaluate RUN --data-curve` writes them again"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault


def data_curve_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's curve; none in a file that cannot be read, which `remove_shared_curves` removes."""
    curve = _readable(run)
    if curve is not None and any(user(one.user_id) for one in curve.users):
        yield Trace(run / DATA_CURVE, "data-need curve", 1, partial(_erase, run, user))


def _erase(run: Path, user: DataSubject) -> None:
    """Erases a user's curve, and computes the figures over the other users again; without one the file is deleted."""
    curve = _readable(run)
    left = [] if curve is None else [one for one in curve.users if not user(one.user_id)]
    if curve is None or not left:
        (run / DATA_CURVE).unlink(missing_ok=True)
    else:
        write_data_curve(run, curve._replace(users=left))


def remove_shared_curves(run: Path) -> None:
    """Removes the file where one user's deletion makes all of it stale: the curves of a reward without a basis.

    All users' texts scale the features of such a reward, those of users without a curve too. A file that cannot be read
    is also removed, since it may hold anybody's curve.
    """
    curve = _readable(run)
    if not (run / DATA_CURVE).exists() or (curve is not None and curve.reward == "basis"):
        return
    (run / DATA_CURVE).unlink()
    if (run / RUN_MANIFEST).exists():
        write_run_manifest(run, only=DATA_CURVE)


def _readable(run: Path) -> DataCurve | None:
    """The curves; None also where they cannot be read."""
    try:
        return data_curve_of(run)
    except InputError:
        return None


def data_curve_table(curve: DataCurve) -> Table:
    """One row a user and one over users, with the accuracy at each number of pairs, and the adapter's."""
    all_users, need = curve.all_users, curve.need
    sizes = sorted({point.pairs for one in curve.users for point in one.points})
    caption = NOTE if need is None else f"{need.sentence()}. {NOTE}"
    table = Table(title="Held-out accuracy by number of pairs", title_justify="left", caption=caption)
    table.add_column("user", overflow="ellipsis", max_width=28)
    for size in (*sizes, "adapter (pairs)"):
        table.add_column(f"{size}", justify="right")
    for one in curve.users:
        by_size = {point.pairs: f"{point.accuracy:.2f}" for point in one.points}
        adapter = "" if one.adapter is None else f"{one.adapter.accuracy:.2f} ({one.adapter.pairs})"
        table.add_row(escape(visible(one.user_id)), *(by_size.get(size, "") for size in sizes), adapter)
    table.add_section()
    means = {point.pairs: _in_words(point) for point in all_users}
    table.add_row("mean", *(means.get(size, "") for size in sizes), "")
    return table


def _in_words(point: CurvePoint) -> str:
    interval = "" if point.low is None or point.high is None else f" ({point.low:.2f}-{point.high:.2f})"
    return f"{point.accuracy:.2f}{interval}"


class DrawnCurve(NamedTuple):
    """The curve over users for the report: its points in an SVG of 560 by 200, and the values behind them."""

    points: Sequence[CurvePoint]
    line: str
    band: str
    places: Sequence[tuple[float, float]]


_SHOWN = 100  # users of the report


def data_curve_section(curve: DataCurve) -> Markup:
    """The curves as a section of the report."""
    sizes = sorted({point.pairs for one in curve.users for point in one.points})
    section = render_template(
        "data_curve.html.j2",
        need=curve.need,
        note=NOTE,
        curve=drawn(curve.all_users),
        sizes=sizes,
        users=curve.users[:_SHOWN],
        left_out=len(curve.users[_SHOWN:]),
    )
    return Markup(section)


def drawn(points: Sequence[CurvePoint]) -> DrawnCurve:
    """A curve over users, from accuracy 0.4 to 1, over the logarithm of 1 + pairs; the band ends with the intervals."""
    widest = log2(1 + max((point.pairs for point in points), default=1))

    def x(point: CurvePoint) -> float:
        return round(40 + 500 * log2(1 + point.pairs) / widest, 1)

    def y(value: float) -> float:
        return round(180 - 160 * (min(1.0, max(0.4, value)) - 0.4) / 0.6, 1)

    places = [(x(point), y(point.accuracy)) for point in points]
    band = [(x(point), y(point.high)) for point in points if point.high is not None]
    band += [(x(point), y(point.low)) for point in reversed(points) if point.low is not None]
    line, area = (" ".join(f"{across},{down}" for across, down in each) for each in (places, band))
    return DrawnCurve(points, line, area, places)
