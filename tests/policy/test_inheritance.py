"""Documents that extend others of their tier, and rules with dates."""

from datetime import date

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.policy.inheritance import read_all
from persona_rlhf.policy.policy import Policy, check_documents
from tests.policy.banks import tier_one, tier_three, tier_two, write, write_bank

BEFORE, DAY = date(2026, 10, 31), date(2026, 11, 1)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return write(folder / "one.yaml", tier_one(folder))


def law(base, *rules, **changes):
    """A tier-one document of a jurisdiction that adds to a base document."""
    issuer = {"role": "model_provider", "name": "Lab in X"}
    head = {"tier": "one", "issuer": issuer, "version": "1", "jurisdiction": "X", "extends": str(base)}
    return {**head, "rules": list(rules), **changes}


def stricter(**fields):
    return {"id": "x.threats", "kind": "restriction", "category": "threats_of_violence", **fields}


def test_an_extension_adds_and_tightens(one, tmp_path):
    bank = write_bank(tmp_path / "hate.jsonl", "hate")
    hate = {"id": "x.hate", "kind": "restriction", "category": "hate", "probes": str(bank), "limit": 0.1}
    bound = {"min_refusal": 0.98, "delta": 0.05}
    rules = [stricter(limit=0.01), {**hate, "min_refusal": 0.9}]
    extended = write(tmp_path / "x.yaml", law(one, *rules, certify=bound, aspects={"fixed": ["stance"]}))
    policy, base = Policy.read([extended]), Policy.read([one])
    held = {rule.category: rule for rule in policy.restrictions}
    assert held["threats_of_violence"].limit == 0.01
    assert held["threats_of_violence"].narrowed_by == (f"{extended}:9 x.threats",)
    assert held["hate"].tier == 1
    assert policy.certify.min_refusal == 0.98
    assert "stance" in policy.fixed
    assert policy.tier_one_hash != base.tier_one_hash
    assert [info.path for info in policy.documents] == [str(one), str(extended)]
    assert {entry.jurisdiction for entry in policy.written} == {None, "X"}


def test_naming_the_base_too_changes_nothing(one, tmp_path):
    extended = write(tmp_path / "x.yaml", law(one, stricter(limit=0.01)))
    assert (
        Policy.read([extended, one]).hash == Policy.read([one, extended, extended]).hash == Policy.read([extended]).hash
    )


def test_what_a_base_says_counts_in_the_hash_of_tier_one(one, tmp_path):
    text = one.read_text()
    (tmp_path / "base.yaml").write_text(text)
    extended = write(tmp_path / "x.yaml", law("base.yaml", stricter(limit=0.01)))
    first = Policy.read([extended]).tier_one_hash
    (tmp_path / "base.yaml").write_text(text.replace("name: Lab", "name: Lob"))
    assert Policy.read([extended]).tier_one_hash != first


@pytest.mark.parametrize(
    ("rules", "changes", "key"),
    [
        ([stricter(limit=0.06)], {}, "rules[0].limit"),
        ([stricter(min_refusal=0.5)], {}, "rules[0].min_refusal"),
        ([stricter(probes="easy.jsonl")], {}, "rules[0].probes"),
        ([{**stricter(limit=0.01), "id": "t1.threats_of_violence"}], {}, "rules[0].id"),
        ([], {"certify": {"min_refusal": 0.5, "delta": 0.05}}, "certify.min_refusal"),
    ],
)
def test_an_extension_cannot_loosen_its_base(one, tmp_path, rules, changes, key):
    extended = write(tmp_path / "x.yaml", law(one, *rules, **changes))
    with pytest.raises(InputError) as fault:
        Policy.read([extended])
    (problem,) = fault.value.problems
    assert (problem.file, problem.key) == (str(extended), key)
    assert f"{one}:" in problem.sentence


def test_two_extensions_of_one_base_are_two_voices(one, tmp_path):
    files = [write(tmp_path / f"{n}.yaml", law(one, {**stricter(limit=0.01), "id": n})) for n in ("a", "b")]
    with pytest.raises(InputError, match="a policy takes one of each"):
        Policy.read(files)


def test_lower_tiers_extend_too(one, tmp_path):
    company = write(tmp_path / "company.yaml", tier_two({"id": "c.words", "kind": "requirement", "max_words": 80}))
    team = tier_two({"id": "team.words", "kind": "requirement", "max_words": 40}, extends="company.yaml")
    policy = Policy.read([one, write(tmp_path / "team.yaml", team)])
    assert [rule.value for rule in policy.requirements] == [80, 40]
    looser = tier_two({"id": "team.words", "kind": "requirement", "max_words": 90}, extends="company.yaml")
    with pytest.raises(InputError, match=rf"90 is looser than `max_words: 80` \({company}:9\)"):
        Policy.read([one, write(tmp_path / "team.yaml", looser)])


def test_a_rule_out_of_its_dates_is_listed_and_not_in_force(one, tmp_path):
    two = write(tmp_path / "two.yaml", tier_two({**stricter(limit=0.01), "valid_from": "2026-11-01"}))
    before, since = (Policy.read([one, two], day) for day in (BEFORE, DAY))
    assert [r.limit for r in before.restrictions] == [0.05] * 4
    assert 0.01 in [r.limit for r in since.restrictions]
    assert [entry.rule.id for entry in before.written if not entry.in_force] == ["x.threats"]
    assert [rule["id"] for rule in before.to_json()["not_in_force"]] == ["x.threats"]
    assert before.hash == Policy.read([one], BEFORE).hash
    assert before.hash != since.hash
    (sentence, _) = check_documents([one, two], BEFORE)
    assert f"{two}:7: rule `x.threats` (from 2026-11-01) is not in force on 2026-10-31." in sentence


def test_a_rule_of_tier_one_does_not_vanish_silently(one, tmp_path):
    extended = write(tmp_path / "x.yaml", law(one, {**stricter(limit=0.01), "valid_until": "2026-10-31"}))
    (sentence, _) = check_documents([extended], DAY)
    assert "x.threats" in sentence
    assert "Tier one does not enforce it today" in sentence
    before, since = (Policy.read([extended], day) for day in (BEFORE, DAY))
    assert before.tier_one_hash != since.tier_one_hash  # and the run, its cards and manifests show it


def test_nothing_of_tier_one_in_force_is_an_error(one, tmp_path):
    document = tier_one(tmp_path)
    for rule in document["rules"]:
        rule["valid_until"] = "2026-10-31"
    file = write(tmp_path / "old.yaml", document)
    assert len(Policy.read([file], BEFORE).restrictions) == 4
    with pytest.raises(InputError, match="no restriction of tier one is in force on 2026-11-01"):
        Policy.read([file], DAY)


def test_a_rule_cannot_be_loosened_before_it_is_in_force(one, tmp_path):
    document = tier_one(tmp_path)
    document["rules"][0]["valid_from"] = "2030-01-01"
    future = write(tmp_path / "future.yaml", document)
    two = write(tmp_path / "two.yaml", tier_two({**stricter(limit=9.0), "category": "terrorist_content"}))
    with pytest.raises(InputError, match="is looser than"):
        Policy.read([future, two], DAY)


def test_every_document_that_is_read_is_returned_after_its_bases(one, tmp_path):
    three = write(tmp_path / "three.yaml", tier_three())
    a = write(tmp_path / "a.yaml", law(one, stricter(limit=0.04)))
    b = write(tmp_path / "b.yaml", law("a.yaml", {**stricter(limit=0.03), "id": "b"}))
    documents, problems = read_all([three, b])
    assert problems == []
    assert [document.path for document in documents] == [str(one), str(a), str(b), str(three)]
    assert documents[2].bases == (str(a), str(one))
