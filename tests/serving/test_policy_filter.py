from __future__ import annotations

import json

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.policy.policy import Policy
from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run

ONE = find("configs/policy/tier_one.yaml")
TWO = """
tier: two
issuer: {role: application_provider, name: A Desk}
version: "1"
rules:
  - {id: t2.short, kind: requirement, max_words: 3}
  - {id: t2.kind, kind: requirement, judge: "the answer is kind"}
"""


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "two.yaml").write_text(TWO)
    return [ONE, tmp_path / "two.yaml"]


def test_a_policys_rules_are_words_before_and_a_look_after(documents):
    policy_filter = PolicyFilter.of(Policy.read(documents))
    assert "at most 3 words" in policy_filter.system_prompt("ann")
    assert policy_filter.post_check("hi", "one two three") == []
    assert policy_filter.post_check("hi", "one two three four") == ["t2.short"]
    assert policy_filter.redirect("hi") is None


def test_rules_that_no_program_can_tell_hold_no_answer_back(documents, tmp_path):
    (tmp_path / "two.yaml").write_text("".join(line for line in TWO.splitlines(True) if "max_words" not in line))
    assert PolicyFilter.of(Policy.read(documents)).post_check is None
    bare = PolicyFilter.of(Policy.read([ONE]))
    assert (bare.post_check, bare.system_prompt("ann")) == (None, "")


def test_documents_that_changed_since_the_run_was_judged_are_not_served_by(documents, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        policy_of_run(tmp_path, documents)
    (tmp_path / "policy.json").write_text(json.dumps(Policy.read(documents).to_json()))
    assert policy_of_run(tmp_path, documents).hash == Policy.read(documents).hash
    (tmp_path / "two.yaml").write_text(TWO.replace("max_words: 3", "max_words: 300"))
    with pytest.raises(InputError, match="changed since this run was judged"):
        policy_of_run(tmp_path, documents)
