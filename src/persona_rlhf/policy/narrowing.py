"""The rule between tiers: a lower tier can only narrow what stands above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from persona_rlhf.inputs.problems import Problem
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.statements import RestrictionRule


def widenings(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Every attempt of a document to remove, weaken or shadow something in a document of a higher tier.

    Documents come in the order of their tiers; each problem names both documents.
    """
    for index, lower in enumerate(documents):
        for upper in documents[:index]:
            yield from _shadowed_ids(upper, lower)
            if upper.tier < lower.tier:
                yield from _weaker_restrictions(upper, lower)
                yield from _weaker_bound(upper, lower)
                yield from _wider_aspects(upper, lower)


def _shadowed_ids(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    above = {rule.id: index for index, rule in upper.rules}
    for index, rule in lower.rules:
        if rule.id in above:
            there = upper.where(("rules", above[rule.id], "id"))
            yield lower.problem(("rules", index, "id"), f"`{rule.id}` is a rule of {there}; give this rule its own id")


def _weaker_restrictions(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    above = {rule.category: (at, rule) for at, rule in upper.rules if isinstance(rule, RestrictionRule)}
    for index, rule in lower.rules:
        if not isinstance(rule, RestrictionRule) or rule.category not in above:
            continue
        at, strict = above[rule.category]
        for key, sign in (("limit", 1), ("min_refusal", -1)):
            asked, held = getattr(rule, key), getattr(strict, key)
            if asked is not None and held is not None and sign * asked > sign * held:
                sentence = f"would loosen the {held:g} of {upper.where(('rules', at, key))}; a lower tier only narrows"
                yield lower.problem(("rules", index, key), f"{sentence}, got {asked:g}")
        if rule.probes is not None:
            there = upper.where(("rules", at))
            sentence = f"`{rule.category}` is measured on the probes of {there}; other probes would shadow them"
            yield lower.problem(("rules", index, "probes"), sentence)


def _weaker_bound(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    if upper.certify is None or lower.certify is None:
        return
    for key, sign in (("min_refusal", -1), ("delta", 1)):
        asked, held = getattr(lower.certify, key), getattr(upper.certify, key)
        if sign * asked > sign * held:
            sentence = f"would loosen the {held:g} of {upper.where(('certify', key))}; a lower tier only narrows"
            yield lower.problem(("certify", key), f"{sentence}, got {asked:g}")


def _wider_aspects(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    fixed = set(upper.aspects.fixed)
    for index, aspect in enumerate(lower.aspects.personalisable):
        if aspect in fixed:
            there = upper.where(("aspects", "fixed"))
            sentence = f"`{aspect}` is fixed by {there}; a lower tier cannot let users change it"
            yield lower.problem(("aspects", "personalisable", index), sentence)
        elif upper.aspects.personalisable and aspect not in upper.aspects.personalisable:
            there = upper.where(("aspects", "personalisable"))
            sentence = f"`{aspect}` is not among the personalisable aspects of {there}"
            yield lower.problem(("aspects", "personalisable", index), sentence)
    for index, rule in lower.rules:
        if rule.kind != "preference":
            continue
        allowed = upper.aspects.personalisable
        if rule.aspect in fixed or (allowed and rule.aspect not in allowed):
            there = upper.where(("aspects",))
            sentence = (
                f"`{rule.aspect}` may not be tailored, says {there}; personalisable: {', '.join(allowed) or 'none'}"
            )
            yield lower.problem(("rules", index, "aspect"), sentence)
