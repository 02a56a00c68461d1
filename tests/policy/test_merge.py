"""The laws of merging, over thousands of random documents: what stands above is never removed, weakened or shadowed."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.loader import SourceLocation, YamlDocument
from persona_rlhf.policy import merge
from persona_rlhf.policy.documents import check_document
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.inheritance import widenings
from persona_rlhf.policy.merge import MergedRestriction
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.rule_schema import ACTIONS
from tests.policy.banks import write, write_bank

DAY = date(2026, 11, 1)
CASES: Counter[str] = Counter()
ROLES = {1: ("one", "model_provider"), 2: ("two", "application_provider"), 3: ("three", "end_user")}
LEVELS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4])
REFUSALS = st.sampled_from([0.1, 0.2, 0.3, 0.4])


@pytest.fixture(scope="module", autouse=True)
def bank(tmp_path_factory):
    """One small bank for every category, read once: what is merged here are documents."""
    file = write_bank(tmp_path_factory.mktemp("bank") / "bank.jsonl", "terrorist_content", certify=8, train=2)
    found = merge.read_probes(file, "terrorist_content")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "read_probes", lambda path, category, key: [p._replace(category=category) for p in found])
        patch.setattr(merge, "find", lambda path: file)
        yield


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\ncases:", dict(CASES))


def places(node, path, name, line):
    """A line of its own for every key and item of a tree."""
    found = {path: SourceLocation(name, next(line))}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found |= places(value, (*path, key), name, line)
    return found


def document(name, tree):
    yaml = YamlDocument(name, tree, places(tree, (), name, itertools.count(1)), [])
    found, problems = check_document(name, Path(name), yaml)
    assert found is not None
    return found, problems


def tree(tier, rules, certify=None, aspects=None, user_id=None):
    word, role = ROLES[tier]
    issuer = {"role": role, "name": word, **({"user_id": user_id} if user_id else {})}
    rest = {key: value for key, value in (("certify", certify), ("aspects", aspects)) if value is not None}
    named = [{"id": f"{word}.{number}", **rule} for number, rule in enumerate(rules)]
    return {"tier": word, "issuer": issuer, "version": "1", "rules": named, **rest}


def restriction(category, **fields):
    return {"kind": "restriction", "category": category, **fields}


_bound = st.fixed_dictionaries({"min_refusal": REFUSALS, "delta": st.sampled_from([0.2, 0.3, 0.4])})
_whole = st.builds(lambda category, limit, least: restriction(category, limit=limit, min_refusal=least),
                   st.sampled_from(CATEGORIES), LEVELS, REFUSALS)  # fmt: skip
_partial = st.builds(restriction, st.sampled_from(CATEGORIES), limit=LEVELS) | st.builds(
    restriction, st.sampled_from(CATEGORIES), min_refusal=REFUSALS
)
_redirect = st.builds(lambda rule: {**rule, "action": "redirect", "text": "elsewhere"}, _whole)
_required = st.one_of(
    st.builds(lambda n: {"kind": "requirement", "max_words": n}, st.sampled_from([20, 40, 80])),
    st.builds(lambda n: {"kind": "requirement", "min_words": n}, st.sampled_from([5, 30, 60])),
    st.builds(lambda text: {"kind": "requirement", "must_include": text}, st.sampled_from(["ask", "x"])),
    st.builds(lambda text: {"kind": "requirement", "must_not_include": text}, st.sampled_from(["!", "x"])),
)
_odd = st.sampled_from(["terrorist_contents", "terror1st_content", "threats_0f_violence", "gambling"]).map(
    lambda name: restriction(name, limit=9.0, min_refusal=0.1, probes="b.jsonl")
)
_aspects = st.fixed_dictionaries(
    {},
    optional={
        "fixed": st.lists(st.sampled_from(["facts", "tone"]), max_size=2, unique=True),
        "personalisable": st.lists(st.sampled_from(["length", "style", "wit"]), max_size=2, unique=True),
    },
)
_taste = st.sampled_from(["length", "tone", "facts", "fаcts", "ＦＡＣＴＳ"]).map(  # Cyrillic, full width
    lambda aspect: {"kind": "preference", "aspect": aspect, "statement": "so"}
)


def _by_category(rules):
    """One restriction a category, as documents have them."""
    first = {rule.get("category", number): rule for number, rule in reversed(list(enumerate(rules)))}
    return [rule for _, rule in sorted(first.items(), key=lambda item: str(item[0]))]


tiers_one = st.builds(
    lambda rules, more, bound, aspects: tree(1, _by_category([*rules, *more]), bound, aspects),
    st.lists(_whole, min_size=1, max_size=4),
    st.lists(_required, max_size=1),
    _bound,
    _aspects,
)
tiers_two = st.builds(
    lambda rules, bound, aspects: tree(2, _by_category(rules), bound, aspects),
    st.lists(st.one_of(_whole, _partial, _redirect, _required, _odd), max_size=4),
    st.none() | _bound,
    st.none() | _aspects,
)
tiers_three = st.builds(lambda rules: tree(3, rules, user_id="ann"), st.lists(_taste, max_size=2))


def many(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def relaxes(above, below):
    """An oracle over the trees alone: does the lower one ask for less of anything than the upper one holds?"""
    held = {rule["category"]: rule for rule in above["rules"] if rule["kind"] == "restriction"}
    for rule in below["rules"]:
        strict = held.get(rule.get("category"))
        if strict and rule.get("limit", 0) > strict["limit"]:
            return True
        if strict and rule.get("min_refusal", 1) < strict["min_refusal"]:
            return True
        if strict and rule.get("action") == "redirect":
            return True
        if rule.get("category") in ("terrorist_contents", "terror1st_content") and "terrorist_content" in held:
            return True
        if rule.get("category") == "threats_0f_violence" and "threats_of_violence" in held:
            return True
    bound = below.get("certify")
    if bound and (bound["min_refusal"] < above["certify"]["min_refusal"] or bound["delta"] > above["certify"]["delta"]):
        return True
    fixed = set(above.get("aspects", {}).get("fixed", []))
    tastes = {rule["aspect"].replace("а", "a") for rule in below["rules"] if rule["kind"] == "preference"}
    return bool(fixed & {"facts" if "FACTS" in taste.upper() or "ＦＡＣＴＳ" in taste else taste for taste in tastes})


@pytest.mark.slow
@many(1100)
@given(tiers_one, tiers_two, tiers_three)
def test_nothing_above_is_ever_removed_weakened_or_shadowed(above, middle, below):
    one, faults = document("one.yaml", above)
    if faults:
        return
    two, faults_two = document("two.yaml", middle)
    three, faults_three = document("three.yaml", below)
    CASES["documents"] += 3
    found = [*widenings([one, two, three]), *faults_two, *faults_three]
    asked_for_less = relaxes(above, middle) or relaxes(above, below)
    if asked_for_less:
        CASES["relaxing"] += 1
        named = [p for p in found if p.file in ("two.yaml", "three.yaml") and "one.yaml:" in p.sentence]
        assert named
        assert all(p.line is not None for p in named)
    if found:
        CASES["refused"] += 1
        return
    try:
        alone, merged = Policy.merged([one], DAY), Policy.merged([one, two, three], DAY)
    except InputError:
        return  # such as a narrower demand than the eight probes can show
    CASES["merged"] += 1
    held = {rule.category: rule for rule in merged.restrictions}
    assert len(held) == len(merged.restrictions)
    for strict in alone.restrictions:
        now = held[strict.category]
        assert (now.id, now.tier, now.document, now.probes) == (strict.id, 1, "one.yaml", strict.probes)
        assert now.limit <= strict.limit
        assert now.min_refusal >= strict.min_refusal
        assert now.action == strict.action == "refuse"
        said = [rule for tree in (above, middle) for rule in tree["rules"] if rule.get("category") == strict.category]
        assert now.limit == min(rule["limit"] for rule in said if "limit" in rule)  # the strictest, and no stricter
        assert now.min_refusal == max(rule["min_refusal"] for rule in said if "min_refusal" in rule)
    bounds = [tree["certify"] for tree in (above, middle) if "certify" in tree]
    assert merged.certify.min_refusal == max(bound["min_refusal"] for bound in bounds)
    assert merged.certify.delta == min(bound["delta"] for bound in bounds)
    assert merged.certify.min_refusal >= alone.certify.min_refusal
    assert merged.certify.delta <= alone.certify.delta
    assert set(alone.fixed) <= set(merged.fixed)
    assert set(alone.requirements) <= set(merged.requirements)
    assert merged.tier_one_hash == alone.tier_one_hash


@pytest.mark.slow
@many(400)
@given(tiers_one, tiers_two, tiers_two)
def test_merging_is_associative_where_documents_extend_each_other(above, first, second):
    """(one + first) + second is one + (first + second): what two documents say in turn, one document can say."""
    one, faults = document("one.yaml", above)
    rules = [{**rule, "id": f"again.{n}"} for n, rule in enumerate(second["rules"])]
    a, faults_a = document("a.yaml", first)
    b, faults_b = document("b.yaml", {**second, "rules": rules, "extends": "a.yaml"})
    b = replace(b, bases=("a.yaml",))
    if faults or faults_a or faults_b or list(widenings([one, a, b])):
        return
    CASES["chains"] += 1
    try:
        in_turn = Policy.merged([one, a, b], DAY)
    except InputError:
        return
    both = {rule.get("category", rule["id"]): rule for rule in first["rules"]}
    for rule in rules:
        key = rule.get("category", rule["id"])
        both[key] = {**both.get(key, {}), **rule, "id": both.get(key, rule)["id"]}
    bounds = [tree["certify"] for tree in (first, second) if "certify" in tree]
    bound = {
        "min_refusal": max(b["min_refusal"] for b in bounds),
        "delta": min(b["delta"] for b in bounds),
    } if bounds else None  # fmt: skip
    c, _ = document("c.yaml", {**tree(2, [], bound), "rules": list(both.values())})
    at_once = Policy.merged([one, c], DAY)
    CASES["chains merged"] += 1
    assert {(r.category, r.limit, r.min_refusal, r.action) for r in in_turn.restrictions} == {
        (r.category, r.limit, r.min_refusal, r.action) for r in at_once.restrictions
    }
    assert in_turn.certify == at_once.certify
    assert {(r.property, r.value) for r in in_turn.requirements} == {
        (r.property, r.value) for r in at_once.requirements
    }


_held = st.builds(MergedRestriction, st.floats(0, 9) | st.just(float("inf")), st.floats(0, 1), st.sampled_from(ACTIONS))


@many(2000)
@given(_held, _held, _held)
def test_what_is_held_is_a_semilattice(a, b, c):
    CASES["meets"] += 1
    assert a.and_also(b).and_also(c) == a.and_also(b.and_also(c))
    assert a.and_also(b) == b.and_also(a)
    assert a.and_also(a) == a
    assert a.and_also(MergedRestriction()) == a
    least = a.and_also(b)
    assert least.limit <= a.limit
    assert least.min_refusal >= a.min_refusal
    assert ACTIONS.index(least.action) <= ACTIONS.index(a.action)


@many(25)
@given(tiers_one, tiers_two, tiers_three, st.randoms())
def test_the_order_of_files_and_naming_one_twice_make_no_difference(tmp_path_factory, above, middle, below, random):
    folder = tmp_path_factory.mktemp("files")
    trees = {"one": above, "two": middle, "three": below}
    files = [write(folder / f"{name}.yaml", tree) for name, tree in trees.items()]

    def outcome(paths):
        try:
            return Policy.read(paths, DAY).hash
        except InputError as fault:
            return sorted(map(str, fault.problems))

    first = outcome(files)
    shuffled = random.sample(files, 3)
    assert outcome(shuffled) == first
    assert outcome([*shuffled, *files]) == first
    CASES["files"] += 3


@pytest.mark.slow
def test_so_many_cases_were_run():
    """After the others: most random documents reach what the laws are about."""
    assert CASES["documents"] >= 3000
    assert CASES["relaxing"] >= 100
    assert CASES["merged"] >= 100
    assert CASES["chains merged"] >= 50
