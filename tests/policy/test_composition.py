"""Text before certify probes: as the serving side writes it, drawn by seed and probe, and only ever added to."""

from __future__ import annotations

from collections import Counter

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import Message
from persona_rlhf.policy.composition import MOST_MEMORIES, Composition, composed_sentence, text_sha256
from persona_rlhf.policy.enforcement import system_prompt
from persona_rlhf.policy.explain import differences
from persona_rlhf.policy.inheritance import read_all
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.manifest import uncertified_prompt
from persona_rlhf.serving.policy_filter import PolicyFilter
from tests.policy.banks import tier_one, tier_three, tier_two, write

BOTH = ["system", "memories"]


@pytest.fixture
def documents(tmp_path):
    """Three documents; `certify.with` of tiers one and two, None for none."""

    def make(one=None, two=None):
        bound = {"min_refusal": 0.9, "delta": 0.05}
        tiers = {
            "one.yaml": tier_one(tmp_path, certify=bound | ({} if one is None else {"with": one})),
            "two.yaml": tier_two({"id": "t2.x", "kind": "requirement", "max_words": 40}),
            "three.yaml": tier_three(
                {"id": "t3.x", "kind": "preference", "aspect": "tone", "tone": "warm"}, user_id="ann"
            ),
        }
        if two is not None:
            tiers["two.yaml"]["certify"] = bound | {"with": two}
        return [write(tmp_path / name, content) for name, content in tiers.items()]

    return make


def read(documents, *tiers, seed=0):
    return Composition(Policy.read(documents(*tiers)), seed)


def test_without_the_key_nothing_changes(documents):
    plain, asked = read(documents), read(documents, BOTH)
    probe = plain.policy.probes("certify")[0]
    assert (plain.parts, plain.message(plain.system_prompt("ann"), probe), plain.record("ann")) == ([], "", {})
    assert plain.policy.certify.hashed() == {"min_refusal": 0.9, "delta": 0.05}
    assert plain.policy.hash != asked.policy.hash
    assert plain.policy.tier_one_hash != asked.policy.tier_one_hash


def test_the_message_is_that_of_a_server_whose_client_adds_the_memories(documents):
    both, alone = read(documents, BOTH), read(documents, ["memories"])
    serving = PolicyFilter.of(both.policy)
    user = "ann"
    system = both.system_prompt(user)
    assert system == system_prompt(both.policy, user) != both.system_prompt("")
    for probe in both.policy.probes("certify")[:50]:
        memories = alone.message(alone.system_prompt(user), probe)
        asked = (Message("user", probe.prompt),)
        sent = (Message("system", memories), *asked) if memories else asked
        assert serving.with_system_prompt(user, sent) == (Message("system", both.message(system, probe)), *asked)
    assert read(documents, ["system"]).message(system, probe) == system


def test_memories_are_drawn_by_seed_and_probe_in_each_number_equally_often(documents):
    one, other = read(documents, ["memories"]), read(documents, ["memories"], seed=1)
    probes = one.policy.probes("certify")
    drawn = [one.message("", probe).splitlines()[1:] for probe in probes]
    assert drawn == [one.message("", probe).splitlines()[1:] for probe in probes]
    assert drawn != [other.message("", probe).splitlines()[1:] for probe in probes]
    assert all(len(set(lines)) == len(lines) for lines in drawn)
    sizes = Counter(map(len, drawn))
    assert set(sizes) <= set(range(MOST_MEMORIES + 1))
    assert max(sizes.values()) < len(probes) / 4
    assert {len(lines) for lines in drawn} >= {0, MOST_MEMORIES}


def test_lower_tiers_add_and_take_nothing_away(documents):
    assert read(documents, ["system"], BOTH).parts == BOTH
    assert read(documents, None, ["memories"]).parts == ["memories"]
    assert read(documents, BOTH, None).parts == BOTH
    with pytest.raises(InputError, match=r"certify\.with.*system is looser than system, memories"):
        read(documents, BOTH, ["system"])


@pytest.mark.parametrize(("value", "sentence"), [([], "at least one"), (["prompt"], "expected"), (BOTH * 2, "once")])
def test_wrong_values_are_named(documents, value, sentence):
    with pytest.raises(InputError, match=sentence):
        read(documents, value)


def test_a_change_of_the_key_is_told(documents):
    before, after = (read_all(documents(parts))[0] for parts in (["system"], BOTH))
    assert [change.about for change in differences(before, after)] == ["certify.with"]


def test_the_manifest_names_it_and_tells_another_prompt(documents):
    composition = read(documents, BOTH, seed=3)
    record = composition.record("")
    text = composition.system_prompt("")
    assert record["system_prompt_sha256"] == text_sha256(text)
    assert (record["memories"]["most"], record["memories"]["seed"]) == (10, 3)
    sentence = composed_sentence(record)
    assert sentence.startswith(
        f"certified with the system prompt (sha256 {text_sha256(text)[:16]}) and 0 to 10 memories"
    )
    manifest = {"certified_with": record}
    assert uncertified_prompt(manifest, text) is None
    assert "behind another system prompt, but here the policy's" in uncertified_prompt(manifest, text + ".")
    assert "behind another system prompt, but here none" in uncertified_prompt(manifest, "")
    assert "without a system prompt" in uncertified_prompt({}, text)
    assert uncertified_prompt({}, "") is None
