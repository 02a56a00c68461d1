"""Policy documents: reading one, with every mistake that shows in it alone, and their JSON Schema (2020-12).

The schema serves editors and other programs. Only the reader rejects look-alike ids, dates out of order, patterns that
do not compile, missing files, and conflicts between documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import find
from persona_rlhf.config.loader import KeyPath, Section, YamlDocument, check_section, dotted, read_yaml
from persona_rlhf.policy.judges import disguise, skeleton, topic_names
from persona_rlhf.policy.rule_schema import (
    KINDS,
    PROPERTY_NAMES,
    WISHES,
    Aspects,
    Certify,
    Issuer,
    PreferenceRule,
    RequirementRule,
    RestrictionRule,
    Rule,
    RuleSection,
    Text,
)

Tier = Literal["one", "two", "three"]
NUMBER: dict[str, int] = {"one": 1, "two": 2, "three": 3}
ROLE: dict[str, str] = {"one": "model_provider", "two": "application_provider", "three": "end_user"}


_FOR_EVERYBODY = {"certify": "a bound of the gate", "aspects": "a choice of aspects"}
"""Keys of a document that concern every user, so that no end user states them."""


class DocumentHeader(Section):
    """A document without its rules, which are checked one by one, each by its kind."""

    tier: Tier = Field(description="one, two or three: whose rules these are.")
    issuer: Issuer = Field(description="The issuer, such as {role: model_provider, name: Example Lab}.")
    version: str = Field(min_length=1, description="Version of the document.")
    jurisdiction: Text | None = Field(None, description="Where the document applies, such as EU.")
    extends: Text | None = Field(
        None, description="A document of the same tier that this one adds to; a path from this one's folder."
    )
    certify: Certify | None = Field(None, description="The bound asked of the gate; tier one states it.")
    aspects: Aspects | None = Field(None, description="What may be tailored at all.")
    rules: list[dict[str, object]] = Field(description="The rules: restriction, requirement or preference.")


class PlacedRule(NamedTuple):
    """A rule and its index in its document."""

    at: int
    rule: Rule


@dataclass(frozen=True)
class PolicyDocument:
    """A document with a valid header; `rules` are the valid ones, `yaml` has the place of each."""

    path: str
    file: Path
    tier: int
    issuer: Issuer
    version: str
    jurisdiction: str | None
    extends: str | None
    certify: Certify | None
    aspects: Aspects
    rules: tuple[PlacedRule, ...]
    sha256: str
    yaml: YamlDocument
    bases: tuple[str, ...] = ()  # paths of the documents that it extends, the nearest first

    def problem(self, path: KeyPath, sentence: str) -> Problem:
        """A problem at a key path of this document."""
        place = self.yaml.place(path)
        return Problem(place.file, place.line, dotted(path), sentence)

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key path, for messages about two documents."""
        place = self.yaml.place(path)
        return place.file if place.line is None else f"{place.file}:{place.line}"

    def on(self, day: date) -> PolicyDocument:
        """The document with the rules that are in force on a day."""
        return replace(self, rules=tuple(placed for placed in self.rules if placed.rule.in_force(day)))

    def line(self, index: int) -> int:
        """The line on which a rule starts."""
        return self.yaml.place(("rules", index)).line or 0


def read_document(path: Path | str) -> tuple[PolicyDocument | None, list[Problem]]:
    """The policy document of a file, and every problem in it; no document where its header is not valid.

    A document with problems is returned too, so that its conflicts with other documents show at once.
    """
    try:
        file = find(path)
        document, problems = check_document(str(path), file, read_yaml(file))
    except InputError as fault:
        return None, fault.problems
    if document is not None:
        document = replace(document, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    return document, problems


def check_document(path: str, file: Path, yaml: YamlDocument) -> tuple[PolicyDocument | None, list[Problem]]:
    """The document of a YAML tree, without the hash of its file, and every problem in it."""
    header, problems = check_section(DocumentHeader, yaml)
    problems = [*yaml.problems, *problems]
    tree = yaml.tree
    assert isinstance(tree, dict)
    written = tree.get("rules")
    written = written if isinstance(written, list) else []
    rules: list[PlacedRule] = []
    for index, raw in enumerate(written):
        if isinstance(raw, dict):
            rule, faults = _rule(yaml, index, raw.get("kind"))
            problems += faults
            rules += [PlacedRule(index, rule)] if rule else []
    tier = tree.get("tier")
    if isinstance(tier, str) and tier in ROLE:
        problems += _tier_problems(yaml, tier, tree)
    problems += _repeated(yaml, written)
    if header is None:
        return None, problems
    return PolicyDocument(
        path=path,
        file=file,
        tier=NUMBER[header.tier],
        issuer=header.issuer,
        version=header.version,
        jurisdiction=header.jurisdiction,
        extends=header.extends,
        certify=header.certify,
        aspects=header.aspects or Aspects(),
        rules=tuple(rules),
        sha256="",
        yaml=yaml,
    ), problems


def _rule(document: YamlDocument, index: int, kind: object) -> tuple[Rule | None, list[Problem]]:
    at: KeyPath = ("rules", index)
    if isinstance(kind, str) and kind in KINDS:
        return check_section(KINDS[kind], document, at)
    place = document.place((*at, "kind"))
    hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
    sentence = f"a rule needs a kind: restriction, requirement or preference{hint}"
    return None, [Problem(place.file, place.line, dotted((*at, "kind")), sentence)]


def _tier_problems(document: YamlDocument, tier: str, tree: Mapping[str, object]) -> Iterator[Problem]:
    """Well-formed contents that a document of this tier may not have."""
    number = NUMBER[tier]

    def problem(path: KeyPath, sentence: str) -> Problem:
        place = document.place(path)
        return Problem(place.file, place.line, dotted(path), sentence)

    issuer = tree.get("issuer")
    if isinstance(issuer, dict):
        role = issuer.get("role")
        if role in ROLE.values() and role != ROLE[tier]:
            yield problem(("issuer", "role"), f"a tier-{tier} document is issued by `{ROLE[tier]}`, got `{role}`")
        if issuer.get("user_id") is not None and number != 3:
            yield problem(("issuer", "user_id"), "only the end user of a tier-three document has a user_id")
    if number == 1 and tree.get("certify") is None and tree.get("extends") is None:
        sentence = (
            "tier one states the bound that the gate must show, such as certify: {min_refusal: 0.97, delta: 0.05}"
        )
        yield problem((), sentence)
    for key, words in _FOR_EVERYBODY.items() if number == 3 else ():
        if tree.get(key) is not None:
            yield problem((key,), f"tier three speaks for one user, and {words} binds all; state it in tier one or two")
    rules = tree.get("rules")
    for index, raw in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(raw, dict):
            continue
        kind, path = raw.get("kind"), ("rules", index, "kind")
        if kind == "preference" and number != 3:
            yield problem(path, "preferences belong to tier three; state a restriction or a requirement here")
        if kind in ("restriction", "requirement") and number == 3:
            yield problem(path, f"tier three holds preferences only; a {kind} belongs to tier one or two")
        if number == 1 and raw.get("action") in ("redirect", "answer_with_notice"):
            sentence = f"tier one refuses what it restricts; {raw['action']} is an action of tier two"
            yield problem(("rules", index, "action"), sentence)


def _repeated(document: YamlDocument, rules: Sequence[object]) -> Iterator[Problem]:
    """Rules that share an id or look-alike ids, restrictions that share a category, and disguised ids."""
    seen: dict[tuple[str, object], int] = {}
    for index, raw in enumerate(rules):
        if not isinstance(raw, dict):
            continue
        for key in ("id", "category"):
            value = raw.get(key)
            if not isinstance(value, str) or (key == "category" and raw.get("kind") != "restriction"):
                continue
            place = document.place(("rules", index, key))
            trick = disguise(value) if key == "id" else None
            if trick is not None:
                yield Problem(
                    place.file, place.line, dotted(("rules", index, key)), f"`{value}` {trick}; write it plainly"
                )
            first = seen.setdefault((key, skeleton(value)), index)
            if first != index:
                line = document.place(("rules", first, key)).line
                other = rules[first][key]  # type: ignore[index]
                like = "is" if other == value else f"looks like `{other}`, which is"
                sentence = f"`{value}` {like} in a rule on line {line} already; each {key} has one rule"
                yield Problem(place.file, place.line, dotted(("rules", index, key)), sentence)


Schema = dict[str, Any]


def schemas() -> dict[int, Schema]:
    """The JSON Schemas of all tiers, by number."""
    return {1: document_schema("one"), 2: document_schema("two"), 3: document_schema("three")}


def document_schema(tier: Tier) -> Schema:
    """The schema of the documents of one tier."""
    header = DocumentHeader.model_json_schema()
    kinds: list[type[RuleSection]] = [PreferenceRule] if tier == "three" else [RestrictionRule, RequirementRule]
    rules = [_rule_schema(kind, tier) for kind in kinds]
    shared = header.pop("$defs")
    for rule in rules:
        shared |= rule.pop("$defs", {})
    shared["Issuer"]["properties"]["role"] = {"const": ROLE[tier], "description": "Role of the issuer."}
    if tier != "three":
        del shared["Issuer"]["properties"]["user_id"]
    if tier != "three":
        shared["When"]["properties"]["topic"]["anyOf"][0]["enum"] = list(topic_names())
    properties = header["properties"]
    properties["tier"] = {"const": tier, "description": properties["tier"]["description"]}
    properties["rules"]["items"] = {"oneOf": rules} if len(rules) > 1 else rules[0]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **header,
        "title": f"Policy document of tier {tier}",
        "description": f"A policy document of tier {NUMBER[tier]}, issued by `{ROLE[tier]}`; written in YAML.",
        "$defs": shared,
    }
    if tier == "one":
        schema["anyOf"] = [_stated("certify"), _stated("extends")]
    elif tier == "three":
        properties |= {key: {"type": "null", "default": None} for key in _FOR_EVERYBODY}
    return schema


def _rule_schema(kind: type[RuleSection], tier: Tier) -> Schema:
    schema = kind.model_json_schema()
    if kind is RequirementRule:
        schema["oneOf"] = [_stated(name) for name in PROPERTY_NAMES]
    elif kind is PreferenceRule:
        schema["anyOf"] = [_stated(name) for name in ("statement", *WISHES)]
        schema["not"] = {"anyOf": [
            {"allOf": [_stated(one), _stated(other)]} for n, one in enumerate(WISHES) for other in WISHES[:n]
        ]}  # fmt: skip
    elif tier == "one":
        for key in ("text", "when"):
            schema["properties"][key] = {"type": "null", "default": None}
        schema["properties"]["action"] = {"enum": ["refuse", None], "default": None}
    else:
        schema["allOf"] = [
            _exactly_when(_action("redirect", "answer_with_notice"), _stated("text")),
            _exactly_when(_action("answer_with_notice"), _stated("when")),
            {
                "if": _action("answer_with_notice"),
                "then": {"not": {"anyOf": [_stated("limit"), _stated("min_refusal")]}},
            },
        ]
    return schema


def _stated(key: str) -> Schema:
    """The schema of objects that have the key, not null."""
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


def _action(*actions: str) -> Schema:
    return {"required": ["action"], "properties": {"action": {"enum": list(actions)}}}


def _exactly_when(one: Schema, other: Schema) -> Schema:
    return {"if": one, "then": other, "else": {"not": other}}
