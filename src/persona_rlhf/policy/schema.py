"""JSON Schema (2020-12) of policy documents, made of the sections that read them: for editors and other programs.

What a schema cannot say, the reader still refuses: look-alike ids, dates in order, patterns that do not compile, files
that are not there, and whatever is between two documents.
"""

from __future__ import annotations

from typing import Any

from persona_rlhf.policy.documents import NUMBER, ROLE, Head, Tier
from persona_rlhf.policy.statements import (
    PROPERTIES,
    WISHES,
    PreferenceRule,
    RequirementRule,
    RestrictionRule,
    RuleSection,
)
from persona_rlhf.policy.topics import topic_names

Schema = dict[str, Any]


def schemas() -> dict[int, Schema]:
    """The schemas of all tiers, by number."""
    return {1: document_schema("one"), 2: document_schema("two"), 3: document_schema("three")}


def document_schema(tier: Tier) -> Schema:
    """The schema of the documents of one tier."""
    head = Head.model_json_schema()
    kinds: list[type[RuleSection]] = [PreferenceRule] if tier == "three" else [RestrictionRule, RequirementRule]
    rules = [_rule(kind, tier) for kind in kinds]
    shared = head.pop("$defs")
    for rule in rules:
        shared |= rule.pop("$defs", {})
    shared["Issuer"]["properties"]["role"] = {"const": ROLE[tier], "description": "Role of the issuer."}
    if tier != "three":
        del shared["Issuer"]["properties"]["user_id"]
    if tier != "three":
        shared["When"]["properties"]["topic"]["anyOf"][0]["enum"] = list(topic_names())
    properties = head["properties"]
    properties["tier"] = {"const": tier, "description": properties["tier"]["description"]}
    properties["rules"]["items"] = {"oneOf": rules} if len(rules) > 1 else rules[0]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **head,
        "title": f"Policy document of tier {tier}",
        "description": f"A policy document of tier {NUMBER[tier]}, issued by `{ROLE[tier]}`; written in YAML.",
        "$defs": shared,
    }
    if tier == "one":
        schema["anyOf"] = [_stated("certify"), _stated("extends")]
    return schema


def _rule(kind: type[RuleSection], tier: Tier) -> Schema:
    schema = kind.model_json_schema()
    if kind is RequirementRule:
        schema["oneOf"] = [_stated(name) for name in PROPERTIES]
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
    """The key is there, and not null."""
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


def _action(*actions: str) -> Schema:
    return {"required": ["action"], "properties": {"action": {"enum": list(actions)}}}


def _exactly_when(one: Schema, other: Schema) -> Schema:
    return {"if": one, "then": other, "else": {"not": other}}
