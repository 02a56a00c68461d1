"""Two runs side by side (`report A B`): decisions, settings that differ, paired differences over users, and alarms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup

from persona_rlhf.common.errors import InputError, counted, visible
from persona_rlhf.common.files import atomic_write
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.evaluation.impact_statistics import mean_interval
from persona_rlhf.evaluation.statistics import FEWEST_OF_INTERVAL, Interval
from persona_rlhf.release.comparison import FIGURES
from persona_rlhf.release.decision import Decision, decision_of, identity_of
from persona_rlhf.release.impact_report import impact_in
from persona_rlhf.release.render import chart, render_template
from persona_rlhf.release.report import config_of, policy_of
from persona_rlhf.release.results import Result, RunResults, Status, guarantee_of_run, summarise

_MOST_ROWS = 1000
_ACCURACY = "held-out accuracy"
_PLACES = ("name", "run.dir")  # they differ between any two runs


class UserOfRun(NamedTuple):
    """A user's verdict in one run, and the figures of `FIGURES` that were measured.

    `bound`: the lower bound of the refusal rate, pooled over tier one. `heldout`: the hash of the held-out pairs.
    """

    status: Status
    alarm: bool
    alpha: float
    bound: float | None
    heldout: str | None
    figures: dict[str, float]

    @staticmethod
    def of(result: Result) -> UserOfRun:
        """The user of a line of results.jsonl."""
        judged = result.pooled is not None
        values = {name: figure(result) for name, figure in FIGURES.items()} if judged else {}
        return UserOfRun(
            result.status,
            result.alarm,
            result.alpha,
            None if result.pooled is None else result.pooled.lower_bound,
            None if result.spending is None else result.spending.heldout,
            {name: value for name, value in values.items() if value is not None},
        )


class OneRun(NamedTuple):
    """One side of the page: what the report of the run says first, and its users by id."""

    label: str
    name: str
    decision: Decision
    promise: str
    identity: dict[str, str]
    settings: dict[str, str]
    users: dict[str, UserOfRun]

    @staticmethod
    def read(label: str, run: Path) -> OneRun:
        """The run of a folder. Raises InputError if it has no results, or its policy cannot be read."""
        results, config, policy = RunResults(run), config_of(run), policy_of(run)
        gated = bool(({"enabled": True} | (config.get("gate") or {}))["enabled"])
        summary = summarise(results)
        promise = guarantee_of_run(config, policy, results, summary.users)
        return OneRun(
            label,
            visible(f"{config.get('name', 'run')} ({run.absolute().name})"),
            decision_of(results, summary, gated, impact_in(run)),
            "No adapter has a guarantee: the gate was off." if promise is None else promise.sentence(),
            dict(row for row in identity_of(run, config) if row[0] != "again"),
            settings_of(run, policy),
            {result.user_id: UserOfRun.of(result) for result in results},
        )


class PairedDifference(NamedTuple):
    """A figure over the users in both runs: its means, and the mean of B less A with its 95% t interval.

    `interval` is None for fewer than 8 users.
    """

    name: str
    a: float
    b: float
    change: float
    interval: Interval | None
    users: int


class UserRow(NamedTuple):
    """A user in both runs. `change` is that of the held-out accuracy, B less A."""

    user_id: str
    a: UserOfRun
    b: UserOfRun
    change: float | None


def settings_of(run: Path, policy: Mapping[str, Any]) -> dict[str, str]:
    """Every key of the run's config with its value, and the documents of its policy, as text.

    Defaults are written out where the config is valid on this machine; else only the keys in the file stand.
    """
    try:
        tree: dict[str, Any] = read_run_config(run).model_dump(mode="json")
    except InputError:
        tree = config_of(run)
    rows = {key: _text(value) for key, value in _leaves(tree) if key not in _PLACES}
    documents = policy.get("documents") or []
    rows["policy documents"] = "; ".join(
        f"tier {one['tier']}, {one['issuer']}, version {one['version']}, {str(one['sha256'])[:12]}" for one in documents
    )
    return rows


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Keys whose values differ, with both values; a key that one side lacks is "not set" there."""
    keys = dict.fromkeys((*a, *b))
    return [(key, a.get(key, "not set"), b.get(key, "not set")) for key in keys if a.get(key) != b.get(key)]


def paired(a: Mapping[str, UserOfRun], b: Mapping[str, UserOfRun]) -> list[PairedDifference]:
    """The differences of all figures that common users have in both runs."""
    rows = []
    for name in FIGURES:
        values = [
            (one.figures[name], b[user].figures[name])
            for user, one in a.items()
            if name in one.figures and user in b and name in b[user].figures
        ]
        if values:
            changes = [after - before for before, after in values]
            between = Interval(*mean_interval(changes)) if len(changes) >= FEWEST_OF_INTERVAL else None
            first, second = (fmean(column) for column in zip(*values, strict=True))
            rows.append(PairedDifference(name, first, second, fmean(changes), between, len(changes)))
    return rows


def common_users(a: Mapping[str, UserOfRun], b: Mapping[str, UserOfRun]) -> list[UserRow]:
    """The users in both runs: those with another status first, then alarms, then by the loss of accuracy."""
    rows = []
    for user, one in a.items():
        if (other := b.get(user)) is not None:
            before, after = one.figures.get(_ACCURACY), other.figures.get(_ACCURACY)
            rows.append(UserRow(user, one, other, None if before is None or after is None else after - before))
    return sorted(
        rows, key=lambda row: (row.a.status == row.b.status, not (row.a.alarm or row.b.alarm), row.change or 0)
    )


def _cautions(a: OneRun, b: OneRun, rows: Iterable[UserRow]) -> Iterator[str]:
    """Reasons why figures of the two runs may not be comparable."""
    if a.identity.get("base") != b.identity.get("base"):
        yield "The bases differ. A win rate is against the base of its run, so the two win rates have different rivals."
    if a.settings["policy documents"] != b.settings["policy documents"]:
        yield "The policies differ, so refusals may be of other probes."
    hashes = [(row.a.heldout, row.b.heldout) for row in rows if row.a.heldout and row.b.heldout]
    if others := sum(one != other for one, other in hashes):
        yield f"{counted(others, 'user')} of {len(hashes)} have other held-out pairs in B than in A."


def compare_runs(first: Path, second: Path, page: Path) -> None:
    """Writes a page that compares two runs. Nothing is written into either.

    Raises InputError if a run has no results, or its policy cannot be read.
    """
    atomic_write(page, render_runs(OneRun.read("A", first), OneRun.read("B", second)).encode())


def render_runs(a: OneRun, b: OneRun) -> str:
    """The page."""
    rows = common_users(a.users, b.users)
    return render_template(
        "runs.html.j2",
        runs=(a, b),
        cautions=list(_cautions(a, b, rows)),
        identity=[(key, a.identity.get(key, ""), b.identity.get(key, "")) for key in {**a.identity, **b.identity}],
        settings=differing(a.settings, b.settings),
        figures=paired(a.users, b.users),
        fewest=FEWEST_OF_INTERVAL,
        rows=rows[:_MOST_ROWS],
        common=len(rows),
        changed=sum(row.a.status != row.b.status for row in rows),
        picture=_picture(rows),
        shown=_shown,
    )


def _picture(rows: Iterable[UserRow]) -> Markup | None:
    points = [
        (row.a.figures[_ACCURACY], row.b.figures[_ACCURACY])
        for row in rows
        if _ACCURACY in row.a.figures and _ACCURACY in row.b.figures
    ][:_MOST_ROWS]
    label = f"Held-out accuracy of {counted(len(points), 'user')}: run A across, run B up"
    return chart("scatter", points, 0, 1, label, "run A", "run B") if points else None


def _shown(name: str, value: float | None, change: bool = False) -> str:
    if value is None:
        return ""
    return format(value, ("+" if change else "") + (".1f" if name.startswith("seconds") else ".3f"))
