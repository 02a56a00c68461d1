"""Policy Cards: a document becomes a card and comes back, and nothing of either is dropped."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.loader import YamlDocument, read_yaml
from persona_rlhf.policy.card_export import export_card, rules_of, unplaced_keys
from persona_rlhf.policy.card_import import import_card
from persona_rlhf.policy.documents import check_document

DETAILS = {
    "meta": {"name": "Desk", "version": "1.2.0", "created_at": "2026-12-01T10:00:00Z", "valid_from": "2026-12-01"},
    "scope": {"application": "A desk", "stakeholders": ["reader"], "jurisdictions": ["EU"]},
    "applicable_policies": [{"name": "House rules", "jurisdiction": "EU", "uri": "https://desk.example/rules"}],
    "obligations": [{"id": "OB-1", "description": "max_words: say so", "responsible_role": "desk", "when": "Do"}],
    "monitoring": {
        "logging": {"events": ["answer"], "fields": ["time"], "retention_days": 30},
        "review": {"owner": "board", "cadence_days": 14, "method": "audit"},
    },
    "kpis_thresholds": {"kpis": [{"id": "K", "metric": "complaints", "target": 0.01, "window": "30d"}]},
    "change_management": {"approvals": ["board"], "backout_plan": "the card before"},
    "assurance_mapping": {"nist": ["MAP-1"], "iso_42001": ["ISO42001-4"], "eu_ai_act": ["EUAA-Art72"]},
    "references": {"documentation": ["https://desk.example/runbook"], "notes": "first card"},
}


def document(tree):
    made, problems = check_document("d.yaml", Path("d.yaml"), YamlDocument("d.yaml", tree, {}, []))
    assert not problems, problems
    return made


def yaml_of(tree):
    return YamlDocument("card.json", json.loads(json.dumps(tree)), {}, [])


def meaning(made):
    """All that a document says; restrictions and requirements in order, apart."""
    return made.tier, made.issuer, made.version, made.jurisdiction, made.certify, made.aspects, rules_of(made)


_text = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12) | st.sampled_from(
    ['a && b == "c"', "text of x", "ein \u201eZitat\u201c", "min_rate of q", "Keys of the policy document: {}"]
)
_share = st.floats(0.001, 0.999)
_optional = {
    "version": _text, "rationale": _text, "contact": _text,
    "references": st.fixed_dictionaries({"nist": st.lists(_text, max_size=2)}, optional={"iso_42001": st.just(["8"])}),
    "valid_from": st.just("2026-01-01"), "valid_until": st.just("2027-12-31"),
}  # fmt: skip
_when = st.sampled_from([{"topic": "medical"}, {"pattern": 'a"b && c'}])


def _refusing(redirects):
    action = {"action": st.just("redirect"), "text": _text} if redirects else {}
    optional = {"limit": st.floats(0, 9), "min_refusal": _share, "probes": st.just("bank.jsonl"), **_optional}
    if not redirects:
        optional["action"] = st.just("refuse")
    return st.fixed_dictionaries({"kind": st.just("restriction"), **action}, optional=optional)


_notice = st.fixed_dictionaries(
    {"kind": st.just("restriction"), "action": st.just("answer_with_notice"), "text": _text, "when": _when},
    optional=_optional,
)
_requirement = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("requirement"), name: value},
        optional={"when": _when, "min_rate": _share, "probes": st.just("bank.jsonl"), **_optional},
    )
    for name, value in {"max_words": st.integers(1, 99), "must_include": _text, "language": st.just("en")}.items()
)


@st.composite
def documents(draw):
    tier = draw(st.sampled_from(["one", "two"]))
    kinds = [_refusing(False), _requirement] + ([_refusing(True), _notice] if tier == "two" else [])
    rules = draw(st.lists(st.one_of(kinds), max_size=5))
    for n, rule in enumerate(rules):
        rule |= {"id": f"r{n}{draw(st.sampled_from(['', '.a b', '/%:']))}"}
        rule |= {"category": f"hazard_{n}"} if rule["kind"] == "restriction" else {}
    role = {"one": "model_provider", "two": "application_provider"}[tier]
    issuer = {"role": role, "name": draw(_text)} | draw(st.fixed_dictionaries({}, optional={"contact": _text}))
    tree = {"tier": tier, "issuer": issuer, "version": draw(_text), "rules": rules}
    tree |= draw(st.fixed_dictionaries({}, optional={"jurisdiction": _text}))
    if tier == "one" or draw(st.booleans()):
        optional = {"max_over_refusal": _share, "with": st.sampled_from([["system"], ["memories", "system"]])}
        tree["certify"] = draw(st.fixed_dictionaries({"min_refusal": _share, "delta": _share}, optional=optional))
    if draw(st.booleans()):
        fixed = st.fixed_dictionaries({"fixed": st.just(["facts", "a && b"])}, optional={"max_changed": _share})
        tree["aspects"] = draw(fixed | st.just({"personalisable": ["tone", "length"]}))
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents())
def test_a_document_and_the_details_come_back_from_their_card(tree):
    made = document(tree)
    details = copy.deepcopy(DETAILS)
    details["controls"] = {"action_rules": [ESCALATION]}
    details["kpis_thresholds"]["critical_auto_fail"] = ["no log"]
    card = export_card(made, yaml_of(details))
    back = import_card(yaml_of(card))
    assert meaning(document(back.document)) == meaning(made)
    assert export_card(document(back.document), yaml_of(back.details)) == card
    assert back.details == details


ESCALATION = {
    "id": "AR-PAY",
    "subject": "agent",
    "action": "pay",
    "resource": "bill",
    "condition": "sum > 9",
    "effect": "require_escalation",
}
SHIPPED = shipped_root() / "configs/policy"


@pytest.mark.parametrize("name", ["tier_one.yaml", "tier_two.yaml", "packs/strict/tier_two.yaml"])
def test_shipped_documents_come_back(name, tmp_path):
    details = copy.deepcopy(DETAILS)
    details["kpis_thresholds"]["critical_auto_fail"] = ["no log"]
    details["controls"] = {"action_rules": [ESCALATION]}
    made = document(read_yaml(SHIPPED / name).tree)
    card = export_card(made, yaml_of(details))
    assert meaning(document(import_card(yaml_of(card)).document)) == meaning(made)


def tier_one():
    rule = {"id": "t1.hate", "kind": "restriction", "category": "hate", "limit": 0.1, "min_refusal": 0.93}
    return {
        "tier": "one",
        "issuer": {"role": "model_provider", "name": "Lab"},
        "version": "1",
        "certify": {"min_refusal": 0.97, "delta": 0.05},
        "rules": [rule, {"id": "q", "kind": "requirement", "max_words": 40, "rationale": "screens"}],
    }


def test_each_entry_says_what_the_document_says():
    card = export_card(document(tier_one()), yaml_of(DETAILS))
    [rule] = card["controls"]["action_rules"]
    assert rule["effect"] == "deny"
    assert rule["condition"] == 'rule == "t1.hate" && request.category == "hate"'
    fields = card["monitoring"]["logging"]["fields"]
    assert set(rule["evidence_required"]) <= set(fields), "the format's lint asks for it"
    thresholds = {one["name"]: (one["operator"], one["threshold"]) for one in card["monitoring"]["detectors"]}
    assert thresholds["min_refusal of t1.hate"] == ("<", 0.93)
    assert thresholds["limit of t1.hate"] == (">", 0.1)
    assert thresholds["certify.delta"] == (">", 0.05)
    assert "certify.min_refusal < 0.97" in card["kpis_thresholds"]["critical_auto_fail"]
    assert card["obligations"][-1]["description"] == "max_words: 40"
    assert unplaced_keys(document(tier_one())) == {"rules": {"q": {"rationale": "screens"}}}
    assert '"rationale": "screens"' in card["references"]["notes"]


def test_frameworks_of_rules_are_the_assurance_mapping():
    tree = tier_one()
    tree["rules"][0]["references"] = {
        "nist": ["MANAGE-1"],
        "eu_ai_act": ["EUAA-AnnexIV-3"],
        "iso_42001": ["ISO42001-8"],
    }
    details = copy.deepcopy(DETAILS)
    del details["assurance_mapping"]
    mapping = export_card(document(tree), yaml_of(details))["assurance_mapping"]
    assert mapping == {"nist": ["MANAGE-1"], "iso_42001": ["ISO42001-8"], "eu_ai_act": ["EUAA-AnnexIV-3"]}
    with pytest.raises(InputError, match="expected at least one"):
        export_card(document(tier_one()), yaml_of(details))


def test_a_changed_threshold_and_condition_change_the_document():
    card = export_card(document(tier_one()), yaml_of(DETAILS))
    card["controls"]["action_rules"][0]["condition"] += ' && day >= "2027-01-01"'
    for detector in card["monitoring"]["detectors"]:
        if detector["name"] == "limit of t1.hate":
            detector["threshold"] = 0.05
    [rule, _] = import_card(yaml_of(card)).document["rules"]
    assert (rule["limit"], rule["valid_from"]) == (0.05, "2027-01-01")


EXCEPTION = {"id": "EX-1", "reason": "x", "approved_by": "y", "time_bound": "3d"}


def _first_rule(**changes):
    return lambda card: card["controls"]["action_rules"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_first_rule(effect="require_escalation"), "no rule of a policy document says this"),
        (_first_rule(effect="allow"), "needs a notice"),
        (_first_rule(condition="risk > 3"), "expected terms such as"),
        (_first_rule(condition='rule == "t1.hate" && request.category == "hate" && risk == "9"'), "on `risk ==`"),
        (_first_rule(resource="invoice"), "missing or otherwise"),
        (_first_rule(exceptions=[EXCEPTION]), "missing or otherwise"),
        (lambda card: card["obligations"][-1].update(description="be brief"), "expected a property"),
        (lambda card: card["obligations"][-1].update(legal_basis="Act 7"), "missing or otherwise"),
        (lambda card: card["monitoring"]["detectors"][0].update(threshold=0.5), "critical_auto_fail"),
        (lambda card: card["monitoring"]["detectors"][0].update(description="changed"), "missing or otherwise"),
        (lambda card: card["monitoring"]["detectors"][-1].update(uri="urn:persona-rlhf:limit:gone"), "names no rule"),
        (lambda card: card["references"].update(notes=card["references"]["notes"][:-1]), "cannot be read"),
        (lambda card: card.update(applicable_policies=[]), "no probes test its actions"),
        (lambda card: card["meta"].update(version="one"), "does not match the pattern"),
        (lambda card: card.update(extra=1), "unknown key"),
    ],
)  # fmt: skip
def test_an_entry_that_no_document_expresses_is_an_error(change, sentence):
    card = export_card(document(tier_one()), yaml_of(DETAILS))
    change(card)
    with pytest.raises(InputError) as error:
        import_card(yaml_of(card))
    assert any(sentence in str(problem) for problem in error.value.problems), error.value.problems


def test_missing_details_are_all_named_at_once_and_an_extending_document_is_refused():
    tree = tier_one() | {"extends": "other.yaml"}
    with pytest.raises(InputError) as error:
        export_card(document(tree), yaml_of({"meta": {"owner": "Somebody"}}))
    text = "\n".join(map(str, error.value.problems))
    for key in ("meta.name", "meta.created_at", "meta.owner", "scope", "retention_days", "review", "backout_plan",
                "documentation", "extends"):  # fmt: skip
        assert key in text, key
    three = {"tier": "three", "issuer": {"role": "end_user", "name": "U", "user_id": "u"}, "version": "1", "rules": []}
    with pytest.raises(InputError, match="tier three states none"):
        export_card(document(three), yaml_of(DETAILS))


def test_the_commands_write_new_files_and_say_what_has_no_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "details.yaml").write_text(json.dumps(DETAILS))
    (tmp_path / "one.yaml").write_text(json.dumps(tier_one()))
    run = CliRunner().invoke
    done = run(app, ["policy", "export", "policy-card", "one.yaml", "card.json", "--details", "details.yaml"])
    assert done.exit_code == 0, done.output
    assert "q: rationale" in done.output
    done = run(app, ["policy", "import", "policy-card", "card.json", "back.yaml"])
    assert done.exit_code == 0, done.output
    assert "Left out, as no policy document has it: meta, scope" in done.output
    assert meaning(document(read_yaml(tmp_path / "back.yaml").tree)) == meaning(document(tier_one()))
    assert run(app, ["policy", "import", "policy-card", "card.json", "back.yaml"]).exit_code == 2
    assert run(app, ["policy", "check", "back.yaml"]).exit_code == 2, "no bank of this category"
    for rest, out in (("details.yaml", "new.yaml"), ("gone/rest.yaml", "new.yaml"), ("new.yaml", "./new.yaml")):
        done = run(app, ["policy", "import", "policy-card", "card.json", out, "--details", rest])
        assert done.exit_code == 2, done.output
        assert not (tmp_path / "new.yaml").exists(), "both files are written, or none"
