"""No rule without a row, no row without a test; and how many probes a bound needs."""

import json

import pytest

from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.screening import screen
from persona_rlhf.policy.enforcement import TABLE, Redirects, post_check, row, row_of, system_prompt
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import READABLE, REPAIRED, REQUIREMENTS, WISHED
from persona_rlhf.policy.rule_schema import (
    ACTIONS,
    PROPERTY_NAMES,
    WISHES,
    PreferenceRule,
    RequirementRule,
    RestrictionRule,
)
from tests.policy.banks import tier_one, tier_three, tier_two, write, write_bank

BREAKS: dict[str, tuple[object, str, str]] = {  # value, an answer with it, one without
    "must_include": ("ask a doctor", "Ask a doctor.", "Drink tea."),
    "must_not_include": ("!", "Tea.", "Tea!"),
    "min_words": (2, "Green tea.", "Tea."),
    "max_words": (2, "Green tea.", "A green tea."),
    "language": ("en", "The tea is for you and it is hot.", "Le thé est pour vous et il est chaud."),
    "reading_level": (4, "The cat sat on it.", "Interdisciplinary considerations predominate."),
    "regex": ("^T", "Tea.", "A tea."),
    "format": ("plain", "Tea.", "# Tea"),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return write(folder / "one.yaml", tier_one(folder))


def test_no_rule_without_a_row():
    stated = {("restriction", a) for a in ACTIONS} | {("requirement", p) for p in PROPERTY_NAMES}
    assert set(TABLE) == stated | {("preference", wish) for wish in ("statement", *WISHES)}
    assert set(PROPERTY_NAMES) == set(REQUIREMENTS) == {*BREAKS, "judge"}
    assert set(WISHES) == set(WISHED)


def test_every_written_rule_finds_its_row():
    refused = RestrictionRule(id="r", kind="restriction", category="hate")
    assert row_of(refused) is row("restriction", "refuse")
    assert row_of(RequirementRule(id="r", kind="requirement", max_words=4)) is row("requirement", "max_words")
    assert row_of(PreferenceRule(id="r", kind="preference", aspect="a", statement="b")) is row(
        "preference", "statement"
    )
    assert row_of(PreferenceRule(id="r", kind="preference", aspect="a", tone="b")) is row("preference", "tone")
    with pytest.raises(KeyError):
        row("requirement", "politeness")


def pair(prompt, chosen, rejected):
    asked = (Message("user", prompt),)
    return PreferencePair("ann", asked, chosen, rejected, "1", None, None, 1.0, "train", None, "pairs.jsonl", 1)


@pytest.mark.parametrize("action", ["refuse", "redirect"])
def test_a_restriction_is_screened_trained_and_gated(one, tmp_path, action):
    bank = write_bank(tmp_path / "hate.jsonl", "hate")
    rule = {"id": "r", "kind": "restriction", "category": "hate", "probes": str(bank), "limit": 0.1, "min_refusal": 0.9}
    soft = {"action": "redirect", "text": "Go there."} if action == "redirect" else {}
    policy = Policy.read([one, write(tmp_path / "two.yaml", tier_two({**rule, **soft}))])
    prompt = next(probe.prompt for probe in policy.probes("train") if probe.category == "hate")
    held = row("restriction", action)
    screened = screen([pair(prompt, "Sure.", "No.")], policy, ScreeningSettings())
    assert "quarantined" in held.screening
    assert [found.action for found in screened.dropped] == ["quarantined"]
    # training and the gate read these, category by category
    assert "limit" in held.training
    assert "min_refusal" in held.gate
    assert (policy.restrictions[-1].limit, policy.restrictions[-1].min_refusal) == (0.1, 0.9)
    assert [probe.category for probe in policy.probes("certify", tier=2)] == ["hate"] * 60
    assert (Redirects(policy).answer(prompt) == "Go there.") is (action == "redirect") is ("in place" in held.serving)


def test_a_notice_is_held_as_a_requirement_and_refuses_nothing(one, tmp_path):
    rule = {"id": "n", "kind": "restriction", "category": "specialized_advice", "action": "answer_with_notice"}
    document = tier_two({**rule, "text": "Ask a doctor.", "when": {"topic": "medical"}})
    policy = Policy.read([one, write(tmp_path / "two.yaml", document)])
    assert row("restriction", "answer_with_notice") == row("requirement", "must_include")
    assert policy.probes("train", tier=2) == []
    assert [rule.id for rule in post_check(policy, "I have a fever", "Tea.")] == ["n"]
    assert "Ask a doctor." in system_prompt(policy, "ann")


@pytest.mark.parametrize("name", BREAKS)
def test_a_requirement_stands_in_the_system_prompt_and_answers_are_checked(one, tmp_path, name):
    value, kept, broken = BREAKS[name]
    two = write(tmp_path / "two.yaml", tier_two({"id": "q", "kind": "requirement", name: value}))
    policy = Policy.read([one, two])
    held = row("requirement", name)
    assert "system prompt" in held.serving
    assert "checked" in held.serving
    assert system_prompt(policy, "ann")
    assert post_check(policy, "what now", kept) == []
    assert [rule.id for rule in post_check(policy, "what now", broken)] == ["q"]
    assert policy.categories == Policy.read([one]).categories  # the gate certifies refusals and nothing else
    assert held.training.startswith("taught") is (name in REPAIRED)
    assert ("is interpolated toward" in held.gate) is (name in REPAIRED)
    assert ("holds no adapter back" in held.gate) is (name not in REPAIRED)
    screened = screen([pair("what now", broken, kept)], policy, ScreeningSettings())
    assert [found.kind for found in screened.dropped] == ["requirement"]


def test_what_only_a_judge_can_tell_is_said_to_be_unchecked(one, tmp_path):
    policy = Policy.read(
        [one, write(tmp_path / "t.yaml", tier_two({"id": "q", "kind": "requirement", "judge": "Kind."}))]
    )
    held = row("requirement", "judge")
    assert (held.screening, held.training, held.gate, held.card) == ("", "", "", "")
    assert "not checked" in held.serving
    assert post_check(policy, "p", "a") == []
    assert "Kind." in system_prompt(policy, "ann")


@pytest.mark.parametrize("name", ["statement", *WISHES])
def test_a_wish_reaches_the_system_prompt_and_nothing_above_it(one, tmp_path, name):
    value = {"avoid": ["political"], "min_words": 3, "max_words": 9, "language": "en", "formality": "formal"}.get(
        name, "warm"
    )
    rule = {"id": "p", "kind": "preference", "aspect": "style", name: value}
    policy = Policy.read([one, write(tmp_path / "three.yaml", tier_three(rule, user_id="ann"))])
    alone, held = Policy.read([one]), row("preference", name)
    assert ("data draft" in held.training) is (name in READABLE)
    assert (held.screening, held.gate) == ("", "")
    assert held.training.startswith("not enforced")
    assert system_prompt(policy, "ann") != system_prompt(policy, "bob") == ""
    assert (policy.restrictions, policy.requirements, policy.certify) == (alone.restrictions, (), alone.certify)
    assert post_check(policy, "p", "a") == []
    assert json.dumps(policy.to_json())
