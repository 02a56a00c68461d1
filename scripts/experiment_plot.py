"""A picture of the experiment: what users keep of their taste, and the base of its refusals.

One panel a population, layers and screen. Across: mean gain in held-out accuracy over chance at full strength, as a
share of plain DPO's of the same users; up: mean refusals of test probes, in percent of the base's. Bars are 95%
bootstrap intervals over people; fewer than eight people have none. A method on the front is filled: no other keeps at
least as much of both, and more of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple
from xml.sax.saxutils import escape

from experiment_table import Summary

WIDTH, HEIGHT, LEFT, BELOW, ACROSS = 300, 230, 46, 40, 3
COLOURS = ("#1b6ca8", "#c4541d", "#3b8132", "#8a3ab9", "#a67c00", "#b8336a", "#2b7a78", "#555555", "#7a4a2b")
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:11px;fill:#222}.title{font-weight:600;font-size:12px}"
    ".tick{text-anchor:middle;fill:#555}.side{text-anchor:end;fill:#555}.grid{stroke:#ddd}"
)


class Point(NamedTuple):
    """A method in one panel: the share that is kept, and refusals in percent, each with the ends of its interval.

    Without an interval both ends are the figure, and no bar is seen.
    """

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


def points_of(methods: Mapping[str, Summary]) -> list[Point]:
    """The methods of a panel that have both figures, where there is a gain to keep."""
    points = []
    for name, of in methods.items():
        if of.test and of.accuracy_kept:
            kept, refused = of.accuracy_kept, of.test
            across, up = kept.interval or (kept.value,) * 2, refused.interval or (refused.mean,) * 2
            if all(map(isfinite, across)):
                points.append(Point(name, kept.value, tuple(across), 100 * refused.mean, (100 * up[0], 100 * up[1])))
    return points


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
        title_of = f"{point.name}: keeps {point.kept:.3f} of plain DPO's gain, {point.refused:.2f}% of refusals"
        parts += [
            axes.line((point.kept_interval[0], point.refused), (point.kept_interval[1], point.refused), look),
            axes.line((point.kept, point.refused_interval[0]), (point.kept, point.refused_interval[1]), look),
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
            f"<title>{escape(title_of)}</title></circle>",
        ]
    under = f'x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT - 8}" class="tick"'
    return [*parts, f"<text {under}>share of plain DPO's accuracy gain kept</text>"]


def picture(groups: Mapping[str, Mapping[str, Summary]]) -> str:
    """All groups by title whose users have a gain to keep, in rows of panels, and a key. Values are by method."""
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
        f"<title>The experiment: taste and refusals kept, by users</title><style>{STYLE}</style>"
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"
