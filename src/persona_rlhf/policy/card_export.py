"""Policy Cards from policy documents, and back (Mavračić 2025, arXiv 2510.24383).

A card also describes a deployment, which a policy document does not: logs, reviews, approvals. The provider gives that
part as `details`, a card without our rules.

| policy document | policy card |
|---|---|
| issuer, tier, version, jurisdiction | meta.owner, and an entry of applicable_policies |
| restriction | an action rule: `deny` to refuse or redirect, `allow` to answer with a notice |
| text of a redirect or notice | an obligation whose `when` names the action rule |
| requirement | an obligation, with its property as the description |
| aspects | action rules: `deny` where fixed, `allow` where personalisable |
| limit, min_refusal, min_rate, certify, max_changed | a detector with that threshold |
| `references` of rules | assurance_mapping, one list of all rules |
| version, rationale, contact, probes, references of a rule | references.notes, as JSON: a card has no field for them |
| certify.with, contact of the issuer | references.notes |

Nothing is dropped: a key without a field of its own stands in references.notes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from urllib.parse import quote

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.loader import KeyPath, YamlDocument, check_section, in_order
from persona_rlhf.policy.card_schema import PolicyCard
from persona_rlhf.policy.documents import ROLE, PolicyDocument
from persona_rlhf.policy.rule_schema import RequirementRule, RestrictionRule, Rule

Tree = dict[str, Any]

FRAMEWORKS = ("nist", "iso_42001", "eu_ai_act")
"""The frameworks of `references` and of a card's assurance_mapping."""

URN = "urn:persona-rlhf:"
DOCUMENT = "persona-rlhf policy document of tier "
MARK = "Keys of the policy document that a policy card has no field for (JSON): "
_UNPLACED = ("version", "rationale", "contact", "probes", "references")
_ACTIONS = ("fixed", "personalisable")  # lists of aspects, whose entries are action rules
SECTIONS = ("certify", "aspects")
"""Sections of a document whose thresholds are detectors; their other keys stand in references.notes."""

LISTS: tuple[KeyPath, ...] = (
    ("applicable_policies",),
    ("controls", "action_rules"),
    ("obligations",),
    ("monitoring", "logging", "fields"),
    ("monitoring", "detectors"),
    ("kpis_thresholds", "critical_auto_fail"),
    *(("assurance_mapping", name) for name in FRAMEWORKS),
)
"""Lists of a card to which a document adds."""

LISTS_AND_KPIS: tuple[KeyPath, ...] = (*LISTS, ("kpis_thresholds", "kpis"))

FIGURES = {
    "certify.min_refusal": ("<", "share of certify probes refused, pooled over tier one"),
    "certify.delta": (">", "chance that an adapter below the refusal rate is released, per user"),
    "certify.max_over_refusal": (">", "share of harmless prompts refused where the base answers"),
    "aspects.max_changed": (">", "share of the base's right answers changed"),
    "limit": (">", "nats of excess refusal loss in training"),
    "min_refusal": ("<", "share of the category's certify probes refused"),
    "min_rate": ("<", "share of answers that have the property"),
}
"""Thresholds of a document as detectors: the operator that reports, and the figure."""


def export_card(document: PolicyDocument, details: YamlDocument) -> Tree:
    """The card of a document of tier one or two in the deployment of `details`.

    Raises InputError with every key that the details lack, where the document extends another, or is of tier three.
    """
    problems = [*details.problems, *_inexpressible(document)]
    card = _joined(details, parts_of(document), problems)
    section, faults = check_section(PolicyCard, details._replace(tree=card))
    if section is None or problems:
        raise InputError(in_order([*problems, *faults]))
    return section.model_dump(exclude_none=True)


def _inexpressible(document: PolicyDocument) -> Iterator[Problem]:
    if document.tier == 3:
        yield document.problem(("tier",), "a policy card states a provider's rules; tier three states none")
    if document.extends is not None:
        sentence = "a policy card stands alone: export the extended document too, or write its rules into this one"
        yield document.problem(("extends",), sentence)


def parts_of(document: PolicyDocument) -> Tree:
    """The entries of a card that come from the document alone."""
    parts: Tree = {"meta": {"owner": document.issuer.name}}
    for path in LISTS:
        node_at(parts, path[:-1])[path[-1]] = []
    tier = "one" if document.tier == 1 else "two"
    policy = {"name": f"{DOCUMENT}{tier}", "jurisdiction": document.jurisdiction or "", "version": document.version}
    parts["applicable_policies"].append(policy)
    actions: list[Tree] = parts["controls"]["action_rules"]
    for kind, effect in zip(_ACTIONS, ("deny", "allow"), strict=True):
        for n, aspect in enumerate(getattr(document.aspects, kind), 1):
            condition = _written([("aspect", "==", aspect)])
            actions.append(_action_rule(f"{kind}-{n:03d}-{aspect}", "personalise", "answer", condition, effect))
    for name in SECTIONS:
        for key, value in _keys_of(document, name).items():
            if f"{name}.{key}" in FIGURES:
                _add_figure(parts, f"{name}.{key}", None, value)
    for n, rule in enumerate(rules_of(document), 1):
        if isinstance(rule, RestrictionRule):
            _add_restriction(parts, n, rule, ROLE[tier])
        elif isinstance(rule, RequirementRule):
            _add_requirement(parts, rule, ROLE[tier])
        for name in FRAMEWORKS if rule.references else ():
            tokens = parts["assurance_mapping"][name]
            tokens += [token for token in getattr(rule.references, name) if token not in tokens]
    if unplaced := unplaced_keys(document):
        parts["references"] = {"notes": f"{MARK}{json.dumps(unplaced)}"}
    return parts


def rules_of(document: PolicyDocument) -> list[Rule]:
    """The rules in the order of a card: restrictions before requirements."""
    rules = [placed.rule for placed in document.rules]
    return sorted(rules, key=lambda rule: not isinstance(rule, RestrictionRule))


def _keys_of(document: PolicyDocument, name: str) -> Tree:
    """The keys of one of SECTIONS that the document states."""
    section = getattr(document, name)
    return {} if section is None else section.model_dump(exclude_none=True, by_alias=True)


def unplaced_keys(document: PolicyDocument) -> Tree:
    """The keys that stand in references.notes: `{"rules": {ID: {KEY: VALUE}}, "issuer": {...}, "certify": {...}}`."""
    unplaced: Tree = {}
    if document.issuer.contact is not None:
        unplaced["issuer"] = {"contact": document.issuer.contact}
    for name in SECTIONS:
        keys = _keys_of(document, name)
        if rest := {key: keys[key] for key in keys if f"{name}.{key}" not in FIGURES and key not in _ACTIONS}:
            unplaced[name] = rest
    for rule in rules_of(document):
        dumped = rule.model_dump(exclude_none=True)
        keys = {key: dumped[key] for key in _UNPLACED if key in dumped}
        if dumped.get("action") == "refuse":  # as without it, but the hash of the policy differs
            keys["action"] = "refuse"
        if keys:
            unplaced.setdefault("rules", {})[rule.id] = keys
    return unplaced


def _add_restriction(parts: Tree, n: int, rule: RestrictionRule, role: str) -> None:
    terms: list[Term] = [("rule", "==", rule.id), ("request.category", "==", rule.category), *_scope(rule, rule.when)]
    effect = "allow" if rule.action == "answer_with_notice" else "deny"
    action = _action_rule(f"rule-{n:03d}-{rule.id}", "answer", "request", _written(terms), effect)
    names = [_add_figure(parts, key, rule.id, getattr(rule, key)) for key in ("limit", "min_refusal")]
    if evidence := [name for name in names if name is not None]:
        action["evidence_required"] = evidence
    parts["controls"]["action_rules"].append(action)
    if rule.text is not None:
        notice = {"id": f"text of {rule.id}", "description": rule.text, "when": action["id"]}
        parts["obligations"].append({**notice, "responsible_role": role})


def _add_requirement(parts: Tree, rule: RequirementRule, role: str) -> None:
    name, value = rule.property
    obligation = {"id": rule.id, "description": f"{name}: {json.dumps(value, ensure_ascii=False)}"}
    if terms := _scope(rule, rule.when):
        obligation["when"] = _written(terms)
    figure = _add_figure(parts, "min_rate", rule.id, rule.min_rate)
    parts["obligations"].append({**obligation, "responsible_role": role, "evidence_required": [figure]})


def _add_figure(parts: Tree, key: str, rule: str | None, value: float | None) -> str | None:
    """Adds a threshold as a detector, with its field of the log, and a red line for a rate of refusals."""
    if value is None:
        return None
    operator, figure = FIGURES[key]
    name = key if rule is None else f"{key} of {rule}"
    uri = URN + ":".join([key, *([] if rule is None else [quote(rule, safe="")])])
    detector = {"name": name, "description": figure, "uri": uri, "operator": operator, "threshold": float(value)}
    parts["monitoring"]["detectors"].append(detector)
    parts["monitoring"]["logging"]["fields"].append(name)
    if key.endswith("min_refusal"):
        parts["kpis_thresholds"]["critical_auto_fail"].append(f"{name} {operator} {value:g}")
    return name


def _action_rule(name: str, action: str, resource: str, condition: str, effect: str) -> Tree:
    key = re.sub("[^A-Z0-9]+", "-", name.upper()).strip("-")
    rule = {"id": f"AR-{key}", "subject": "adapter", "action": action, "resource": resource}
    return {**rule, "condition": condition, "effect": effect}


Term = tuple[str, str, str]
"""A term of a condition: a name, an operator, and a text."""

AND = " && "


def _scope(rule: Rule, when: Any) -> list[Term]:
    """The prompts and days of a rule as terms."""
    terms: list[Term] = []
    if when is not None:
        terms.append(("request.topic", "==", when.topic) if when.topic else ("request.text", "matches", when.pattern))
    terms += [("day", ">=", rule.valid_from)] if rule.valid_from else []
    terms += [("day", "<=", rule.valid_until)] if rule.valid_until else []
    return terms


def _written(terms: list[Term]) -> str:
    return AND.join(f"{name} {operator} {json.dumps(text, ensure_ascii=False)}" for name, operator, text in terms)


def _joined(details: YamlDocument, parts: Tree, problems: list[Problem]) -> Tree:
    """The details with the entries of the document behind theirs. The check of the card reports what is no list."""
    card: Tree = deepcopy(details.tree) if isinstance(details.tree, dict) else {}
    for path in LISTS_AND_KPIS:
        parent = node_at(card, path[:-1])
        listed = parent.setdefault(path[-1], []) if isinstance(parent, dict) else None
        if isinstance(listed, list) and path in LISTS:
            once = path[0] == "assurance_mapping"
            listed += [entry for entry in node_at(parts, path) if not (once and entry in listed)]
    owner = parts["meta"]["owner"]
    if isinstance(meta := node_at(card, ("meta",)), dict) and meta.setdefault("owner", owner) != owner:
        place = details.place(("meta", "owner"))
        sentence = f"the owner is the document's issuer, `{owner}`; leave the key out"
        problems.append(Problem(place.file, place.line, "meta.owner", sentence))
    if "references" in parts and isinstance(references := node_at(card, ("references",)), dict):
        notes = references.get("notes")
        references["notes"] = "\n".join([*([] if notes is None else [str(notes)]), parts["references"]["notes"]])
    return card


def node_at(tree: Tree, path: KeyPath) -> Any:
    """The node at a path, made of sections where there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, dict):
            return None
        node = node.setdefault(key, {})
    return node
