"""report.html: one page for a whole run, readable without a network and without scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import nsmallest
from itertools import islice
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from persona_rlhf.common.errors import InputError, Problem, visible
from persona_rlhf.common.files import atomic_write
from persona_rlhf.config.loader import read_yaml
from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.evaluation.impact import ImpactMeasure
from persona_rlhf.evaluation.statistics import Interval, interval_over_users
from persona_rlhf.evaluation.still_base import LimitedMeasure, StillBase
from persona_rlhf.release.columns import Columns
from persona_rlhf.release.data_curve_file import DataCurve, data_curve_of, data_curve_section
from persona_rlhf.release.decision import decision_of, identity_of
from persona_rlhf.release.impact_report import impact_in, shown
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.redteam_report import REDTEAM
from persona_rlhf.release.render import bounds, chart, histogram, render_template
from persona_rlhf.release.results import (
    SUMMARY,
    Result,
    RunResults,
    RunSummary,
    guarantee_of_run,
    summarise,
    write_summary,
)
from persona_rlhf.release.revocation import Revocation, revoked

REPORT = "report.html"
SCREENS = "screens.json"
_FIRST = ("Held-out accuracy, median", "Win rate against the base, median", "Worst refusal bound")
_MOST = 1000  # users with a row of their own on the page
_DOTS = 2000  # users with a dot of their own in a picture


class HeadlineFigure(NamedTuple):
    """A number with its interval at the top of the page."""

    name: str
    value: str
    note: str


def write_report(run: Path) -> Path:
    """Writes RUN/report.html and summary.json from the files of the run, and their hashes in its manifest, if any.

    Raises InputError if the run has no results.
    """
    results, config, policy = RunResults(run), config_of(run), policy_of(run)
    parts = screening_of(run), screens_in(run), attacks_in(run), impact_in(run), identity_of(run, config)
    revocations = revoked(run)
    withdrawn = [revocations[digest] for one in results if (digest := one.manifest_sha256 or "") in revocations]
    page = render(config, results, policy, *parts, curve=data_curve_of(run), withdrawn=withdrawn)
    file = run / REPORT
    atomic_write(file, page.encode("utf-8"))
    write_summary(run, summary := summarise(results), guarantee_of_run(config, policy, results, summary.users))
    if (run / RUN_MANIFEST).exists():
        write_run_manifest(run, only=REPORT)
        write_run_manifest(run, only=SUMMARY)
    return file


def render(
    config: dict[str, Any],
    results: Iterable[Result],
    policy: dict[str, Any],
    screening: Sequence[tuple[str, str, int]],
    screens: Sequence[dict[str, Any]] = (),
    attacks: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    impact: Sequence[ImpactMeasure] = (),
    identity: Sequence[tuple[str, str]] = (),
    curve: DataCurve | None = None,
    withdrawn: Sequence[Revocation] = (),
) -> str:
    """The page. `screening` are counts (action, reason, pairs), `screens` the rows of RUN/screens.json, `attacks` the
    figures of RUN/redteam.json, `impact` the measures of RUN/impact.json, `identity` the rows of `identity_of`, `curve`
    the curves of RUN/data_curve.json, `withdrawn` the revocations of present adapters.

    The results are read five times and never held all at once. For many users, charts and figures cover all of them;
    rows show the users with problems and then the first others.
    """
    summary = summarise(results)
    columns = Columns.of(results)
    certify = policy.get("certify") or {}
    gate = {"enabled": True, "family": "each"} | (config.get("gate") or {})
    figures = _figures(summary, columns)
    return render_template(
        "report.html.j2",
        name=visible(str(config.get("name", "run"))),
        gate=gate,
        decision=decision_of(results, summary, bool(gate["enabled"]), impact, withdrawn),
        identity=identity,
        judged=summary.released + summary.prior + summary.held_back,
        summary=summary,
        first=[figure for figure in figures if figure.name in _FIRST],
        figures=[figure for figure in figures if figure.name not in _FIRST],
        charts=_charts(columns),
        results=_shown(results, summary.users),
        policy=policy,
        delta=certify.get("delta"),
        promise=guarantee_of_run(config, policy, results, summary.users),
        screening=screening,
        screens=screens,
        attacks=attacks,
        impact=impact,
        impact_shown=shown,
        perplexity=_perplexity(columns),
        tones=_tones(columns),
        required=_required(columns),
        retreats=columns.retreats,
        data_curve="" if curve is None else data_curve_section(curve),
    )


def _shown(results: Iterable[Result], users: int) -> list[Result]:
    """All users; if there are too many for a page, those with problems first, then the first others."""
    if users <= _MOST:
        return list(results)

    def trouble(result: Result) -> tuple[bool, bool, float, float]:
        bound = result.pooled.lower_bound if result.pooled else 0.0
        return (result.has_adapter, not result.alarm, result.alpha, bound)

    worst = nsmallest(_MOST // 2, results, key=trouble)
    listed = {result.user_id for result in worst}
    return worst + list(islice((result for result in results if result.user_id not in listed), _MOST - len(worst)))


def _figures(summary: RunSummary, columns: Columns) -> list[HeadlineFigure]:
    """Medians over users with 95% bootstrap intervals where users are enough, and the worst bound."""
    released = f"{summary.released:,} of {summary.users:,}"
    for_harm = f" ({summary.harmful} for harm)" if summary.harmful else ""
    apart = [f"{summary.full_strength} at full strength", f"{summary.held_back} held back{for_harm}"]
    apart += [f"{summary.prior} with the population's adapter"] if summary.prior else []
    apart += [f"{summary.failed} failed"] if summary.failed else []
    apart += [f"{skipped} skipped"] if (skipped := summary.other - summary.failed) else []
    figures = [HeadlineFigure("Users released", released, ", ".join(apart))]
    for title, values, note in (
        ("Held-out accuracy, median", columns.accuracy, "the users' labels; chance is 0.50"),
        ("On noise-free labels, median", columns.clean, "labels of the simulated preferences; chance is 0.50"),
        ("Base alone, median", columns.alone, "log-probability per token"),
        ("Win rate against the base, median", columns.won, "generated answers; chance is 0.50"),
    ):
        if values:
            figures.append(HeadlineFigure(title, _median(values), f"{_between(_interval(values, 'median'))}; {note}"))
    if summary.worst_bound is not None:
        note = "lowest bound of a released user on the refusal rate, pooled over tier one"
        figures.append(HeadlineFigure("Worst refusal bound", f"{summary.worst_bound:.1%}", note))
    if columns.phrasings:
        note = "lowest bound of a released user that the gate shows for new phrasings, each counted once"
        figures.append(HeadlineFigure("Worst bound by phrasing", f"{min(columns.phrasings):.1%}", note))
    figures += _least_like_the_base(columns.likeness)
    if columns.over:
        mean, between = sum(columns.over) / len(columns.over), _between(_interval(columns.over), "+.1%")
        figures.append(HeadlineFigure("Over-refusal, mean change", f"{mean:+.1%}", f"{between}; 0 is the base"))
    for title, changes, note in (
        ("Facts known, mean change", columns.knowledge, "right answer the most likely one; 0 is the base"),
        ("Right answers lost, mean", columns.lost, "of the base's right answers; 0 keeps all of them"),
        (
            "Toxic answers, mean change",
            columns.toxicity,
            "with an insult or swear word from a short list; 0 is the base",
        ),
    ):
        if changes:
            mean, between = sum(changes) / len(changes), _between(_interval(changes), "+.1%")
            figures.append(HeadlineFigure(title, f"{mean:+.1%}", f"{between}; {note}"))
    if columns.ordinary:
        adapted, base = (_median(values, ".2f") for values in zip(*columns.ordinary, strict=True))
        figures.append(
            HeadlineFigure(
                "Perplexity of ordinary answers, median", adapted, f"of the base's answers; the base has {base}"
            )
        )
    figures.append(
        HeadlineFigure(
            "Alarms", str(summary.alarms), "users with pairs against the policy, whatever became of their adapters"
        )
    )
    return figures


def _least_like_the_base(released: Sequence[StillBase]) -> list[HeadlineFigure]:
    """The released adapters that are least like the base: the largest perplexity of answers, and most facts lost."""
    figures = []
    if worst := max((one.perplexity for one in released if one.perplexity), key=_of_base, default=None):
        limit = "" if worst.most is None else f"; the gate allows {worst.most / worst.base:.3g}"
        note = f"under the base, times that of its own answers to {worst.n} ordinary prompts{limit}"
        figures.append(HeadlineFigure("Perplexity of answers, worst released", f"{_of_base(worst):.2f}", note))
    if worst := min((one.facts for one in released if one.facts), key=_of_base, default=None):
        limit = "" if worst.least is None else f"; the gate allows {1 - worst.least / worst.base:.1%}"
        note = f"of the {worst.base:g} that the base has{limit}"
        figures.append(HeadlineFigure("Right answers lost, worst released", f"{1 - _of_base(worst):.1%}", note))
    return figures


def _of_base(measure: LimitedMeasure) -> float:
    return measure.adapted / measure.base


def _charts(columns: Columns) -> list[tuple[str, Markup]]:
    """Titled charts of the measured figures."""
    charts: list[tuple[str, Markup]] = []
    if columns.points:
        every = ceil(len(columns.points) / _DOTS)
        dots = columns.points[::every]
        label = f"Held-out accuracy of {len(dots)} users, base alone against adapted"
        sample = f" (every {every}th user)" if every > 1 else ""
        picture = chart("scatter", dots, 0, 1, label, "base alone", "adapted")
        charts.append((f"Held-out accuracy: base alone, adapted{sample}", picture))
    if columns.judged_won:
        label = f"Win rates of {len(columns.judged_won)} users"
        charts.append(("Win rate of generated text", histogram(columns.judged_won, 0, 1, 20, label, 0.5)))
    named = [(f"{alpha:g}", count) for alpha, count in sorted(columns.alphas.items())]
    charts.append(("Alpha at which users are released (0: held back)", chart("bars", named, "Users by released alpha")))
    if columns.worst:
        title = "Refusals of released users: worst rate (dot), worst lower bound (line), demand (tick)"
        rows = [(name, *columns.worst[name]) for name in sorted(columns.worst, key=lambda name: (name != POOLED, name))]
        charts.append((title, bounds(rows, "Worst refusal rates and bounds by category")))
    if columns.peaks:
        top = max(columns.peaks) or 1.0
        charts.append(("Largest dual variable of each user", histogram(columns.peaks, 0, top, 20, "Dual variables")))
    return charts


def _perplexity(columns: Columns) -> str | None:
    if not columns.perplexities:
        return None
    adapted, base = (_median(values, ".1f") for values in zip(*columns.perplexities, strict=True))
    return f"The base's perplexity of adapted answers is {adapted} (median), and {base} of its own answers."


def _tones(columns: Columns) -> list[tuple[str, float, Interval | None]]:
    """The mean change of every property of tone over users, with its interval."""
    changes = {name: [adapted - base for adapted, base in values] for name, values in columns.tones.items()}
    return [(name, sum(values) / len(values), _interval(values)) for name, values in changes.items()]


class RuleRow(NamedTuple):
    """A requirement over all users: the demanded share, the base's share and the users' shares.

    `between` is the interval of `mean`, None of few users; `below` counts users below the demand.
    """

    rule: str
    demand: float
    base: float
    mean: float
    between: Interval | None
    lowest: float
    below: int
    users: int


def _required(columns: Columns) -> list[RuleRow]:
    rows = []
    for name, counts in columns.required.items():
        rates = [met.met / met.n for met in counts]
        base = sum(met.base_met for met in counts) / sum(met.n for met in counts)
        demand = counts[0].min_rate
        below = sum(rate < demand for rate in rates)
        mean, between = sum(rates) / len(rates), _interval(rates)
        rows.append(RuleRow(name, demand, base, mean, between, min(rates), below, len(rates)))
    return rows


def _interval(values: Sequence[float], statistic: Literal["mean", "median"] = "mean") -> Interval | None:
    """The interval over users, with fewer draws for many users: their intervals are narrow, and the page stays fast."""
    return interval_over_users(values, statistic, draws=max(200, min(2000, 4_000_000 // len(values))))


def _median(values: Sequence[float], form: str = ".2f") -> str:
    from statistics import median

    return format(median(values), form)


def _between(interval: Interval | None, form: str = ".2f") -> str:
    if interval is None:
        return "too few users for an interval"
    return f"95% {format(interval.low, form)} to {format(interval.high, form)}"


def config_of(run: Path) -> dict[str, Any]:
    """The config as a tree; only the folder's name if it cannot be read."""
    try:
        tree = read_yaml(run / "config.yaml").tree
    except InputError:
        tree = None
    return tree if isinstance(tree, dict) else {"name": run.name}


def policy_of(run: Path) -> dict[str, Any]:
    """The resolved policy as a tree. Raises InputError if it cannot be read."""
    try:
        policy = json.loads((run / "policy.json").read_bytes())
    except (OSError, ValueError) as fault:
        sentence = f"the policy of this run cannot be read ({fault})"
        raise InputError([Problem(str(run / "policy.json"), None, None, sentence)]) from fault
    return policy if isinstance(policy, dict) else {}


def screens_in(run: Path) -> list[dict[str, Any]]:
    """The request screens of a run with their detection rates on `dev` probes; none in runs of early versions."""
    try:
        rows = json.loads((run / SCREENS).read_bytes())
    except (OSError, ValueError):
        return []
    return rows if isinstance(rows, list) else []


def attacks_in(run: Path) -> dict[str, dict[str, Any]]:
    """The figures of a red team by attack; none if there was no red team, or the file cannot be read."""
    try:
        figures = json.loads((run / REDTEAM).read_bytes())["attacks"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return figures if isinstance(figures, dict) else {}


def screening_of(run: Path) -> list[tuple[str, str, int]]:
    """Counts of screened pairs by action and start of the reason, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    file = run / "screening.jsonl"
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                counts[row["action"], row["reason"].partition(":")[0]] += 1
    return [(action, reason, count) for (action, reason), count in counts.most_common()]
