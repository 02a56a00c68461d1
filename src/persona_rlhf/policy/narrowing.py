"""The rule between tiers: a lower tier can only narrow what stands above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from persona_rlhf.inputs.problems import Problem
from persona_rlhf.policy.contradictions import contradict, looser
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.lookalikes import root, skeleton
from persona_rlhf.policy.statements import ACTIONS, Asked, PreferenceRule, RestrictionRule, asked


def widenings(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Every attempt of a document to remove, weaken or shadow something in one of a higher tier or that it extends.

    Documents come in the order of their tiers, each after its bases; each problem names both documents. Rules that are
    out of their dates count as well: they cannot be loosened before they are in force.
    """
    by_path = {document.path: document for document in documents}
    higher = {tier: [d for d in documents if d.tier < tier] for tier in {document.tier for document in documents}}
    yield from _shadowed_ids(documents)
    for lower in documents:
        yield from _excluding_requirements(lower)
        bases = (by_path[path] for path in reversed(lower.bases) if by_path[path].tier == lower.tier)
        for upper in (*higher[lower.tier], *bases):
            yield from _weaker_restrictions(upper, lower)
            yield from _renamed_categories(upper, lower)
            yield from _weaker_requirements(upper, lower)
            yield from _weaker_bound(upper, lower)
            yield from _wider_aspects(upper, lower)


def _shadowed_ids(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Ids that stand in another document already, or look like one that does."""
    seen: dict[str, tuple[PolicyDocument, int, str]] = {}
    for document in documents:
        for index, rule in document.rules:
            first, at, name = seen.setdefault(skeleton(rule.id), (document, index, rule.id))
            if first is not document:
                like = "is" if rule.id == name else f"looks like `{name}`,"
                sentence = f"`{rule.id}` {like} a rule of {first.where(('rules', at, 'id'))}; give this rule its own id"
                yield document.problem(("rules", index, "id"), sentence)


def _weaker_restrictions(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    above = {rule.category: (at, rule) for at, rule in upper.rules if isinstance(rule, RestrictionRule)}
    for index, rule in lower.rules:
        if not isinstance(rule, RestrictionRule) or rule.category not in above:
            continue
        at, strict = above[rule.category]
        for key, sign in (("limit", 1), ("min_refusal", -1)):
            wanted, held = getattr(rule, key), getattr(strict, key)
            if wanted is not None and held is not None and sign * wanted > sign * held:
                there = upper.where(("rules", at, key))
                yield lower.problem(("rules", index, key), _loosened(f"{held:g} of {there}", wanted))
        held_action, action = strict.action or "refuse", rule.action or strict.action or "refuse"
        if ACTIONS.index(action) > ACTIONS.index(held_action):
            there = upper.where(("rules", at))
            yield lower.problem(("rules", index, "action"), _loosened(f"{held_action} of {there}", action))
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
    for (at, strict), (index, own) in product(_asking(upper), _asking(lower)):
        one, other = strict.property, own.property
        there = f"`{one}` of {upper.where(('rules', at, one.name))}"
        if _meet(strict, own) and contradict(one, other):
            yield lower.problem(("rules", index), f"no answer has `{other}` and the {there}, which stands above")
        elif strict.when == own.when and looser(one, other):
            yield lower.problem(("rules", index, other.name), _loosened(there, other.value))
        elif (one, strict.when) == (other, own.when) and own.min_rate < strict.min_rate:
            where = upper.where(("rules", at, "min_rate"))
            yield lower.problem(
                ("rules", index, "min_rate"), _loosened(f"{strict.min_rate:g} of {where}", own.min_rate)
            )


def _excluding_requirements(document: PolicyDocument) -> Iterator[Problem]:
    """Requirements of one document that no answer meets together."""
    for (at, one), (index, other) in combinations(_asking(document), 2):
        if _meet(one, other) and contradict(one.property, other.property):
            sentence = f"no answer has `{other.property}` and the `{one.property}` of line {document.line(at)}"
            yield document.problem(("rules", index), f"{sentence}; take one of them out")


def _asking(document: PolicyDocument) -> list[tuple[int, Asked]]:
    return [(index, wanted) for index, rule in document.rules if (wanted := asked(rule)) is not None]


def _meet(one: Asked, other: Asked) -> bool:
    """Whether some prompt is certainly one that both are about."""
    return one.when is None or other.when is None or one.when == other.when


def _loosened(held: str, got: object) -> str:
    got = f"{got:g}" if isinstance(got, float) else got
    return f"would loosen the {held}; what stands above, or is extended, is only narrowed, got {got}"


def _weaker_bound(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    if upper.certify is None or lower.certify is None:
        return
    for key, sign in (("min_refusal", -1), ("delta", 1)):
        wanted, held = getattr(lower.certify, key), getattr(upper.certify, key)
        if sign * wanted > sign * held:
            yield lower.problem(("certify", key), _loosened(f"{held:g} of {upper.where(('certify', key))}", wanted))


def _wider_aspects(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    share, held = lower.aspects.max_changed, upper.aspects.max_changed
    if share is not None and held is not None and share > held:
        there = f"{held:g} of {upper.where(('aspects', 'max_changed'))}"
        yield lower.problem(("aspects", "max_changed"), _loosened(there, share))
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
        if not isinstance(rule, PreferenceRule):
            continue
        for aspect in dict.fromkeys((rule.aspect, *rule.implied_aspects)):
            if skeleton(aspect) in fixed or (allowed and skeleton(aspect) not in allowed):
                there = upper.where(("aspects",))
                names = ", ".join(upper.aspects.personalisable) or "none"
                sentence = f"`{aspect}` may not be tailored, says {there}; personalisable: {names}"
                yield lower.problem(("rules", index, "aspect"), sentence)
