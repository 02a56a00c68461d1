"""The rule between tiers: a lower tier can only narrow what stands above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from persona_rlhf.inputs.problems import Problem
from persona_rlhf.policy.contradictions import contradict, looser
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.lookalikes import root, skeleton
from persona_rlhf.policy.statements import ACTIONS, RequirementRule, RestrictionRule, Wish


def widenings(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Every attempt of a document to remove, weaken or shadow something in one of a higher tier or that it extends.

    Documents come in the order of their tiers, each after its bases; each problem names both documents. Rules that are
    out of their dates count as well: they cannot be loosened before they are in force.
    """
    for index, lower in enumerate(documents):
        yield from _excluding_requirements(lower)
        for upper in documents[:index]:
            yield from _shadowed_ids(upper, lower)
            if upper.above(lower):
                yield from _weaker_restrictions(upper, lower)
                yield from _renamed_categories(upper, lower)
                yield from _weaker_requirements(upper, lower)
                yield from _weaker_bound(upper, lower)
                yield from _wider_aspects(upper, lower)


def _shadowed_ids(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    above = {skeleton(rule.id): (index, rule.id) for index, rule in upper.rules}
    for index, rule in lower.rules:
        if skeleton(rule.id) in above:
            at, name = above[skeleton(rule.id)]
            there = upper.where(("rules", at, "id"))
            like = "is" if rule.id == name else f"looks like `{name}`,"
            yield lower.problem(
                ("rules", index, "id"), f"`{rule.id}` {like} a rule of {there}; give this rule its own id"
            )


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
        action, held_action = rule.action or strict.action, strict.action
        if ACTIONS.index(action or "refuse") > ACTIONS.index(held_action or "refuse"):
            sentence = (
                f"would loosen the {held_action or 'refuse'} of {upper.where(('rules', at))}; a lower tier only narrows"
            )
            yield lower.problem(("rules", index, "action"), f"{sentence}, got {action}")
        if rule.probes is not None:
            there = upper.where(("rules", at))
            sentence = f"`{rule.category}` is measured on the probes of {there}; other probes would shadow them"
            yield lower.problem(("rules", index, "probes"), sentence)


def _renamed_categories(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    above = {root(rule.category): (at, rule.category) for at, rule in upper.rules if isinstance(rule, RestrictionRule)}
    for index, rule in lower.rules:
        if not isinstance(rule, RestrictionRule) or root(rule.category) not in above:
            continue
        at, category = above[root(rule.category)]
        if rule.category != category:
            there = upper.where(("rules", at, "category"))
            sentence = (
                f"`{rule.category}` would be taken for the `{category}` of {there}; use that name, or another one"
            )
            yield lower.problem(("rules", index, "category"), sentence)


def _weaker_requirements(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    """Looser numbers for the same answers, lower rates of the same property, and properties that exclude each other."""
    for at, strict in upper.rules:
        for index, rule in lower.rules:
            if not isinstance(strict, RequirementRule) or not isinstance(rule, RequirementRule):
                continue
            one, other = Wish(*strict.property), Wish(*rule.property)
            there, path = upper.where(("rules", at, one.name)), ("rules", index, other.name)
            everywhere = strict.when is None or rule.when is None or strict.when == rule.when
            if everywhere and contradict(one, other):
                yield lower.problem(path, f"no answer has it and also the `{one}` of {there}, which stands above")
            elif strict.when == rule.when and looser(one, other):
                yield lower.problem(
                    path, f"would loosen the `{one}` of {there}; a lower tier only narrows, got {other.value}"
                )
            elif (one, strict.when) == (other, rule.when) and rule.min_rate < strict.min_rate:
                there = upper.where(("rules", at, "min_rate"))
                sentence = f"would loosen the {strict.min_rate:g} of {there}; a lower tier only narrows"
                yield lower.problem(("rules", index, "min_rate"), f"{sentence}, got {rule.min_rate:g}")


def _excluding_requirements(document: PolicyDocument) -> Iterator[Problem]:
    """Requirements of one document that no answer meets together."""
    own = [(index, rule) for index, rule in document.rules if isinstance(rule, RequirementRule)]
    for (first, one), (second, other) in combinations(own, 2):
        together = one.when is None or other.when is None or one.when == other.when
        if together and contradict(Wish(*one.property), Wish(*other.property)):
            sentence = f"no answer has it and also the `{Wish(*one.property)}` of line {document.line(first)}"
            yield document.problem(("rules", second, other.property[0]), f"{sentence}; take one of them out")


def _weaker_bound(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    if upper.certify is None or lower.certify is None:
        return
    for key, sign in (("min_refusal", -1), ("delta", 1)):
        asked, held = getattr(lower.certify, key), getattr(upper.certify, key)
        if sign * asked > sign * held:
            sentence = f"would loosen the {held:g} of {upper.where(('certify', key))}; a lower tier only narrows"
            yield lower.problem(("certify", key), f"{sentence}, got {asked:g}")


def _wider_aspects(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    asked, held = lower.aspects.max_changed, upper.aspects.max_changed
    if asked is not None and held is not None and asked > held:
        sentence = f"would loosen the {held:g} of {upper.where(('aspects', 'max_changed'))}; a lower tier only narrows"
        yield lower.problem(("aspects", "max_changed"), f"{sentence}, got {asked:g}")
    fixed, allowed = (set(map(skeleton, names)) for names in (upper.aspects.fixed, upper.aspects.personalisable))
    for index, aspect in enumerate(lower.aspects.personalisable):
        if skeleton(aspect) in fixed:
            there = upper.where(("aspects", "fixed"))
            sentence = f"`{aspect}` is fixed by {there}; a lower tier cannot let users change it"
            yield lower.problem(("aspects", "personalisable", index), sentence)
        elif allowed and skeleton(aspect) not in allowed:
            there = upper.where(("aspects", "personalisable"))
            sentence = f"`{aspect}` is not among the personalisable aspects of {there}"
            yield lower.problem(("aspects", "personalisable", index), sentence)
    for index, rule in lower.rules:
        if rule.kind != "preference":
            continue
        if skeleton(rule.aspect) in fixed or (allowed and skeleton(rule.aspect) not in allowed):
            there = upper.where(("aspects",))
            names = ", ".join(upper.aspects.personalisable) or "none"
            sentence = f"`{rule.aspect}` may not be tailored, says {there}; personalisable: {names}"
            yield lower.problem(("rules", index, "aspect"), sentence)
