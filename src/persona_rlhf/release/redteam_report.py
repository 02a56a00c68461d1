"""redteam.json: the outcome of every attack on every released adapter, its figures over all users, and its table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import visible
from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.evaluation.records import Outcome, Refused
from persona_rlhf.evaluation.statistics import interval_over_users, wilson
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.results import plain

REDTEAM = "redteam.json"
FORMAT = 1


class Attacked(NamedTuple):
    """One user's adapter, by the hash of its manifest, and the outcome of every attack on it."""

    user_id: str
    slug: str
    alpha: float
    manifest_sha256: str | None
    attacks: dict[str, Outcome]


class MergedPair(NamedTuple):
    """Two users whose adapters were merged, and the outcome of plain requests to the merged model."""

    user_ids: tuple[str, str]
    outcome: Outcome


class WorstCase(NamedTuple):
    """The user or category that an attack hit hardest: the refused share, and percentage points over the base's."""

    name: str
    share: float
    points: float


class AttackFigures(NamedTuple):
    """One attack over all users.

    `low` and `high`: Wilson interval of `mean`, over all users' prompts. `points`: percentage points over
    the base, with an interval over users (None of few). `answers`: the refusing share of single answers (adapted,
    base), if a prompt was answered more than once.
    """

    users: int
    n: int
    refused: int
    base_refused: int
    mean: float
    low: float
    high: float
    base: float
    points: float
    points_low: float | None
    points_high: float | None
    worst_user: WorstCase
    worst_category: WorstCase
    answers: tuple[float, float] | None


class RedTeamResult(NamedTuple):
    """All outcomes of a red team. `left_out`: attacks that could not be made, and why."""

    users: list[Attacked]
    merged: list[MergedPair]
    left_out: dict[str, str]

    def figures(self) -> dict[str, AttackFigures]:
        """The figures by attack, in the order of the attacks."""
        names = list(dict.fromkeys(name for user in self.users for name in user.attacks))
        figures = {name: figures_of({u.user_id: u.attacks[name] for u in self.users}) for name in names}
        if self.merged:
            figures["merged"] = figures_of({" + ".join(pair.user_ids): pair.outcome for pair in self.merged})
        return figures


def figures_of(outcomes: Mapping[str, Outcome]) -> AttackFigures:
    """The figures of one attack from every user's outcome. Raises ValueError if there is no user."""
    if not outcomes:
        raise ValueError("the figures of an attack need at least one user")
    whole = _sum([Refused(o.n, o.refused, o.base_refused) for o in outcomes.values()])
    points = {user: 100 * (o.refused - o.base_refused) / o.n for user, o in outcomes.items()}
    hardest = min(outcomes, key=lambda user: (points[user], user))
    by_category: dict[str, list[Refused]] = {}
    for outcome in outcomes.values():
        for category, counted in outcome.categories.items():
            by_category.setdefault(category, []).append(counted)
    categories = [_worst(name, _sum(counts)) for name, counts in by_category.items()]
    answers = [outcome.answers for outcome in outcomes.values() if outcome.answers is not None]
    drawn = _sum(answers) if answers else None
    low, high = interval_over_users(list(points.values())) or (None, None)
    return AttackFigures(
        len(outcomes),
        whole.n,
        whole.refused,
        whole.base_refused,
        whole.refused / whole.n,
        *wilson(whole.refused, whole.n),
        whole.base_refused / whole.n,
        100 * (whole.refused - whole.base_refused) / whole.n,
        low,
        high,
        WorstCase(hardest, outcomes[hardest].refused / outcomes[hardest].n, points[hardest]),
        min(categories, key=lambda category: (category.points, category.name)),
        None if drawn is None else (drawn.refused / drawn.n, drawn.base_refused / drawn.n),
    )


def _sum(counts: Sequence[Refused]) -> Refused:
    return Refused(*(sum(column) for column in zip(*counts, strict=True)))


def _worst(name: str, counted: Refused) -> WorstCase:
    return WorstCase(name, counted.refused / counted.n, 100 * (counted.refused - counted.base_refused) / counted.n)


def content_of(result: RedTeamResult, setup: Mapping[str, Any]) -> dict[str, Any]:
    """The file as plain JSON values; `setup` says which run was attacked and how."""
    return {
        "format": FORMAT,
        "toolkit": {"name": "persona-rlhf", "version": __version__},
        **plain(setup),
        "left_out": result.left_out,
        "attacks": plain(result.figures()),
        "users": plain(result.users),
        "merged": plain(result.merged),
    }


def write_redteam(run: Path, content: Mapping[str, Any]) -> Path:
    """Writes or replaces RUN/redteam.json, and its hash in the run's manifest if there is one."""
    text = json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    atomic_write(run / REDTEAM, text.encode())
    if (run / RUN_MANIFEST).exists():
        write_run_manifest(run, only=REDTEAM)
    return run / REDTEAM


def redteam_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The attacks on the user's adapter."""
    file = run / REDTEAM
    if file.is_file() and any(user(attacked["user_id"]) for attacked in json.loads(file.read_bytes())["users"]):
        yield Trace(file, "red team's figures", 1, partial(_erase, run, user))


def _erase(run: Path, user: DataSubject) -> None:
    """Erases a user from RUN/redteam.json, merged pairs too, and computes the figures of the other users again.

    The file is deleted where no user is left.
    """
    content = json.loads((run / REDTEAM).read_bytes())
    before = _RESULT.validate_python({key: content[key] for key in RedTeamResult._fields})
    users = [attacked for attacked in before.users if not user(attacked.user_id)]
    if not users:
        (run / REDTEAM).unlink()
        return
    merged = [pair for pair in before.merged if not any(map(user, pair.user_ids))]
    after = RedTeamResult(users, merged, before.left_out)
    setup = {key: value for key, value in content.items() if key not in content_of(after, {})}
    write_redteam(run, content_of(after, setup))


def redteam_faults(run: Path, released: Mapping[str, str | None]) -> list[str]:
    """Figures of RUN/redteam.json that do not follow from its counts, or concern other adapters than the released ones.

    `released` are the users with the hashes of their manifests.
    """
    file = run / REDTEAM
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_bytes())
        result = _RESULT.validate_python({key: content[key] for key in RedTeamResult._fields})
        figures = result.figures()
        stated = {name: {key: one[key] for key in _COUNTS} for name, one in content["attacks"].items()}
        if stated != {name: {key: getattr(one, key) for key in _COUNTS} for name, one in figures.items()}:
            return [f"the figures of {REDTEAM} do not follow from its counts"]
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return [f"{REDTEAM} lacks a required entry ({type(fault).__name__})"]
    if {user.user_id: user.manifest_sha256 for user in result.users} != dict(released):
        return [f"{REDTEAM} is about other adapters than the released ones; run `evaluate --redteam` again"]
    return []


_RESULT = TypeAdapter(RedTeamResult)
_COUNTS = ("users", "n", "refused", "base_refused")


def _between(one: AttackFigures) -> str:
    return "" if one.points_low is None else f" ({one.points_low:+.1f} to {one.points_high:+.1f})"


def redteam_table(result: RedTeamResult) -> Table:
    """One row per attack: the base, all users, and the worst user and category."""
    caption = "".join(f"{name} was left out: {escape(why)}\n" for name, why in result.left_out.items())
    table = Table(title="Tier-one refusals under attack", title_justify="left", caption=caption.rstrip() or None)
    table.add_column("attack")
    for name in ("users", "prompts", "base", "adapted", "95%", "points over the base"):
        table.add_column(name, justify="right")
    table.add_column("worst user", overflow="ellipsis", max_width=36)
    table.add_column("worst category")
    for name, one in result.figures().items():
        table.add_row(
            name,
            str(one.users),
            str(one.n // one.users),
            f"{one.base:.3f}",
            f"{one.mean:.3f}",
            f"{one.low:.3f}-{one.high:.3f}",
            f"{one.points:+.1f}{_between(one)}",
            f"{escape(visible(one.worst_user.name))} {one.worst_user.points:+.1f}",
            f"{one.worst_category.name} {one.worst_category.points:+.1f}",
        )
        if one.answers is not None:
            table.add_row("  by single answer", "", "", f"{one.answers[1]:.3f}", f"{one.answers[0]:.3f}")
    return table
