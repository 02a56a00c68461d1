"""The first screen of a report: what was decided and why, what each alarm asks for, and the identity of the run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import counted
from persona_rlhf.evaluation.impact import ImpactMeasure
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import adapter_folders
from persona_rlhf.release.lifetimes import LAPSED
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.results import Result, RunSummary
from persona_rlhf.release.revocation import Revocation

_MOST_REASONS = 5
_DETAIL = re.compile(r",|[\s(][-+]?\d")
_ENDED = ("released", "prior", "held_back", "skipped", "failed")  # events of the audit trail


class Advice(NamedTuple):
    """An alarm, and an action for it."""

    alarm: str
    action: str


class Decision(NamedTuple):
    """The verdicts of a run. `reasons` are those of users without an adapter of their pairs: (status, reason, users).

    `further` are users with rarer reasons.
    """

    sentence: str
    reasons: list[tuple[str, str, int]]
    further: int
    advice: list[Advice]


def decision_of(
    results: Iterable[Result],
    summary: RunSummary,
    gated: bool,
    impact: Sequence[ImpactMeasure] = (),
    withdrawn: Sequence[Revocation] = (),
) -> Decision:
    """The decision of a run, from one pass over its results; `withdrawn` are adapters revoked since."""
    reasons: Counter[tuple[str, str]] = Counter()
    changed = 0
    for result in results:
        changed += result.broken_facts > 0
        if result.status != "released":
            reasons[result.status.replace("_", " "), _shared(result)] += 1
    shown = reasons.most_common(_MOST_REASONS)
    parts = [f"{summary.released:,} of {counted(summary.users, 'user')} released"]
    parts += [f"{summary.prior:,} with the population's adapter"] if summary.prior else []
    parts += [f"{summary.held_back:,} held back"]
    parts += [f"{summary.other - summary.failed:,} skipped"] if summary.other - summary.failed else []
    parts += [f"{summary.failed:,} failed"] if summary.failed else []
    return Decision(
        f"{', '.join(parts)}.",
        [(status, reason, users) for (status, reason), users in shown],
        reasons.total() - sum(users for _, users in shown),
        list(_advice(summary, changed, gated, impact, withdrawn)),
    )


def _shared(result: Result) -> str:
    """The reason of a user, for the population's adapter without the user's figures: with them no two are the same."""
    if result.status != "prior":
        return result.reason.removeprefix("held back: ")  # the status says so
    cause = result.reason.partition("(of the population's adapter: ")[2].removesuffix(")") or result.reason
    words = _DETAIL.split(cause, maxsplit=1)[0]
    return cause if words == cause else f"{words} ... (whole reasons in the table of users)"


def _advice(
    summary: RunSummary,
    changed: int,
    gated: bool,
    impact: Sequence[ImpactMeasure],
    withdrawn: Sequence[Revocation],
) -> Iterable[Advice]:
    if not gated:
        yield Advice("The gate was off", "Set gate.enabled and train again; until then no adapter has a guarantee.")
    if withdrawn:
        lapsed = sum(one.reason.startswith(LAPSED) for one in withdrawn)
        action = "They are neither served nor exported; revoked.jsonl has the reasons. Train them again for others."
        yield Advice(f"{counted(len(withdrawn), 'adapter')} revoked since, {lapsed} of them lapsed in service", action)
    if summary.alarms:
        alarm = f"{counted(summary.alarms, 'user')} with pairs against the policy"
        yield Advice(alarm, "Read their pairs in screening.jsonl, and decide on them with persona-rlhf data review.")
    if harmful := summary.harmful:
        action = "Lower dpo.learning_rate or dpo.epochs, or give more pairs, and train again."
        yield Advice(f"{counted(harmful, 'user')} held back for harm", action)
    if held := summary.held_back - summary.harmful:
        action = "They get the base. Their reasons are listed above; strengthen the constraint, or read their pairs."
        yield Advice(f"{counted(held, 'user')} held back by the gate", action)
    if summary.failed:
        action = "An internal fault stopped them: read the reason, and train them again with persona-rlhf add."
        yield Advice(f"{counted(summary.failed, 'user')} failed", action)
    if changed:
        action = "The policy fixes facts. Where a document sets aspects.max_changed, the gate decides by them."
        yield Advice(f"{counted(changed, 'user')} with changed facts", action)
    for measure in impact:
        if measure.value is not None and measure.value.alarm:
            yield Advice(f"Impact: {measure.name.lower()}", measure.advice)


def identity_of(run: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows that identify a run: its base, computation, time, seed and version. Rows without a record are left out."""
    rows: list[tuple[str, str]] = []
    manifest = next((read_manifest(folder / MANIFEST)[0] for folder in adapter_folders(run)), None) or {}
    if base := manifest.get("base"):
        rows.append(("base", f"{Path(str(base['name'])).name}, weights sha256 {str(base['weights_sha256'])[:16]}"))
    if conditions := manifest.get("conditions"):
        keys = ("device", "dtype", "attention")
        rows.append(("certified on", ", ".join(str(conditions[key]) for key in keys if conditions.get(key))))
    times = {entry.event: entry.time for entry in integrity.read(run) if entry.event in ("begun", *_ENDED)}
    ends = [time for event, time in times.items() if event != "begun"]
    if "begun" in times and ends:
        took = datetime.fromisoformat(max(ends)) - datetime.fromisoformat(times["begun"])
        rows.append(("trained", f"{times['begun']}, {took.total_seconds() / 60:.1f} minutes up to the last verdict"))
    if "seed" in config:
        rows.append(("seed", str(config["seed"])))
    if toolkit := manifest.get("toolkit"):
        rows.append(("toolkit", f"{toolkit['name']} {toolkit['version']}"))
    rows.append(("again", "persona-rlhf train RUN/config.yaml --run NEW"))
    return rows
