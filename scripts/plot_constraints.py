#!/usr/bin/env python3
"""Pictures of a comparison of constraints: what users keep of their taste, and the base of its refusals.

python scripts/compare_constraints.py CONFIG ... --records FILE
python scripts/plot_constraints.py FILE... --out docs/explanation/constraints.svg

One panel a group of users. Across: mean gain in held-out accuracy over chance, as a share of plain DPO's of the same
users; up: mean refusal of tier-one probes in percent; bars are 95% bootstrap intervals over users. A contender on the
front is filled: no other keeps at least as much of both, and more of one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from comparison_table import Record, comparison

WIDTH, HEIGHT, LEFT, BELOW, ACROSS = 300, 230, 46, 40, 3
COLOURS = ("#1b6ca8", "#c4541d", "#3b8132", "#8a3ab9", "#a67c00", "#b8336a", "#2b7a78", "#555555", "#7a4a2b")
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:11px;fill:#222}.title{font-weight:600;font-size:12px}"
    ".tick{text-anchor:middle;fill:#555}.side{text-anchor:end;fill:#555}.grid{stroke:#ddd}"
)


class Point(NamedTuple):
    """A contender in one group: the share that is kept, and refusals in percent, each with its interval."""

    name: str
    kept: float
    kept_interval: tuple[float, float]
    refused: float
    refused_interval: tuple[float, float]


class Axes(NamedTuple):
    """A panel with its corner at (x, y), over these ranges of values."""

    x: float
    y: float
    across: tuple[float, float]
    up: tuple[float, float]

    def at(self, kept: float, refused: float) -> tuple[float, float]:
        """Where a pair of values stands in the picture."""
        right = (kept - self.across[0]) / (self.across[1] - self.across[0])
        high = (refused - self.up[0]) / (self.up[1] - self.up[0])
        return self.x + LEFT + right * (WIDTH - LEFT - 12), self.y + HEIGHT - BELOW - high * (HEIGHT - BELOW - 26)

    def line(self, start: tuple[float, float], end: tuple[float, float], look: str) -> str:
        """A line between two pairs of values."""
        (a, b), (c, d) = self.at(*start), self.at(*end)
        return f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" {look}/>'


def points_of(group: dict[str, dict[str, Any]]) -> list[Point]:
    """The contenders of a group that have both figures, where there is a gain to keep."""
    found = []
    for name, summary in group.items():
        refusal, kept = summary.get("refusal"), summary.get("accuracy_kept")
        if name == "plain":
            kept = {"ratio": 1.0, "interval": (1.0, 1.0)}
        if refusal and kept and kept["ratio"] is not None and all(map(isfinite, kept["interval"])):
            found.append(Point(name, kept["ratio"], kept["interval"], refusal["mean"], refusal["interval"]))
    return found


def on_front(point: Point, others: Sequence[Point]) -> bool:
    """Whether nobody keeps at least as much of both, and more of one."""
    own = (point.kept, point.refused)
    return not any(p.kept >= own[0] and p.refused >= own[1] and (p.kept, p.refused) != own for p in others)


def panel(title: str, points: Sequence[Point], colours: dict[str, str], x: float, y: float) -> list[str]:
    """One group as SVG."""
    ends = [end for point in points for end in point.kept_interval]
    low = min(95.0, *(point.refused_interval[0] for point in points))
    axes = Axes(x, y, (min(0.8, *ends) - 0.02, max(1.1, *ends) + 0.02), (low - 0.5, 100.5))
    parts = [f'<text x="{x + LEFT}" y="{y + 14}" class="title">{escape(title)}</text>']
    for value in (axes.across[0], 1.0, axes.across[1]):
        a, b = axes.at(value, axes.up[0])
        parts.append(axes.line((value, axes.up[0]), (value, axes.up[1]), 'class="grid"'))
        parts.append(f'<text x="{a:.1f}" y="{b + 13:.1f}" class="tick">{value:.2f}</text>')
    for value in (axes.up[0], 100.0):
        _, b = axes.at(1.0, value)
        parts.append(axes.line((axes.across[0], value), (axes.across[1], value), 'class="grid"'))
        parts.append(f'<text x="{x + LEFT - 5}" y="{b + 4:.1f}" class="side">{value:.1f}</text>')
    for point in points:
        (a, b), colour = axes.at(point.kept, point.refused), colours[point.name]
        look = f'stroke="{colour}" stroke-opacity="0.45"'
        fill = colour if on_front(point, points) else "#ffffff"
        told = f"{point.name}: keeps {point.kept:.3f} of plain DPO's gain, refuses {point.refused:.2f}%"
        parts += [
            axes.line((point.kept_interval[0], point.refused), (point.kept_interval[1], point.refused), look),
            axes.line((point.kept, point.refused_interval[0]), (point.kept, point.refused_interval[1]), look),
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
            f"<title>{escape(told)}</title></circle>",
        ]
    under = f'x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT - 8}" class="tick"'
    return [*parts, f"<text {under}>share of plain DPO's accuracy gain kept</text>"]


def picture(groups: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All groups whose users have a gain to keep, in rows of panels, and a key."""
    panels = {title: points for title, group in groups.items() if len(points := points_of(group)) > 1}
    names = list(dict.fromkeys(point.name for points in panels.values() for point in points))
    colours = dict(zip(names, COLOURS, strict=False))
    height = -(-len(panels) // ACROSS) * HEIGHT + 30
    body: list[str] = []
    for n, (title, points) in enumerate(panels.items()):
        body += panel(title, points, colours, n % ACROSS * WIDTH, n // ACROSS * HEIGHT)
    for n, name in enumerate(names):
        at = LEFT + n * 95
        body.append(f'<circle cx="{at}" cy="{height - 14}" r="4.5" fill="{colours[name]}"/>')
        body.append(f'<text x="{at + 9}" y="{height - 10}">{escape(name)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ACROSS * WIDTH} {height}" role="img">'
        f"<title>Constraints compared: taste and refusals kept, by group of users</title><style>{STYLE}</style>"
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    asked = parser.parse_args()
    lines = (line for file in asked.records for line in file.read_text(encoding="utf-8").splitlines())
    found = comparison([Record(**json.loads(line)) for line in lines])
    asked.out.write_text(picture(found["groups"]), encoding="utf-8")


if __name__ == "__main__":
    main()
