"""The resolved rules, one rule's papers, what a text meets and what changed: as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.policy.differences import Change
from persona_rlhf.policy.enforcement import row_of
from persona_rlhf.policy.explanation import Meeting
from persona_rlhf.policy.register import Entry
from persona_rlhf.policy.statements import RestrictionRule
from persona_rlhf.policy.taxonomy import hazards
from persona_rlhf.policy.tiers import Policy


def listing(policy: Policy) -> Table:
    """Every rule as it was written, with its tier, issuer and place, and the stages that do something about it."""
    certify = policy.certify
    table = _table(
        ("tier", "rule", "what it does", "stages", "issuer", "from"),
        title=f"Refusal of tier-one probes, pooled: at least {certify.min_refusal:g} at {1 - certify.delta:g}",
        caption=f"policy {policy.hash[:16]}, tier one {policy.tier_one_hash[:16]}; "
        f"tailored: {', '.join(policy.personalisable) or 'anything'}; fixed: {', '.join(policy.fixed) or 'nothing'}",
    )
    for entry in policy.written:
        source = f"{entry.document}:{entry.line}"
        says = entry.says if entry.in_force else f"NOT IN FORCE on {entry.day} ({entry.dates}): {entry.says}"
        held = ", ".join(held_by(entry)) if entry.in_force else "nothing"
        table.add_row(str(entry.tier), entry.rule.id, says + _merged(policy, entry), held, entry.issuer, source)
    return table


def held_by(entry: Entry) -> dict[str, str]:
    """What is done about a rule, by stage."""
    return {stage: what for stage, what in row_of(entry.rule)._asdict().items() if what}


def entry_of(policy: Policy, rule: str) -> Entry:
    """The entry of a rule. Raises InputError, with the nearest id, where no document states it."""
    found = next((entry for entry in policy.written if entry.rule.id == rule), None)
    if found is None:
        known = [entry.rule.id for entry in policy.written]
        hint = did_you_mean(rule, known) or f"; rules: {', '.join(known)}"
        raise InputError([Problem(rule, None, None, f"no document states a rule of this id{hint}")])
    return found


def why(policy: Policy, entry: Entry) -> Table:
    """All that is known of one rule."""
    rule = entry.rule
    table = _table(("", ""), title=f"{rule.id}: {entry.says}", show_header=False)
    papers = {
        "tier": f"{entry.tier} ({entry.role})",
        "issuer": entry.issuer,
        "jurisdiction": entry.jurisdiction,
        "written in": f"{entry.document}:{entry.line}",
        "version": entry.version,
        "why": rule.rationale or "its document gives no rationale",
        "contact": entry.contact,
        "in force": f"{'yes' if entry.in_force else 'no'}{f' ({entry.dates})' if entry.dates else ''}",
        "after merging": _merged(policy, entry).removeprefix("; "),
        "also known as": str(hazards().get(rule.category, "")) if isinstance(rule, RestrictionRule) else "",
        **held_by(entry),
    }
    for name, value in papers.items():
        if value:
            table.add_row(name, value)
    return table


def meetings_table(meetings: Sequence[Meeting]) -> Table:
    """Which rules a text meets."""
    table = _table(("stage", "tier", "rule", "why", "what follows"))
    for meeting in meetings:
        table.add_row(meeting.stage, str(meeting.tier), meeting.rule, meeting.why, meeting.follows)
    return table


def changes_table(changes: Sequence[Change]) -> Table:
    """What gets stricter and what looser."""
    table = _table(("tier", "about", "gets", "before", "after"))
    for change in changes:
        table.add_row(str(change.tier), change.about, change.direction, change.before or "-", change.after or "-")
    return table


def _merged(policy: Policy, entry: Entry) -> str:
    """What merging left of a restriction, where other rules have a say in it too."""
    rule = entry.rule
    if not isinstance(rule, RestrictionRule):
        return ""
    held = next((held for held in policy.restrictions if held.category == rule.category), None)
    if held is None or not held.narrowed_by:
        return ""
    if held.id != rule.id:
        return f"; narrows {held.id}"
    strict = f"limit {held.limit:g} nats, at least {held.min_refusal:g}"
    return f"; narrowed to {strict} by {', '.join(held.narrowed_by)}"


def _table(columns: Sequence[str], title: str = "", caption: str = "", show_header: bool = True) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", show_header=show_header)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
