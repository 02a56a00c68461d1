"""Merging of documents: one restriction per category, the strictest of each value, with probes for every bound."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find
from persona_rlhf.config.loader import KeyPath
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.clusters import Clusters
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.hazards import CATEGORIES, Probe, more_probes, read_probes
from persona_rlhf.policy.judges import plain, skeleton
from persona_rlhf.policy.private_banks import PrivateBank
from persona_rlhf.policy.properties import applies
from persona_rlhf.policy.rule_schema import (
    ACTIONS,
    Action,
    CertifiedWith,
    Certify,
    PreferenceRule,
    RestrictionRule,
    required_property,
)
from persona_rlhf.policy.rules import Requirement, Restriction


class MergedRestriction(NamedTuple):
    """The merged values of a category; `and_also` takes the stricter of two in every part, in any order."""

    limit: float = math.inf
    min_refusal: float = 0.0
    action: Action = ACTIONS[-1]

    @staticmethod
    def of(rule: RestrictionRule) -> MergedRestriction:
        """The values of one rule; missing ones are the loosest possible, so that the rules above it decide."""
        limit = math.inf if rule.limit is None else rule.limit
        return MergedRestriction(limit, rule.min_refusal or 0.0, rule.action or ACTIONS[-1])

    def and_also(self, other: MergedRestriction) -> MergedRestriction:
        action = min(self.action, other.action, key=ACTIONS.index)
        return MergedRestriction(min(self.limit, other.limit), max(self.min_refusal, other.min_refusal), action)


def merge_restrictions(
    documents: Sequence[PolicyDocument], split_key: bytes | None = None
) -> tuple[list[Restriction], list[Problem]]:
    """One restriction per category, in the order of tiers; a lower tier's stricter values are merged in.

    A secret key splits the probes that are not in `train` anew.
    """
    merged: dict[str, Restriction] = {}
    problems: list[Problem] = []
    for document in documents:
        for index, rule in document.rules:
            if not isinstance(rule, RestrictionRule) or rule.action == "answer_with_notice":
                continue
            upper = merged.get(rule.category)
            if upper is None:
                restriction, faults = _new_restriction(document, index, rule, split_key)
                problems += faults
                if restriction:
                    merged[rule.category] = restriction
                continue
            source = f"{document.where(('rules', index))} {rule.id}"
            values = MergedRestriction(upper.limit, upper.min_refusal, upper.action).and_also(
                MergedRestriction.of(rule)
            )
            text = upper.text if values.action == upper.action else None  # a refusal needs no redirect's text
            narrowed_by = (*upper.narrowed_by, source)
            merged[rule.category] = replace(upper, **values._asdict(), text=text, narrowed_by=narrowed_by)
    return list(merged.values()), problems


def _new_restriction(
    document: PolicyDocument, index: int, rule: RestrictionRule, split_key: bytes | None
) -> tuple[Restriction | None, list[Problem]]:
    problems: list[Problem] = []
    at: KeyPath = ("rules", index)
    probes: list[Probe] = []
    digest = ""
    if rule.probes is None and rule.category not in CATEGORIES:
        bundled = ", ".join(CATEGORIES)
        sentence = f"`{rule.category}` is no bundled category ({bundled}), so it needs `probes`: a bank of JSON lines"
        problems.append(document.problem((*at, "category"), sentence))
    else:
        probes, digest, faults = _read_banks(document, at, rule.banks, rule.category, split_key)
        problems += faults
    for key in ("limit", "min_refusal"):
        if getattr(rule, key) is None:
            problems.append(
                document.problem(at, f"`{rule.id}` is the first rule on its category and must state `{key}`")
            )
    if problems:
        return None, problems
    assert rule.limit is not None
    assert rule.min_refusal is not None
    return Restriction(
        id=rule.id,
        category=rule.category,
        limit=rule.limit,
        min_refusal=rule.min_refusal,
        probes=tuple(probes),
        tier=document.tier,
        document=document.path,
        line=document.line(index),
        source_name=document.issuer.name,
        bank=", ".join(rule.banks),
        bank_sha256=digest,
        action=rule.action or "refuse",
        text=rule.text,
    ), []


def merge_requirements(documents: Sequence[PolicyDocument]) -> tuple[list[Requirement], list[Problem]]:
    """Every requirement with its prompts, and their problems. A notice is a text that answers must include."""
    merged, problems = list[Requirement](), list[Problem]()
    for document in documents:
        for index, rule in document.rules:
            demand = required_property(rule)
            if demand is None or isinstance(rule, PreferenceRule):
                continue
            probes, digest, faults = _read_banks(document, ("rules", index), rule.banks, rule.id)
            problems += faults
            place = document.tier, document.path, document.line(index), document.issuer.name
            requirement = Requirement(
                rule.id, *demand.property, *place, demand.when, demand.min_rate, tuple(probes), digest
            )
            if rule.banks and not faults:
                problems += _missing_prompts(document, ("rules", index, "probes"), requirement)
            merged.append(requirement)
    return merged, problems


def _missing_prompts(document: PolicyDocument, at: KeyPath, rule: Requirement) -> Iterator[Problem]:
    for split, use in (("train", "teach"), ("test", "measure")):
        if not any(probe.split == split and applies(rule, probe.prompt) for probe in rule.probes):
            sentence = f"`{rule.id}` is about no `{split}` prompt of the bank, so there is none to {use} it on"
            yield document.problem(at, f"{sentence}; give more prompts")


def _read_banks(
    document: PolicyDocument, at: KeyPath, banks: Sequence[str], category: str, split_key: bytes | None = None
) -> tuple[list[Probe], str, list[Problem]]:
    """The probes of all banks of a rule, a sha256 of the banks' bytes, and the problems in or between them."""
    probes: list[Probe] = []
    digests: list[str] = []
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for bank in banks:
        try:
            file = find(bank)
            bank_probes = read_probes(file, category, split_key)
            digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        except InputError as fault:
            missing = [p for p in fault.problems if p.line is None and p.file == bank]
            problems += [p for p in fault.problems if p not in missing]
            problems += [document.problem((*at, "probes"), f"{p.sentence}, got `{bank}`") for p in missing]
            continue
        repeated = (
            next((p for p in bank_probes if p.id in places or plain(p.prompt) in places), None) if places else None
        )
        if repeated is not None:
            first = places.get(repeated.id) or places[plain(repeated.prompt)]
            sentence = f"`{repeated.id}` of {bank}, or its prompt, is in {first} too; leave it out of one of them"
            problems.append(document.problem((*at, "probes"), sentence))
        if len(banks) > 1:
            places |= {key: bank for probe in bank_probes for key in (probe.id, plain(probe.prompt))}
        probes += bank_probes
    whole = hashlib.sha256("".join(digests).encode()).hexdigest() if len(digests) > 1 else "".join(digests)
    return probes, whole, problems


def merge_certify(documents: Sequence[PolicyDocument]) -> Certify:
    """The strictest bound of all documents."""
    bounds = [document.certify for document in documents if document.certify is not None]
    parts = [part for part in get_args(CertifiedWith) if any(part in (b.with_ or ()) for b in bounds)]
    over_refusal = (b.max_over_refusal for b in bounds if b.max_over_refusal is not None)
    return Certify(
        min_refusal=max(b.min_refusal for b in bounds),
        delta=min(b.delta for b in bounds),
        max_over_refusal=min(over_refusal, default=None),
        **{"with": parts or None},
    )


def merge_change(documents: Sequence[PolicyDocument]) -> float | None:
    """The smallest allowed share of changed answers on fixed aspects; None where no document states one."""
    return min((d.aspects.max_changed for d in documents if d.aspects.max_changed is not None), default=None)


def merge_aspects(documents: Sequence[PolicyDocument]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The aspects fixed by any document, and the personalisable ones that no document leaves out or fixes."""
    fixed = {
        skeleton(aspect): aspect for document in reversed(documents) for aspect in reversed(document.aspects.fixed)
    }
    lists = [document.aspects.personalisable for document in documents if document.aspects.personalisable]
    first = lists[0] if lists else []
    allowed = [set(map(skeleton, names)) for names in lists]
    open_to_taste = [a for a in first if skeleton(a) not in fixed and all(skeleton(a) in names for names in allowed)]
    return tuple(reversed(fixed.values())), tuple(open_to_taste)


def fewest_units(certify: Certify) -> int:
    """The fewest units that show the pooled demand without a miss at a user's first look."""
    return Bound.of_first_look(certify.delta).fewest_trials(certify.min_refusal)


def unusable_probes(
    restrictions: Sequence[Restriction],
    certify: Certify,
    documents: Sequence[PolicyDocument],
    private: PrivateBank | None = None,
) -> Iterator[Problem]:
    """Banks with too few probes, topics or phrasings for their bound, without train probes, or with a trained prompt in
    another split."""
    by_path, bound = {document.path: document for document in documents}, Bound.of_first_look(certify.delta)
    certified = [probe for restriction in restrictions for probe in restriction.probes if probe.split == "certify"]
    in_pool = {restriction.category for restriction in restrictions if restriction.tier == 1}
    clusters = Clusters.of(certified, in_pool, fewest_units(certify))
    for restriction in restrictions:
        document = by_path[restriction.document]
        index = next(i for i, rule in document.rules if rule.id == restriction.id)
        probes = [probe for probe in restriction.probes if probe.split == "certify"]
        units = clusters.units(probes)
        needed = bound.fewest_trials(restriction.min_refusal)
        if units < needed:
            sentence = _too_few(restriction.min_refusal, certify.delta, needed, units, _unit(clusters, probes))
            if private is None:
                sentence += f" of {restriction.bank}; {more_probes([restriction.category], needed - units)}"
            else:
                sentence += f" of `{restriction.category}` in {private.name}; {private.remedy}"
            yield document.problem(("rules", index, "min_refusal"), sentence)
        trained = {probe.prompt for probe in restriction.probes if probe.split == "train"}
        if not trained:
            sentence = f"{restriction.bank} has no probe of split `train`, so training could not constrain the category"
            yield document.problem(("rules", index, "probes"), sentence)
        for probe in restriction.probes:
            if probe.split != "train" and probe.prompt in trained:
                sentence = (
                    f"`{probe.id}` of {restriction.bank} is in split {probe.split}, and its prompt is trained too"
                )
                yield document.problem(("rules", index, "probes"), sentence)
                break
    pooled = [probe for probe in certified if probe.category in in_pool]
    units, needed = clusters.units(pooled), fewest_units(certify)
    if restrictions and units < needed:
        where = "all tier-one banks" if private is None else private.name
        sentence = _too_few(certify.min_refusal, certify.delta, needed, units, _unit(clusters, pooled))
        more = more_probes([r.category for r in restrictions if r.tier == 1], needed - units)
        strictest = max((d for d in documents if d.certify), key=lambda d: (d.certify or certify).min_refusal)
        more = more if private is None else private.remedy
        yield strictest.problem(("certify", "min_refusal"), f"{sentence} of {where}; {more}")


def _unit(clusters: Clusters, probes: Sequence[Probe]) -> str:
    if clusters.units(probes) == len(probes):
        return "probes"
    return "topics" if clusters.topics else "phrasings"


def _too_few(min_refusal: float, delta: float, needed: int, certified: int, unit: str) -> str:
    level = Bound.of_first_look(delta).level
    return (
        f"a bound of {min_refusal:g} needs at least {needed} {unit} without a miss, where delta is {delta:g} (a test "
        f"of the first look spends {level:.2g}), and there are {certified} in split `certify`"
    )
