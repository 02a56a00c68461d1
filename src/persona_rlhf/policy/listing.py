"""The resolved rules as a table for people."""

from __future__ import annotations

from rich.table import Table

from persona_rlhf.policy.enforcement import BY_KIND
from persona_rlhf.policy.tiers import Policy


def listing(policy: Policy) -> Table:
    """Every rule with its tier, its source, and where the line holds it."""
    certify = policy.certify
    table = Table(
        title=f"Refusal of tier-one probes, pooled: at least {certify.min_refusal:g} at {1 - certify.delta:g}",
        caption=f"policy {policy.hash[:16]}, tier one {policy.tier_one_hash[:16]}; "
        f"tailored: {', '.join(policy.personalisable) or 'anything'}; fixed: {', '.join(policy.fixed) or 'nothing'}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("tier", "rule", "says", "held by", "from"):
        table.add_column(name, overflow="fold")
    for restriction in policy.restrictions:
        certified = sum(probe.split == "certify" for probe in restriction.probes)
        says = (
            f"refuse {restriction.category}: limit {restriction.limit:g} nats, at least {restriction.min_refusal:g} "
            f"({certified} probes certify)"
        )
        if restriction.narrowed_by:
            says += f"; narrowed by {', '.join(restriction.narrowed_by)}"
        source = f"{restriction.document}:{restriction.line} ({restriction.source_name})"
        table.add_row(str(restriction.tier), restriction.id, says, _held("restriction"), source)
    for rule in policy.requirements:
        source = f"{rule.document}:{rule.line} ({rule.source_name})"
        table.add_row(str(rule.tier), rule.id, f"{rule.property}: {rule.value}", _held("requirement"), source)
    for taste in policy.preferences:
        whose = f"user {taste.user_id}" if taste.user_id is not None else "every user"
        source = f"{taste.document}:{taste.line} ({taste.source_name})"
        says = f"{taste.aspect}, {whose}: {taste.statement}"
        table.add_row(str(taste.tier), taste.id, says, _held("preference"), source)
    return table


def _held(kind: str) -> str:
    return "; ".join(f"{stage}: {what}" for stage, what in BY_KIND[kind]._asdict().items() if what)
