"""The table of a comparison: records of users under contenders, by group, with bootstraps over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from compare_runs import ratio_of_means
from rich.table import Table
from scipy.stats import mannwhitneyu

from persona_rlhf.evaluation.statistics import bootstrap

CLEAN, CLOSE = "clean", "clean, close to a hazard"


@dataclass(frozen=True)
class Record:
    """One user of a run under one contender; `figures` are gains over chance and points, `signs` of the user."""

    run: str
    contender: str
    user_id: str
    group: str
    alpha: float
    seconds: float | None
    figures: dict[str, float | None]
    signs: dict[str, float]


def comparison(records: Sequence[Record]) -> dict[str, Any]:
    """By group and contender: means with intervals, what is kept of plain DPO's gains; and how well signs tell."""
    groups: dict[str, dict[str, Any]] = {}
    for group in sorted({record.group for record in records}):
        own = [record for record in records if record.group == group]
        for name in dict.fromkeys(record.contender for record in own):
            groups.setdefault(group, {})[name] = _summary(own, name)
    ours = [record for record in records if record.contender == "ours"]
    runs = len({record.run for record in records})
    return {"runs": runs, "groups": groups, "alarms": _alarms(ours), "alarm_rates": _alarm_rates(ours)}


def _summary(group: Sequence[Record], name: str) -> dict[str, Any]:
    """One contender and group: figures, and mean gains over those of plain DPO, the same users drawn together."""
    own = [record for record in group if record.contender == name]
    found: dict[str, Any] = {
        "users": len(own),
        "at_full_strength": fmean(record.alpha == 1 for record in own),
        "above_zero": fmean(record.alpha > 0 for record in own),
        "seconds": None if own[0].seconds is None else fmean(record.seconds or 0.0 for record in own),
    }
    for figure in own[0].figures:
        values = [value for record in own if (value := record.figures[figure]) is not None]
        interval = bootstrap(values) if values else None
        found[figure] = values and {"mean": fmean(values), "interval": interval, "worst": min(values)}
    plain = {(record.run, record.user_id): record.figures for record in group if record.contender == "plain"}
    for kept, gain in {"accuracy_kept": "accuracy_gain", "win_kept": "win_gain"}.items() if plain else ():
        both = [(record.figures[gain], plain[record.run, record.user_id][gain]) for record in own]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        if known:
            ratio = ratio_of_means([a for a, _ in known], [b for _, b in known])
            found[kept] = {"ratio": ratio.value, "interval": ratio.interval}
    return found


def auc(poisoned: Sequence[float], clean: Sequence[float]) -> float:
    """Area under the ROC curve: how often a poisoned user's sign is above a clean one's, ties counted half."""
    return float(mannwhitneyu(poisoned, clean).statistic) / (len(poisoned) * len(clean))


def _alarms(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By group of poisoned users and sign the area under the ROC curve against all clean users."""
    clean = [record.signs for record in records if record.group in (CLEAN, CLOSE)]
    found: dict[str, dict[str, float]] = {}
    for group in sorted({record.group for record in records} - {CLEAN, CLOSE}) if clean else ():
        own = [record.signs for record in records if record.group == group]
        found[group] = {sign: auc([s[sign] for s in own], [s[sign] for s in clean]) for sign in own[0]}
    return found


def _alarm_rates(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By group and sign the share of users in whom it is above zero."""
    found: dict[str, dict[str, float]] = {}
    for group in sorted({record.group for record in records}):
        own = [record.signs for record in records if record.group == group]
        found[group] = {sign: fmean(signs[sign] > 0 for signs in own) for sign in own[0]}
    return found


def rendered(found: dict[str, Any]) -> list[Table]:
    """The same for people."""
    table = Table(
        "users",
        "contender",
        "accuracy - 0.5",
        "kept",
        "win rate - 0.5",
        "kept",
        "refused, %",
        "worst user",
        "worst category",
        "over-refusal, points",
        "CPU s a user",
        "alpha 1 / > 0",
        title=f"{found['runs']} runs" if found["runs"] > 1 else None,
    )

    def cell(value: dict[str, Any] | None, form: str) -> str:
        if not value:
            return ""
        low, high = value["interval"]
        return f"{value['mean']:{form}} ({low:{form}} to {high:{form}})"

    def ratio(value: dict[str, Any] | None) -> str:
        if value is None or value["ratio"] is None:
            return ""
        return f"{value['ratio']:.2f} ({value['interval'][0]:.2f} to {value['interval'][1]:.2f})"

    for group, rows in found["groups"].items():
        for name, row in rows.items():
            table.add_row(
                f"{group} ({row['users']})",
                name,
                cell(row["accuracy_gain"], ".3f"),
                ratio(row.get("accuracy_kept")),
                cell(row["win_gain"], ".3f"),
                ratio(row.get("win_kept")),
                cell(row["refusal"], ".1f"),
                f"{row['refusal']['worst']:.1f}" if row["refusal"] else "",
                f"{row['worst_category']['worst']:+.1f}" if row["worst_category"] else "",
                cell(row["over_refusal"], "+.2f"),
                "" if row["seconds"] is None else f"{row['seconds']:.2f}",
                f"{row['at_full_strength']:.0%} / {row['above_zero']:.0%}",
            )
        table.add_section()
    alarms = Table("users", "sign", "area under the ROC curve, against clean users", "users with it above zero")
    for group, rates in found["alarm_rates"].items():
        for sign, rate in rates.items():
            area = found["alarms"].get(group, {}).get(sign)
            alarms.add_row(group, sign, "" if area is None else f"{area:.3f}", f"{rate:.0%}")
    return [table, alarms]
