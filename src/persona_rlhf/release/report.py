"""`report.html`: one page for a whole run, which needs no network and no script to be read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import persona_rlhf
from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.evaluation.intervals import Interval, bootstrap
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.yaml_text import read_yaml
from persona_rlhf.release.charts import bars, bounds, histogram, scatter
from persona_rlhf.release.folder import write_file
from persona_rlhf.release.results import Result, read_results, summarise
from persona_rlhf.release.seal import SEAL, seal
from persona_rlhf.release.table import printable

REPORT = "report.html"


class Figure(NamedTuple):
    """A number with its interval, as the top of the page shows it."""

    name: str
    value: str
    note: str


def write_report(run: Path) -> Path:
    """Writes RUN/report.html from the files of the run, and seals it again where the run was sealed.

    Raises InputError where the run has no results.
    """
    results = read_results(run)
    page = render(_config(run), results, _policy(run), _screening(run))
    file = run / REPORT
    write_file(file, page.encode("utf-8"))
    if (run / SEAL).exists():
        seal(run, only=REPORT)
    return file


def render(
    config: dict[str, Any],
    results: Sequence[Result],
    policy: dict[str, Any],
    screening: Sequence[tuple[str, str, int]],
) -> str:
    """The page: of the config its name and its gate; `screening` counts (what was done, why, how many pairs)."""
    environment = Environment(
        loader=PackageLoader("persona_rlhf.release"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    summary = summarise(results)
    certify = policy.get("certify") or {}
    return environment.get_template("report.html.j2").render(
        name=printable(str(config.get("name", "run"))),
        gate={"enabled": True, "family": "each"} | (config.get("gate") or {}),
        judged=summary.released + summary.held_back,
        version=persona_rlhf.__version__,
        summary=summary,
        figures=_figures(results),
        charts=_charts(results),
        results=results,
        policy=policy,
        delta=certify.get("delta"),
        screening=screening,
        perplexity=_perplexity(results),
    )


def _figures(results: Sequence[Result]) -> list[Figure]:
    """Medians over users with a 95% bootstrap, and the worst bound."""
    summary = summarise(results)
    released = f"{summary.released} of {summary.users}"
    apart = [f"{summary.full_strength} at full strength", f"{summary.held_back} held back"]
    apart += [f"{summary.other} failed or skipped"] if summary.other else []
    figures = [Figure("Users released", released, ", ".join(apart))]
    clean = [r.heldout_clean.adapted for r in results if r.heldout_clean]
    accuracy = [r.heldout_accuracy.adapted for r in results if r.heldout_accuracy]
    alone = [r.heldout_accuracy.reference_free for r in results if r.heldout_accuracy]
    won = [r.win_rate.value for r in results if r.win_rate]
    for title, values, note in (
        ("Held-out accuracy, median", accuracy, "their own labels; chance is 0.50"),
        ("On noise-free labels, median", clean, "the written-down taste; chance is 0.50"),
        ("Base alone, median", alone, "log-probability per token"),
        ("Win rate against the base, median", won, "generated text; chance is 0.50"),
    ):
        if values:
            figures.append(Figure(title, _median(values), f"{_between(bootstrap(values, 'median'))}; {note}"))
    if summary.worst_bound is not None:
        note = "lower bound of the refusal rate, pooled over tier one, of the released user who has the lowest"
        figures.append(Figure("Worst refusal bound", f"{summary.worst_bound:.1%}", note))
    over = [
        (r.over_refusal.refused - r.over_refusal.base_refused) / r.over_refusal.n for r in results if r.over_refusal
    ]
    if over:
        mean = sum(over) / len(over)
        figures.append(
            Figure("Over-refusal, mean change", f"{mean:+.1%}", f"{_between(bootstrap(over), '+.1%')}; 0 is the base")
        )
    alarms = sum(r.alarm for r in results)
    figures.append(Figure("Alarms", str(alarms), "the user's pairs pull against the policy"))
    return figures


def _charts(results: Sequence[Result]) -> list[tuple[str, Markup]]:
    """Titled pictures of what was measured; nothing for what was not."""
    charts: list[tuple[str, Markup]] = []
    judged = [r for r in results if r.status in ("released", "held_back")]
    points = [(r.heldout_accuracy.reference_free, r.heldout_accuracy.adapted) for r in judged if r.heldout_accuracy]
    if points:
        label = f"Held-out accuracy of {len(points)} users, base alone against adapted"
        charts.append(("Held-out accuracy: base alone, adapted", scatter(points, 0, 1, label, "base alone", "adapted")))
    won = [r.win_rate.value for r in judged if r.win_rate]
    if won:
        charts.append(("Win rate of generated text", histogram(won, 0, 1, 20, f"Win rates of {len(won)} users", 0.5)))
    alphas = Counter(r.alpha for r in judged)
    named = [(f"{alpha:g}", count) for alpha, count in sorted(alphas.items())]
    charts.append(("Alpha at which users are released (0: held back)", bars(named, "Users by released alpha")))
    rows = _bound_rows([r for r in judged if r.status == "released"])
    if rows:
        title = "Refusals of released users: the worst rate (dot), the worst lower bound (line), the demand (tick)"
        charts.append((title, bounds(rows, "Worst refusal rates and bounds by category")))
    peaks = [max(dual.peak for dual in r.duals.values()) for r in judged if r.duals]
    if peaks:
        top = max(peaks) or 1.0
        charts.append(("Largest dual variable of each user", histogram(peaks, 0, top, 20, "Peaks of dual variables")))
    return charts


def _bound_rows(released: Sequence[Result]) -> list[tuple[str, float, float, float]]:
    """By category: its name, the worst bound, the worst rate and the demand."""
    known = [{**(r.tier_one or {}), **r.tier_two} for r in released]
    names = sorted({name for counts in known for name in counts}, key=lambda name: (name != POOLED, name))
    rows = []
    for name in names:
        counts = [counts[name] for counts in known if name in counts and counts[name].n]
        if counts:
            rates = [count.refused / count.n for count in counts]
            rows.append((name, min(c.lower_bound for c in counts), min(rates), max(c.min_refusal for c in counts)))
    return rows


def _perplexity(results: Sequence[Result]) -> str | None:
    known = [r.answer_perplexity for r in results if r.answer_perplexity]
    if not known:
        return None
    own, base = (_median([getattr(p, side) for p in known], ".1f") for side in ("adapted", "base"))
    return (
        f"Answers still read as the base's do: its perplexity of adapted answers is {own} (median), of its own {base}."
    )


def _median(values: Sequence[float], form: str = ".2f") -> str:
    from statistics import median

    return format(median(values), form)


def _between(interval: Interval, form: str = ".2f") -> str:
    return f"95% {format(interval.low, form)} to {format(interval.high, form)}"


def _config(run: Path) -> dict[str, Any]:
    """The config as a tree; only the folder's name where it cannot be read."""
    try:
        tree = read_yaml(run / "config.yaml").tree
    except InputError:
        tree = None
    return tree if isinstance(tree, dict) else {"name": run.name}


def _policy(run: Path) -> dict[str, Any]:
    try:
        policy = json.loads((run / "policy.json").read_bytes())
    except (OSError, ValueError) as fault:
        sentence = f"the policy of this run cannot be read ({fault})"
        raise InputError([Problem(str(run / "policy.json"), None, None, sentence)]) from fault
    return policy if isinstance(policy, dict) else {}


def _screening(run: Path) -> list[tuple[str, str, int]]:
    """What screening did, by action and the first words of the reason, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    file = run / "screening.jsonl"
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                counts[row["action"], row["reason"].partition(":")[0]] += 1
    return [(action, reason, count) for (action, reason), count in counts.most_common()]
