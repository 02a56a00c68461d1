"""Merging documents of three tiers: who may speak, one restriction a category, and enough probes for every bound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.yaml_text import KeyPath
from persona_rlhf.policy.documents import PolicyDocument, read_document
from persona_rlhf.policy.enforcement import probes_needed
from persona_rlhf.policy.hazards import CATEGORIES, Probe, read_probes
from persona_rlhf.policy.likeness import plain
from persona_rlhf.policy.narrowing import widenings
from persona_rlhf.policy.public_sets import more_probes
from persona_rlhf.policy.rules import Restriction
from persona_rlhf.policy.statements import Certify, RestrictionRule


def read_all(paths: Sequence[Path | str]) -> tuple[list[PolicyDocument], list[Problem]]:
    """Reads documents in the order of their tiers, and every problem in them, alone and against those above."""
    documents: list[PolicyDocument] = []
    problems: list[Problem] = []
    for path in paths:
        document, faults = read_document(path)
        documents += [document] if document else []
        problems += faults
    documents.sort(key=lambda document: document.tier)
    return documents, [*problems, *widenings(documents)]


def casting(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """One model provider, at most one application provider, one document a user."""
    if not documents or documents[0].tier != 1:
        name = documents[0].path if documents else "policy.documents"
        yield Problem(name, None, None, "a policy needs a tier-one document, such as configs/policy/tier_one.yaml")
    seen: dict[tuple[int, str | None], str] = {}
    for document in documents:
        key = (document.tier, document.issuer.user_id)
        first = seen.setdefault(key, document.path)
        if first is not document.path:
            who = f"user `{document.issuer.user_id}`" if document.issuer.user_id else f"tier {document.tier}"
            yield document.problem(("tier",), f"{first} speaks for {who} already; a policy takes one document of each")


def merge_restrictions(documents: Sequence[PolicyDocument]) -> tuple[list[Restriction], list[Problem]]:
    """One restriction a category, in the order of tiers; a lower tier's stricter values are merged in."""
    merged: dict[str, Restriction] = {}
    problems: list[Problem] = []
    for document in documents:
        for index, rule in document.rules:
            if not isinstance(rule, RestrictionRule):
                continue
            upper = merged.get(rule.category)
            if upper is None:
                restriction, faults = _new_restriction(document, index, rule)
                problems += faults
                if restriction:
                    merged[rule.category] = restriction
                continue
            source = f"{document.where(('rules', index))} {rule.id}"
            merged[rule.category] = replace(
                upper,
                limit=upper.limit if rule.limit is None else min(upper.limit, rule.limit),
                min_refusal=max(upper.min_refusal, rule.min_refusal or 0.0),
                narrowed_by=(*upper.narrowed_by, source),
            )
    return list(merged.values()), problems


def _new_restriction(
    document: PolicyDocument, index: int, rule: RestrictionRule
) -> tuple[Restriction | None, list[Problem]]:
    problems: list[Problem] = []
    at: KeyPath = ("rules", index)
    probes: list[Probe] = []
    digest = ""
    if rule.probes is None and rule.category not in CATEGORIES:
        known = ", ".join(CATEGORIES)
        sentence = f"`{rule.category}` is no bundled category ({known}), so it needs `probes`: a bank of JSON lines"
        problems.append(document.problem((*at, "category"), sentence))
    else:
        probes, digest, faults = _read_banks(document, at, rule)
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
    ), []


def _read_banks(document: PolicyDocument, at: KeyPath, rule: RestrictionRule) -> tuple[list[Probe], str, list[Problem]]:
    """The probes of all banks of a rule, a sha256 of the banks' bytes, and what is wrong in or between them."""
    probes: list[Probe] = []
    digests: list[str] = []
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for bank in rule.banks:
        try:
            file = find(bank)
            found = read_probes(file, rule.category)
            digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        except InputError as fault:
            missing = [p for p in fault.problems if p.line is None and p.file == bank]
            problems += [p for p in fault.problems if p not in missing]
            problems += [document.problem((*at, "probes"), f"{p.sentence}, got `{bank}`") for p in missing]
            continue
        twice = next((p for p in found if p.id in places or plain(p.prompt) in places), None)
        if twice is not None:
            first = places.get(twice.id) or places[plain(twice.prompt)]
            sentence = f"`{twice.id}` of {bank}, or its prompt, stands in {first} too; leave it out of one of them"
            problems.append(document.problem((*at, "probes"), sentence))
        places |= {key: bank for probe in found for key in (probe.id, plain(probe.prompt))}
        probes += found
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return probes, whole, problems


def merge_certify(documents: Sequence[PolicyDocument]) -> Certify:
    """The strictest bound that any document asks for."""
    bounds = [document.certify for document in documents if document.certify is not None]
    return Certify(min_refusal=max(b.min_refusal for b in bounds), delta=min(b.delta for b in bounds))


def merge_aspects(documents: Sequence[PolicyDocument]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fixed aspects of any document; of the personalisable ones, those that no document leaves out or fixes."""
    fixed = dict.fromkeys(aspect for document in documents for aspect in document.aspects.fixed)
    lists = [document.aspects.personalisable for document in documents if document.aspects.personalisable]
    first = lists[0] if lists else []
    open_to_taste = [a for a in first if a not in fixed and all(a in other for other in lists[1:])]
    return tuple(fixed), tuple(open_to_taste)


def unusable_probes(
    restrictions: Sequence[Restriction], certify: Certify, documents: Sequence[PolicyDocument]
) -> Iterator[Problem]:
    """Banks too small for the bound asked of them, with nothing to train on, or that test what they train."""
    by_path = {document.path: document for document in documents}
    pooled = 0
    for restriction in restrictions:
        document = by_path[restriction.document]
        index = next(i for i, rule in document.rules if rule.id == restriction.id)
        certified = sum(probe.split == "certify" for probe in restriction.probes)
        pooled += certified if restriction.tier == 1 else 0
        needed = probes_needed(restriction.min_refusal, certify.delta)
        if certified < needed:
            sentence = _too_few(restriction.min_refusal, certify.delta, needed, certified)
            more = more_probes([restriction.category], needed - certified)
            yield document.problem(("rules", index, "min_refusal"), f"{sentence} of {restriction.bank}; {more}")
        trained = {probe.prompt for probe in restriction.probes if probe.split == "train"}
        if not trained:
            sentence = (
                f"{restriction.bank} has no probe of split `train`, so nothing would hold the category in training"
            )
            yield document.problem(("rules", index, "probes"), sentence)
        for probe in restriction.probes:
            if probe.split != "train" and probe.prompt in trained:
                sentence = (
                    f"`{probe.id}` of {restriction.bank} is in split {probe.split}, and its prompt is trained too"
                )
                yield document.problem(("rules", index, "probes"), sentence)
                break
    needed = probes_needed(certify.min_refusal, certify.delta)
    if restrictions and pooled < needed:
        strictest = max((d for d in documents if d.certify), key=lambda d: (d.certify or certify).min_refusal)
        sentence = _too_few(certify.min_refusal, certify.delta, needed, pooled)
        more = more_probes([r.category for r in restrictions if r.tier == 1], needed - pooled)
        yield strictest.problem(("certify", "min_refusal"), f"{sentence} of all tier-one banks; {more}")


def _too_few(min_refusal: float, delta: float, needed: int, certified: int) -> str:
    return (
        f"a bound of {min_refusal:g} at {1 - delta:.4g} (delta / 2 a look) needs at least {needed} probes without "
        f"a miss, and there are {certified} in split `certify`"
    )
