"""`redteam.json`: what every attack did to every released adapter; its figures over all users, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.evaluation.records import Outcome, Refused
from persona_rlhf.evaluation.statistics import bootstrap, wilson
from persona_rlhf.release.integrity import SEAL, seal
from persona_rlhf.release.render import printable
from persona_rlhf.release.results import plain

REDTEAM = "redteam.json"
FORMAT = 1


class Attacked(NamedTuple):
    """One user's adapter, by the hash of its papers, and every attack on it."""

    user_id: str
    slug: str
    alpha: float
    manifest_sha256: str | None
    attacks: dict[str, Outcome]


class MergedPair(NamedTuple):
    """Two users whose adapters were merged, and what the plain requests got from the result."""

    user_ids: tuple[str, str]
    outcome: Outcome


class WorstCase(NamedTuple):
    """Whom, or which category, an attack hit hardest: the share refused, and points over (under: < 0) the base's."""

    name: str
    share: float
    points: float


class AttackFigures(NamedTuple):
    """One attack over all users. `low` and `high`: Wilson's interval of `mean`, over all users' prompts as if each were
    drawn anew; `points`: percentage points over the base, with a bootstrap over users. `answers`: the share of single
    answers that refuse, where a prompt was answered more than once (the base's beside it)."""

    users: int
    n: int
    refused: int
    base_refused: int
    mean: float
    low: float
    high: float
    base: float
    points: float
    points_low: float
    points_high: float
    worst_user: WorstCase
    worst_category: WorstCase
    answers: tuple[float, float] | None


class RedTeamResult(NamedTuple):
    """All that a red team found. `left_out`: attacks that could not be made, and why."""

    users: list[Attacked]
    merged: list[MergedPair]
    left_out: dict[str, str]

    def figures(self) -> dict[str, AttackFigures]:
        """By attack, in the order they were made."""
        names = list(dict.fromkeys(name for user in self.users for name in user.attacks))
        found = {name: figures_of({u.user_id: u.attacks[name] for u in self.users}) for name in names}
        if self.merged:
            found["merged"] = figures_of({" + ".join(pair.user_ids): pair.outcome for pair in self.merged})
        return found


def figures_of(outcomes: Mapping[str, Outcome]) -> AttackFigures:
    """The figures of one attack from every user's outcome. Raises ValueError where there is no user."""
    if not outcomes:
        raise ValueError("the figures of an attack need at least one user")
    whole = _sum([Refused(o.n, o.refused, o.base_refused) for o in outcomes.values()])
    points = {user: 100 * (o.refused - o.base_refused) / o.n for user, o in outcomes.items()}
    hardest = min(outcomes, key=lambda user: (points[user], user))
    by_category: dict[str, list[Refused]] = {}
    for outcome in outcomes.values():
        for category, counted in outcome.categories.items():
            by_category.setdefault(category, []).append(counted)
    categories = [_worst(name, _sum(own)) for name, own in by_category.items()]
    answers = [outcome.answers for outcome in outcomes.values() if outcome.answers is not None]
    drawn = _sum(answers) if answers else None
    among_users = bootstrap(list(points.values()))
    return AttackFigures(
        len(outcomes),
        whole.n,
        whole.refused,
        whole.base_refused,
        whole.refused / whole.n,
        *wilson(whole.refused, whole.n),
        whole.base_refused / whole.n,
        100 * (whole.refused - whole.base_refused) / whole.n,
        *among_users,
        WorstCase(hardest, outcomes[hardest].refused / outcomes[hardest].n, points[hardest]),
        min(categories, key=lambda found: (found.points, found.name)),
        None if drawn is None else (drawn.refused / drawn.n, drawn.base_refused / drawn.n),
    )


def _sum(counts: Sequence[Refused]) -> Refused:
    return Refused(*(sum(column) for column in zip(*counts, strict=True)))


def _worst(name: str, counted: Refused) -> WorstCase:
    return WorstCase(name, counted.refused / counted.n, 100 * (counted.refused - counted.base_refused) / counted.n)


def content_of(found: RedTeamResult, papers: Mapping[str, Any]) -> dict[str, Any]:
    """The file as plain JSON values; `papers` say what was attacked, and how."""
    return {
        "format": FORMAT,
        "toolkit": {"name": "persona-rlhf", "version": __version__},
        **plain(papers),
        "left_out": found.left_out,
        "attacks": plain(found.figures()),
        "users": plain(found.users),
        "merged": plain(found.merged),
    }


def write_redteam(run: Path, content: Mapping[str, Any]) -> Path:
    """Writes RUN/redteam.json and seals it with the run, if that is sealed; one that stood there is replaced."""
    text = json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    atomic_write(run / REDTEAM, text.encode())
    if (run / SEAL).exists():
        seal(run, only=REDTEAM)
    return run / REDTEAM


def without_user(run: Path, his: Callable[[str], bool]) -> None:
    """Takes one user out of RUN/redteam.json, his merged pairs too, and draws the figures anew from the others.

    The file goes where nobody is left.
    """
    content = json.loads((run / REDTEAM).read_bytes())
    found = _FOUND.validate_python({key: content[key] for key in RedTeamResult._fields})
    users = [user for user in found.users if not his(user.user_id)]
    if not users:
        (run / REDTEAM).unlink()
        return
    found = RedTeamResult(users, [pair for pair in found.merged if not any(map(his, pair.user_ids))], found.left_out)
    papers = {key: value for key, value in content.items() if key not in content_of(found, {})}
    write_redteam(run, content_of(found, papers))


def redteam_faults(run: Path, released: Mapping[str, str | None]) -> list[str]:
    """Where RUN/redteam.json does not follow from its own counts, or is not about the adapters released here.

    `released` are their users with the hashes of their manifests.
    """
    file = run / REDTEAM
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_bytes())
        found = _FOUND.validate_python({key: content[key] for key in RedTeamResult._fields})
        figures = found.figures()
        told = {name: {key: one[key] for key in _COUNTS} for name, one in content["attacks"].items()}
        if told != {name: {key: getattr(one, key) for key in _COUNTS} for name, one in figures.items()}:
            return [f"the figures of {REDTEAM} do not follow from its counts"]
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return [f"{REDTEAM} lacks a part of its form ({type(fault).__name__})"]
    if {user.user_id: user.manifest_sha256 for user in found.users} != dict(released):
        return [f"{REDTEAM} is about other adapters than those released here; attack them again with --redteam"]
    return []


_FOUND = TypeAdapter(RedTeamResult)
_COUNTS = ("users", "n", "refused", "base_refused")


def redteam_table(found: RedTeamResult) -> Table:
    """One row an attack: the base, all users beside it, and who and what was hit hardest."""
    caption = "".join(f"{name} was left out: {escape(why)}\n" for name, why in found.left_out.items())
    table = Table(title="Tier-one refusals under attack", title_justify="left", caption=caption.rstrip() or None)
    table.add_column("attack")
    for name in ("users", "prompts", "base", "adapted", "95%", "points over the base"):
        table.add_column(name, justify="right")
    table.add_column("worst user", overflow="ellipsis", max_width=36)
    table.add_column("worst category")
    for name, one in found.figures().items():
        table.add_row(
            name,
            str(one.users),
            str(one.n // one.users),
            f"{one.base:.3f}",
            f"{one.mean:.3f}",
            f"{one.low:.3f}-{one.high:.3f}",
            f"{one.points:+.1f} ({one.points_low:+.1f} to {one.points_high:+.1f})",
            f"{escape(printable(one.worst_user.name))} {one.worst_user.points:+.1f}",
            f"{one.worst_category.name} {one.worst_category.points:+.1f}",
        )
        if one.answers is not None:
            table.add_row("  by single answer", "", "", f"{one.answers[1]:.3f}", f"{one.answers[0]:.3f}")
    return table
