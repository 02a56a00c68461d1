"""The published JSON Schema says what the reader says, as far as a schema can."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.loader import YamlDocument, read_yaml
from persona_rlhf.policy.documents import NUMBER, check_document, document_schema

SHIPPED = sorted((shipped_root() / "configs" / "policy").rglob("*.yaml"))
SCHEMAS = {tier: document_schema(tier) for tier in NUMBER}
VALIDATORS = {tier: jsonschema.Draft202012Validator(schema) for tier, schema in SCHEMAS.items()}


@pytest.mark.parametrize("tier", list(NUMBER))
def test_the_shipped_files_are_current_and_schemas(tier):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[tier])
    file = shipped_root() / "data" / "policy" / "schema" / f"tier_{tier}.json"
    assert json.loads(file.read_text()) == SCHEMAS[tier], f"persona-rlhf policy schema --tier {NUMBER[tier]} > {file}"


def reads(tree):
    _, problems = check_document("d.yaml", Path("d.yaml"), YamlDocument("d.yaml", tree, {}, []))
    return not problems


def fits(tree):
    return VALIDATORS[tree["tier"]].is_valid(tree)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(shipped_root())))
def test_every_shipped_document_fits_its_schema(file):
    tree = read_yaml(file).tree
    assert reads(tree)
    assert fits(tree), next(VALIDATORS[tree["tier"]].iter_errors(tree)).message


HEADS = {
    "one": {"issuer": {"role": "model_provider", "name": "L"}, "certify": {"min_refusal": 0.9, "delta": 0.1}},
    "two": {"issuer": {"role": "application_provider", "name": "A"}},
    "three": {"issuer": {"role": "end_user", "name": "U", "user_id": "u"}},
}
RESTRICTION = {"id": "r", "kind": "restriction", "category": "hate", "limit": 0.1, "min_refusal": 0.9}
REQUIREMENT = {"id": "q", "kind": "requirement", "max_words": 9}
NOTICE = {
    "id": "n",
    "kind": "restriction",
    "category": "hate",
    "action": "answer_with_notice",
    "text": "x",
    "when": {"topic": "medical"},
}
REDIRECT = {**RESTRICTION, "action": "redirect", "text": "x"}
TASTE = {"id": "p", "kind": "preference", "aspect": "tone", "tone": "warm"}
RULES = [RESTRICTION, REQUIREMENT, NOTICE, REDIRECT, TASTE]


def tree(tier, *rules, **changes):
    return copy.deepcopy({"tier": tier, "version": "1", **HEADS[tier], "rules": list(rules), **changes})


@pytest.mark.parametrize("tier", list(NUMBER))
@pytest.mark.parametrize("rule", RULES, ids=["restriction", "requirement", "notice", "redirect", "taste"])
def test_both_know_whose_rules_are_whose(tier, rule):
    document = tree(tier, rule)
    assert fits(document) is reads(document)


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 50),
    st.sampled_from([0.5, 0.95, 1.5, -0.5]),  # 9.0 is an integer to JSON Schema, and none to the reader
    st.sampled_from(["", " ", "x", "medical", "en", "English", "plain", "refuse", "redirect", "2026-11-01", "Hate"]),
    st.just([]),
    st.just(["x"]),
    st.just({}),
    st.just({"topic": "medical"}),
    st.just({"pattern": "x"}),
    st.just({"topic": "medical", "pattern": "x"}),
)
_keys = st.sampled_from(
    sorted({key for schema in SCHEMAS.values() for items in [schema["properties"]["rules"]["items"]]
            for rule in items.get("oneOf", [items]) for key in rule["properties"]} | {"limits"})
)  # fmt: skip
_head_keys = st.sampled_from(sorted({*SCHEMAS["one"]["properties"], "rule"} - {"tier"}))


@pytest.mark.parametrize("tier", list(NUMBER))
@pytest.mark.parametrize("key", ["text", "when", "action", "probes"])
def test_a_key_that_says_nothing_is_as_one_that_is_not_there(tier, key):
    document = tree(tier, {**RULES[0], key: None})
    assert fits(document) is reads(document)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(NUMBER)), st.sampled_from(RULES), st.dictionaries(_keys, _values, max_size=2), st.data())
def test_reader_and_schema_agree_on_random_mistakes(tier, rule, changes, data):
    document = tree(tier, {**rule, **changes})
    if data.draw(st.booleans()):
        rule = document["rules"][0] if document.get("rules") else {"": 0}
        del rule[data.draw(st.sampled_from(sorted(rule)))]
    if data.draw(st.booleans()):
        document[data.draw(_head_keys)] = data.draw(_values)
    assert fits(document) is reads(document)
