"""Inheritance of documents: `extends`, and the check that a lower tier or an extending document only tightens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find
from persona_rlhf.policy.documents import PolicyDocument, read_document
from persona_rlhf.policy.judges import root, skeleton
from persona_rlhf.policy.properties import contradict, looser
from persona_rlhf.policy.rule_schema import (
    ACTIONS,
    PreferenceRule,
    RequiredProperty,
    RestrictionRule,
    required_property,
)


def widenings(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Every removed, weakened or shadowed rule of a higher tier or of an extended document; problems name both.

    Documents come in the order of their tiers, each after its bases. Rules that are not in force today count as well:
    they cannot be loosened before their first day.
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
    """Ids that are in another document already, or look like one that is."""
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
            value, bound = getattr(rule, key), getattr(strict, key)
            if value is not None and bound is not None and sign * value > sign * bound:
                there = upper.where(("rules", at, key))
                yield lower.problem(("rules", index, key), _looser(value, bound, there))
        strict_action, action = strict.action or "refuse", rule.action or strict.action or "refuse"
        if ACTIONS.index(action) > ACTIONS.index(strict_action):
            there = upper.where(("rules", at))
            yield lower.problem(("rules", index, "action"), _looser(action, strict_action, there))
        if rule.probes is not None:
            there = upper.where(("rules", at))
            sentence = f"`{rule.category}` is measured on the probes of {there}; leave out other `probes`"
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
    for (at, strict), (index, rule) in product(_required(upper), _required(lower)):
        one, other = strict.property, rule.property
        there = upper.where(("rules", at, one.name))
        if _meet(strict, rule) and contradict(one, other):
            yield lower.problem(("rules", index), f"no answer has `{other}` and `{one}` ({there}), which is binding")
        elif strict.when == rule.when and looser(one, other):
            yield lower.problem(("rules", index, other.name), _looser(other.value, f"`{one}`", there))
        elif (one, strict.when) == (other, rule.when) and rule.min_rate < strict.min_rate:
            there = upper.where(("rules", at, "min_rate"))
            yield lower.problem(("rules", index, "min_rate"), _looser(rule.min_rate, strict.min_rate, there))


def _excluding_requirements(document: PolicyDocument) -> Iterator[Problem]:
    """Requirements of one document that no answer meets together."""
    for (at, one), (index, other) in combinations(_required(document), 2):
        if _meet(one, other) and contradict(one.property, other.property):
            sentence = f"no answer has `{other.property}` and `{one.property}` (line {document.line(at)})"
            yield document.problem(("rules", index), f"{sentence}; take one of them out")


def _required(document: PolicyDocument) -> list[tuple[int, RequiredProperty]]:
    return [(index, demand) for index, rule in document.rules if (demand := required_property(rule)) is not None]


def _meet(one: RequiredProperty, other: RequiredProperty) -> bool:
    """Whether both are certainly about some prompt."""
    return one.when is None or other.when is None or one.when == other.when


def _looser(value: object, bound: object, there: str) -> str:
    value, bound = (f"{x:g}" if isinstance(x, float) else x for x in (value, bound))
    return f"{value} is looser than {bound} ({there}); a lower tier or an extending document may only tighten it"


def _weaker_bound(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    if upper.certify is None or lower.certify is None:
        return
    for key, sign in (("min_refusal", -1), ("delta", 1)):
        value, bound = getattr(lower.certify, key), getattr(upper.certify, key)
        if sign * value > sign * bound:
            yield lower.problem(("certify", key), _looser(value, bound, upper.where(("certify", key))))
    share, most = lower.certify.max_over_refusal, upper.certify.max_over_refusal
    if share is not None and most is not None and share > most:
        there = upper.where(("certify", "max_over_refusal"))
        yield lower.problem(("certify", "max_over_refusal"), _looser(share, most, there))
    stated, demanded = lower.certify.with_, upper.certify.with_ or []
    if stated is not None and not set(demanded) <= set(stated):
        there = upper.where(("certify", "with"))
        yield lower.problem(("certify", "with"), _looser(", ".join(stated), ", ".join(demanded), there))


def _wider_aspects(upper: PolicyDocument, lower: PolicyDocument) -> Iterator[Problem]:
    share, bound = lower.aspects.max_changed, upper.aspects.max_changed
    if share is not None and bound is not None and share > bound:
        there = upper.where(("aspects", "max_changed"))
        yield lower.problem(("aspects", "max_changed"), _looser(share, bound, there))
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
                sentence = f"`{aspect}` may not be tailored ({there}); personalisable: {names}"
                yield lower.problem(("rules", index, "aspect"), sentence)


_LONGEST = 16
"""The most documents of which each extends the next."""


def read_all(paths: Sequence[Path | str]) -> tuple[list[PolicyDocument], list[Problem]]:
    """The documents and their bases, by tier and each after its bases; and every problem, within and between them.

    A document that is named twice, or named and extended, counts once.
    """
    read: dict[Path, PolicyDocument] = {}
    base_of: dict[Path, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        problems += _read_line(path, read, base_of)
    documents = [_with_bases(file, read, base_of) for file in read]
    documents.sort(key=lambda document: (document.tier, len(document.bases)))
    return documents, [*problems, *widenings(documents)]


def wrong_issuers(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """Missing and surplus issuers: one model provider, at most one application provider, one document per user."""
    if not documents or documents[0].tier != 1:
        name = documents[0].path if documents else "policy.documents"
        yield Problem(name, None, None, "a policy needs a tier-one document, such as configs/policy/tier_one.yaml")
    seen: dict[tuple[int, str | None], PolicyDocument] = {}
    for document in documents:
        user = document.issuer.user_id
        last = seen.get((document.tier, user))
        if last is not None and last.path not in document.bases:
            issuer = f"user `{user}`" if user else f"tier {document.tier}"
            sentence = f"{last.path} is the document of {issuer} already; a policy takes one of each"
            yield document.problem(("tier",), sentence)
            continue
        seen[document.tier, user] = document


def _read_line(path: Path | str, read: dict[Path, PolicyDocument], base_of: dict[Path, Path]) -> Iterator[Problem]:
    """Reads a document and its bases, the nearest first, into `read` and `base_of`."""
    above: dict[Path, PolicyDocument] = {}
    lower: PolicyDocument | None = None
    while True:
        try:
            named = find(path) if lower is None else _beside(lower, str(path))
            file = named.resolve()
        except InputError as error:
            yield from error.problems if lower is None else _at_extends(lower, error.problems)
            return
        if file in above or len(above) > _LONGEST:
            line = [*(document.path for document in above.values()), str(path)]
            fault = (
                f"goes round in a circle: {' -> '.join(line)}" if file in above else f"is the {_LONGEST}th in a line"
            )
            assert lower is not None
            yield lower.problem(("extends",), f"{fault}; leave one of them out")
            return
        if lower is not None:
            base_of[lower.file.resolve()] = file
        document = read.get(file)
        if document is None:
            document, faults = read_document(path if lower is None else named)
            unreadable = lower is not None and document is None and all(fault.line is None for fault in faults)
            yield from _at_extends(lower, faults) if lower is not None and unreadable else faults
            if document is None:
                return
            read[file] = document
        if lower is not None and lower.tier != document.tier:
            sentence = f"{document.path} is of tier {document.tier}; name a document of the same tier"
            yield lower.problem(("extends",), sentence)
        if document.extends is None or file in base_of:
            return
        above[file] = lower = document
        path = document.extends


def _beside(document: PolicyDocument, extends: str) -> Path:
    """The file that a document extends: relative to its folder, else looked up as any named file."""
    try:
        return find(document.file.parent / extends)
    except InputError:
        return find(extends)


def _at_extends(document: PolicyDocument, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Problems of a file that is missing or cannot be read, at the line that names it."""
    for problem in problems:
        yield document.problem(("extends",), f"{problem.sentence}, got `{problem.file}`")


def _with_bases(file: Path, read: dict[Path, PolicyDocument], base_of: dict[Path, Path]) -> PolicyDocument:
    bases: list[str] = []
    at = base_of.get(file)
    while at in read and read[at].path not in bases:
        bases.append(read[at].path)
        at = base_of.get(at)
    return replace(read[file], bases=tuple(bases))
