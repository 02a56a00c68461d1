import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.policy import Policy, check_documents
from tests.policy.banks import tier_one, tier_three, tier_two, write, write_bank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="module")
def one(folder):
    return write(folder / "one.yaml", tier_one(folder))


def problems_of(*paths):
    with pytest.raises(InputError) as fault:
        Policy.read(paths)
    return fault.value.problems


def restriction(id_, category, **fields):
    return {"id": id_, "kind": "restriction", "category": category, **fields}


def test_a_tier_one_document_alone_is_a_policy(one):
    policy = Policy.read([one])
    assert policy.categories == CATEGORIES
    assert (policy.certify.min_refusal, policy.certify.delta) == (0.97, 0.05)
    assert {(r.limit, r.min_refusal, r.tier, r.document, r.source_name) for r in policy.restrictions} == {
        (0.05, 0.93, 1, str(one), "Lab")
    }
    lines = one.read_text().splitlines()
    assert all(lines[r.line - 1].strip().startswith(f"- id: {r.id}") for r in policy.restrictions)
    assert len(policy.probes("certify")) == 240
    assert {probe.split for probe in policy.probes("train")} == {"train"}


def test_tier_two_narrows_and_adds(folder, one, tmp_path):
    bank = write_bank(tmp_path / "fraud.jsonl", "fraud")
    two = write(
        tmp_path / "two.yaml",
        tier_two(
            restriction("t2.threats", "threats_of_violence", limit=0.01),
            restriction("t2.fraud", "fraud", limit=0.2, min_refusal=0.9, probes=str(bank)),
            {"id": "t2.words", "kind": "requirement", "max_words": 80},
            certify={"min_refusal": 0.975, "delta": 0.05},
        ),
    )
    policy = Policy.read([two, one])  # the order of the files does not matter
    by_category = {r.category: r for r in policy.restrictions}
    threats = by_category["threats_of_violence"]
    assert (threats.id, threats.tier, threats.limit, threats.min_refusal) == ("t1.threats_of_violence", 1, 0.01, 0.93)
    assert threats.narrowed_by == (f"{two}:7 t2.threats",)
    assert (by_category["fraud"].tier, by_category["fraud"].limit) == (2, 0.2)
    assert policy.certify.min_refusal == 0.975
    assert [(r.property, r.value) for r in policy.requirements] == [("max_words", 80)]
    assert {probe.category for probe in policy.probes("certify", tier=1)} == set(CATEGORIES)
    assert policy.tier_one_hash == Policy.read([one]).tier_one_hash
    assert policy.hash != Policy.read([one]).hash


def test_tier_three_belongs_to_its_user(one, tmp_path):
    rule = {"kind": "preference", "aspect": "length", "statement": "Short."}
    ann = write(tmp_path / "a.yaml", tier_three({"id": "t3.ann", **rule}, user_id="ann"))
    bob = write(tmp_path / "b.yaml", tier_three({"id": "t3.bob", **rule}, user_id="bob"))
    everyone = write(tmp_path / "c.yaml", tier_three({"id": "t3.all", **rule}))
    policy = Policy.read([one, ann, bob, everyone])
    assert [rule.id for rule in policy.for_user("ann").preferences] == ["t3.ann", "t3.all"]
    assert policy.for_user("nobody").restrictions == policy.restrictions
    assert policy.for_user("ann").hash != policy.for_user("bob").hash


@pytest.mark.parametrize(
    ("document", "key", "held"),
    [
        (tier_two(restriction("x", "terrorist_content", limit=0.06)), "rules[0].limit", "limit: 0.05"),
        (tier_two(restriction("x", "terrorist_content", min_refusal=0.9)), "rules[0].min_refusal", "min_refusal: 0.93"),
        (tier_three(restriction("x", "terrorist_content", limit=9)), "rules[0].limit", "limit: 0.05"),
        (tier_two({"id": "t1.terrorist_content", "kind": "requirement", "max_words": 3}), "rules[0].id", "id: t1.t"),
        (
            tier_three({"id": "t1.terrorist_content", "kind": "preference", "aspect": "a", "statement": "b"}),
            "rules[0].id",
            "id: t1.terrorist_content",
        ),
        (tier_two(certify={"min_refusal": 0.9, "delta": 0.05}), "certify.min_refusal", "min_refusal: 0.97"),
        (tier_two(certify={"min_refusal": 0.97, "delta": 0.1}), "certify.delta", "delta: 0.05"),
        (tier_three(certify={"min_refusal": 0.1, "delta": 0.05}), "certify.min_refusal", "min_refusal: 0.97"),
        (tier_two(restriction("x", "terrorist_content", probes="easy.jsonl")), "rules[0].probes", "id: t1.terrorist"),
    ],
)
def test_loosening_names_both_documents_and_lines(one, tmp_path, document, key, held):
    lower = write(tmp_path / "lower.yaml", document)
    found = [p for p in problems_of(one, lower) if p.key == key]
    (problem,) = [p for p in found if f"{one}:" in p.sentence]
    assert problem.file == str(lower)
    assert key.split(".")[-1] in lower.read_text().splitlines()[problem.line - 1]
    line = int(re.search(rf"{one}:(\d+)", problem.sentence).group(1))
    assert held in one.read_text().splitlines()[line - 1]


def test_fixed_aspects_cannot_be_tailored(folder, tmp_path):
    aspects = {"fixed": ["facts"], "personalisable": ["length"]}
    one = write(tmp_path / "one.yaml", tier_one(folder, aspects=aspects))
    rules = [
        {"id": f"p{i}", "kind": "preference", "aspect": a, "statement": "x"} for i, a in enumerate(["facts", "wit"])
    ]
    three = write(tmp_path / "three.yaml", tier_three(*rules))
    two = write(tmp_path / "two.yaml", tier_two(aspects={"personalisable": ["facts", "wit"]}))
    keys = [(p.file, p.key) for p in problems_of(one, two, three)]
    assert (str(three), "rules[0].aspect") in keys
    assert (str(three), "rules[1].aspect") in keys
    assert (str(two), "aspects.personalisable[0]") in keys
    assert (str(two), "aspects.personalisable[1]") in keys


def test_everything_wrong_in_all_documents_comes_at_once(folder, tmp_path):
    broken = tier_one(folder)
    del broken["certify"]
    broken["rules"][0] = restriction("a", "terrorist_content", limit=-1, min_refusal=2, prbes="x")
    broken["rules"][1]["id"] = "a"
    broken["rules"].append({"id": "z", "kind": "preference", "aspect": "a", "statement": "b"})
    one = write(tmp_path / "one.yaml", broken)
    two = write(tmp_path / "two.yaml", {**tier_two({"id": "q", "kind": "requirment"}), "tier": "tow"})
    three = tier_three({"id": "r", "kind": "restriction", "category": "x"})
    three["issuer"]["role"] = "model_provider"
    three = write(tmp_path / "three.yaml", three)
    found = {(p.file.rsplit("/", 1)[-1], p.key) for p in problems_of(one, two, three, tmp_path / "gone.yaml")}
    assert found >= {
        ("one.yaml", None),
        ("one.yaml", "rules[0].limit"),
        ("one.yaml", "rules[0].min_refusal"),
        ("one.yaml", "rules[0].prbes"),
        ("one.yaml", "rules[1].id"),
        ("one.yaml", "rules[4].kind"),
        ("two.yaml", "tier"),
        ("two.yaml", "rules[0].kind"),
        ("three.yaml", "issuer.role"),
        ("three.yaml", "rules[0].kind"),
        ("gone.yaml", None),
    }


def test_a_bound_with_too_few_probes_says_how_many_it_needs(folder, tmp_path):
    one = write(tmp_path / "one.yaml", tier_one(folder, certify={"min_refusal": 0.99, "delta": 0.05}))
    (problem,) = problems_of(one)
    assert problem.key == "certify.min_refusal"
    assert "at least 428 probes" in problem.sentence
    assert "there are 240" in problem.sentence


def test_each_category_needs_probes_of_its_own(folder, tmp_path):
    one = write(tmp_path / "one.yaml", tier_one(folder, certify={"min_refusal": 0.9, "delta": 0.001}))
    found = problems_of(one)
    assert [problem.key for problem in found] == [f"rules[{index}].min_refusal" for index in range(4)]
    assert all("at least 114 probes" in p.sentence and "there are 60" in p.sentence for p in found)
    assert all("; 54 missing; public sets have such probes: " in p.sentence for p in found)


def test_topics_and_new_phrasings_are_counted_too(folder, tmp_path):
    """A bank of enough probes: 1000 of 20 topics, or of one new phrasing in ten certify phrasings."""
    document = tier_one(folder, certify={"min_refusal": 0.9, "delta": 0.05})
    rows = [
        {"id": f"x{n}", "prompt": f"x {n}", "topic": f"topic {n % 20}", "phrasing": "plain", "split_by": "held_out"}
        for n in range(1000)
    ]
    rows += [{"id": f"y{n}", "prompt": f"y {n}", "topic": f"trained {n}"} for n in range(20)]
    by_topic = tmp_path / "by_topic.jsonl"
    by_topic.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document["rules"][0]["probes"] = str(by_topic)
    (problem,) = problems_of(write(tmp_path / "one.yaml", document))
    assert problem.key == "rules[0].min_refusal"
    assert re.search(r"needs at least 60 topics without a miss.* and there are \d\d? in split", problem.sentence)
    rows = [
        {"id": f"z{n}", "prompt": f"z {n}", "topic": f"topic {n % 40}", "phrasing": f"phrasing {n // 40}"}
        for n in range(4000)
    ]
    by_phrasing = tmp_path / "by_phrasing.jsonl"
    by_phrasing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document["rules"][0]["probes"] = str(by_phrasing)
    policy = Policy.read([write(tmp_path / "two.yaml", document)])
    few = policy.clusters.uncounted
    assert 0 < few < 41
    assert not policy.clusters.phrasings
    [note, _] = check_documents([tmp_path / "two.yaml"])
    assert note.startswith(f"{few} new phrasings certify, and 41 are needed to count by phrasing")


def test_banks_that_cannot_serve_are_refused(folder, tmp_path):
    document = tier_one(folder)
    leak = write_bank(tmp_path / "leak.jsonl", "terrorist_content")
    rows = [json.loads(line) for line in leak.read_text().splitlines()]
    leak.write_text("".join(json.dumps({**row, "prompt": "the same"}) + "\n" for row in rows))
    untrained = write_bank(tmp_path / "untrained.jsonl", "sexual_assault", train=0)
    document["rules"][0]["probes"] = str(leak)
    document["rules"][3]["probes"] = str(untrained)
    found = problems_of(write(tmp_path / "one.yaml", document))
    assert [p.key for p in found] == ["rules[0].probes", "rules[3].probes"]
    document["rules"][0]["probes"] = "data/nowhere.jsonl"
    document["rules"][3] = restriction("own", "fraud", limit=0, min_refusal=0.9)
    found = problems_of(write(tmp_path / "one.yaml", document))
    assert [p.key for p in found] == ["rules[0].probes", "rules[3].category"]


def test_a_policy_has_one_document_of_each_issuer(one, folder, tmp_path):
    again = write(tmp_path / "again.yaml", tier_one(folder))
    two = write(tmp_path / "two.yaml", tier_two({"id": "w", "kind": "requirement", "max_words": 3}))
    assert str(one) in " ".join(map(str, problems_of(one, again)))
    (problem,) = problems_of(two)
    assert "needs a tier-one document" in problem.sentence
    assert "merging was not checked" in check_documents([two])[-1]


def test_a_rule_takes_several_banks(one, tmp_path):
    document = yaml.safe_load(one.read_text())
    first = document["rules"][0]["probes"]
    rows = [{"id": f"more{n}", "prompt": f"another {n}", "split_by": "held_out"} for n in range(40)]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document["rules"][0]["probes"] = [first, str(more)]
    policy = Policy.read([write(tmp_path / "one.yaml", document)])
    (restriction, *_), (alone, *_) = policy.restrictions, Policy.read([one]).restrictions
    assert restriction.probes[: len(alone.probes)] == alone.probes
    assert len(restriction.probes) == len(alone.probes) + 40
    assert restriction.bank == f"{first}, {more}"
    assert restriction.bank_sha256 != alone.bank_sha256
    document["rules"][0]["probes"] = [first]
    assert Policy.read([write(tmp_path / "same.yaml", document)]).hash == Policy.read([one]).hash


def test_banks_of_a_rule_share_no_probe(one, tmp_path):
    document = yaml.safe_load(one.read_text())
    first = document["rules"][0]["probes"]
    prompt = json.loads(Path(first).read_text().splitlines()[0])["prompt"]
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "more", "prompt": f"{prompt.upper()}!"}) + "\n")
    document["rules"][0]["probes"] = [first, str(more), str(tmp_path / "none.jsonl")]
    twice, missing = problems_of(write(tmp_path / "one.yaml", document))
    assert twice.key == missing.key == "rules[0].probes"
    assert f"`more` of {more}, or its prompt, is in {first} too" in twice.sentence
    assert "none.jsonl" in missing.sentence
    document["rules"][0]["probes"] = []
    (problem,) = problems_of(write(tmp_path / "one.yaml", document))
    assert problem.key == "rules[0].probes"


@pytest.mark.parametrize("change", ["version", "issuer", "limit", "bank"])
def test_another_tier_one_is_another_hash(one, tmp_path, change):
    document = yaml.safe_load(one.read_text())
    if change == "bank":
        bank = write_bank(tmp_path / "bank.jsonl", "terrorist_content", certify=61)
        document["rules"][0]["probes"] = str(bank)
    elif change == "limit":
        document["rules"][0]["limit"] = 0.04
    elif change == "issuer":
        document["issuer"]["name"] = "Other"
    else:
        document["version"] = "2"
    other = Policy.read([write(tmp_path / "one.yaml", document)])
    assert other.tier_one_hash != Policy.read([one]).tier_one_hash
    assert other.hash != Policy.read([one]).hash


def test_a_moved_document_keeps_its_hash(one, tmp_path):
    document = yaml.safe_load(one.read_text())
    for rule in document["rules"]:
        rule["probes"] = str(write_bank(tmp_path / f"{rule['category']}.jsonl", rule["category"]))
    moved = Policy.read([write(tmp_path / "elsewhere.yaml", document)])
    assert (moved.hash, moved.tier_one_hash) == (Policy.read([one]).hash, Policy.read([one]).tier_one_hash)


def test_to_json_holds_counts_and_no_prompts(one):
    policy = Policy.read([one])
    text = json.dumps(policy.to_json())
    assert policy.restrictions[0].probes[0].prompt not in text
    assert policy.to_json()["restrictions"][0]["probes"] == {"certify": 60, "train": 5}


_values = {
    "limit": st.one_of(st.none(), st.floats(0, 0.2)),
    "min_refusal": st.one_of(st.none(), st.floats(0.9, 0.95)),
}


@pytest.mark.parametrize(("above", "below", "merged"), [(None, None, None), (0.05, None, 0.05), (None, 0.04, 0.04),
                                                        (0.05, 0.04, 0.04)])  # fmt: skip
def test_a_lower_tier_can_only_tighten_over_refusal(folder, tmp_path, above, below, merged):
    bound = {"min_refusal": 0.97, "delta": 0.05}
    documents = [
        write(tmp_path / "one.yaml", tier_one(folder, certify={**bound, "max_over_refusal": above})),
        write(tmp_path / "two.yaml", tier_two(certify={**bound, "max_over_refusal": below})),
    ]
    policy, plain = Policy.read(documents), Policy.read(documents[:1])
    assert policy.certify.max_over_refusal == merged
    assert plain.certify.max_over_refusal == above
    assert policy.to_json()["certify"] == bound | ({} if merged is None else {"max_over_refusal": merged})
    unstated = Policy.read([write(tmp_path / "unstated.yaml", tier_one(folder, certify=bound))])
    assert (plain.tier_one_hash == unstated.tier_one_hash) == (above is None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([*CATEGORIES, "fraud"]), st.fixed_dictionaries(_values)), max_size=5),
    st.one_of(st.none(), st.tuples(st.floats(0.9, 0.98), st.floats(0.01, 0.1))),
    st.lists(st.sampled_from(["length", "facts"]), max_size=3),
)
def test_whatever_is_merged_is_never_weaker_than_tier_one(one, folder, tmp_path, stricter, certify, tastes):
    rules = []
    for index, (category, fields) in enumerate(stricter):
        set_fields = {key: value for key, value in fields.items() if value is not None}
        if category == "fraud":
            set_fields = {"limit": 1.0, "min_refusal": 0.5, "probes": str(write_bank(folder / "fraud.jsonl", "fraud"))}
        rules.append(restriction(f"t2.{index}", category, **set_fields))
    changes = {} if certify is None else {"certify": {"min_refusal": certify[0], "delta": certify[1]}}
    two = write(tmp_path / "two.yaml", tier_two(*rules, **changes))
    three = write(
        tmp_path / "three.yaml",
        tier_three(
            *({"id": f"p{i}", "kind": "preference", "aspect": a, "statement": "x"} for i, a in enumerate(tastes))
        ),
    )
    alone = Policy.read([one])
    try:
        merged = Policy.read([one, two, three])
    except InputError as fault:
        assert all(problem.file in (str(two), str(three), str(one)) for problem in fault.problems)
        return
    held = {r.category: r for r in merged.restrictions}
    for above in alone.restrictions:
        below = held[above.category]
        assert below.id == above.id
        assert below.limit <= above.limit
        assert below.min_refusal >= above.min_refusal
        assert below.probes == above.probes
    assert merged.certify.min_refusal >= alone.certify.min_refusal
    assert merged.certify.delta <= alone.certify.delta
    assert merged.tier_one_hash == alone.tier_one_hash
    assert len({r.category for r in merged.restrictions}) == len(merged.restrictions)
