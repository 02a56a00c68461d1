"""What a text meets, stage by stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persona_rlhf.common.files import shipped_root
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.policy.explain import explain, listing
from persona_rlhf.policy.policy import Policy
from tests.policy.banks import tier_one, tier_three, tier_two, write


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    rules = [
        {"id": "t2.words", "kind": "requirement", "max_words": 4},
        {"id": "t2.doctor", "kind": "requirement", "must_include": "doctor", "when": {"topic": "medical"}},
        {"id": "t2.kind", "kind": "requirement", "judge": "It is kind."},
    ]
    tastes = [
        {"id": "t3.long", "kind": "preference", "aspect": "length", "min_words": 9},
        {"id": "t3.calm", "kind": "preference", "aspect": "topics", "avoid": ["political"]},
    ]
    one = write(folder / "one.yaml", tier_one(folder))
    two = write(folder / "two.yaml", tier_two(*rules))
    return Policy.read([one, two, write(folder / "three.yaml", tier_three(*tastes, user_id="ann"))])


def met(policy, prompt, user="ann", answer=None):
    return {(found.stage, found.rule): found for found in explain(policy, user, prompt, answer)}


@pytest.mark.parametrize(("split", "stages"), [("train", {"screening", "training", "serving"}),
                                               ("certify", {"screening", "gate", "serving"})])  # fmt: skip
def test_a_probe_is_met_where_it_is_used(policy, split, stages):
    probe = policy.probes(split)[0]
    found = {stage for stage, rule in met(policy, f"{probe.prompt.upper()}!") if rule.startswith("t1.")}
    assert found == stages


def test_requirements_are_met_at_serving_with_a_verdict(policy):
    assert ("serving", "t2.doctor") not in met(policy, "how do i bake")
    found = met(policy, "what helps a fever", answer="Ask a doctor first please.")
    assert found["serving", "t2.doctor"].follows.endswith("the answer meets it")
    assert found["serving", "t2.words"].follows.endswith("the answer breaks it")
    assert "only a judge" in found["serving", "t2.kind"].follows


def test_wishes_are_the_users_own_and_say_when_they_give_way(policy):
    found = met(policy, "whom do i vote for")
    assert "App requires `max_words: 4`" in found["serving", "t3.long"].follows
    assert "avoids political" in found["serving", "t3.calm"].why
    assert ("serving", "t3.calm") not in met(policy, "how do i bake")
    assert not [rule for _, rule in met(policy, "whom do i vote for", user="bob") if rule.startswith("t3.")]


def test_requests_in_untrained_wordings_are_told_from_their_twins(capsys):
    """Probes of the `dev` split against their harmless twins, with the `train` probes as all that is known."""
    policy = Policy.read([shipped_root() / "configs/policy/tier_one.yaml"])
    known = {rule.id: tuple(p for p in rule.probes if p.split == "train") for rule in policy.restrictions}
    trained = replace(policy, restrictions=tuple(replace(r, probes=known[r.id]) for r in policy.restrictions))
    asked = [probe for probe in policy.probes("dev") if probe.twin][::40]
    hit = sum(bool([m for m in explain(trained, None, probe.prompt) if m.stage == "screening"]) for probe in asked)
    false = sum(bool(explain(trained, None, str(probe.twin))) for probe in asked)
    low, high = interval(hit, len(asked))
    with capsys.disabled():
        print(f"explain: recall {hit}/{len(asked)} ({low:.2f} to {high:.2f}), precision {hit}/{hit + false}")
    assert (
        hit >= 2
    )  # texts alone tell few new wordings (26 of 90, of every eighth probe): the base's refusal tells more
    assert false == 0


@pytest.mark.parametrize(("parts", "behind"), [(None, ""), (["system", "memories"], ", behind system and memories")])
def test_the_listing_says_behind_what_the_bound_holds(tmp_path, parts, behind):
    document = tier_one(tmp_path)
    document["certify"] |= {} if parts is None else {"with": parts}
    title = listing(Policy.read([write(tmp_path / "one.yaml", document)])).title
    assert str(title).startswith("Refusal of tier-one probes, pooled: at least ")
    assert str(title).endswith(behind or "0.95")
