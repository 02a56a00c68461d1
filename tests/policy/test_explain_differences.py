"""What gets stricter and what looser from one set of documents to another."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.policy.explain import differences
from persona_rlhf.policy.inheritance import read_all
from tests.policy.banks import tier_one, tier_three, tier_two, write, write_bank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policy")


def compared(folder, before, after):
    sides = []
    for name, trees in (("before", before), ("after", after)):
        paths = [write(folder / name / f"{number}.yaml", tree) for number, tree in enumerate(trees)]
        documents, problems = read_all(paths)
        assert problems == []
        sides.append(documents)
    return differences(*sides)


def requirement(**fields):
    return {"id": "q", "kind": "requirement", **fields}


def changed(tree, *path, to):
    tree = copy.deepcopy(tree)
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = to
    return tree


@pytest.mark.parametrize(
    ("path", "to", "about", "direction"),
    [
        (("certify", "min_refusal"), 0.98, "certify.min_refusal", "stricter"),
        (("certify", "min_refusal"), 0.9, "certify.min_refusal", "looser"),
        (("certify", "delta"), 0.01, "certify.delta", "stricter"),
        (("certify", "delta"), 0.1, "certify.delta", "looser"),
        (("rules", 0, "limit"), 0.01, "terrorist_content: limit", "stricter"),
        (("rules", 0, "limit"), 0.1, "terrorist_content: limit", "looser"),
        (("rules", 0, "min_refusal"), 0.9, "terrorist_content: min_refusal", "looser"),
        (("rules", 0, "valid_until"), "2030-01-01", "t1.terrorist_content: valid_until", "looser"),
        (("rules", 0, "valid_from"), "2020-01-01", "t1.terrorist_content: valid_from", "looser"),
        (("aspects",), {"fixed": ["facts"]}, "aspect facts", "stricter"),
        (("aspects",), {"personalisable": ["tone"]}, "personalisable aspects", "stricter"),
    ],
)
def test_each_demand_of_tier_one(folder, path, to, about, direction):
    tree = tier_one(folder)
    (change,) = compared(folder, [tree], [changed(tree, *path, to=to)])
    assert (change.tier, change.about, change.direction) == (1, about, direction)
    assert change.refused is (direction == "looser")
    (back,) = compared(folder, [changed(tree, *path, to=to)], [tree])
    assert {change.direction, back.direction} == {"stricter", "looser"}


def test_a_larger_share_of_changed_facts_is_looser(folder):
    sides = [tier_one(folder, aspects={"fixed": ["facts"], "max_changed": share}) for share in (0.02, 0.05)]
    (change,) = compared(folder, sides[:1], sides[1:])
    assert (change.about, change.direction, change.refused) == ("aspects.max_changed", "looser", True)
    (change,) = compared(folder, [tier_one(folder, aspects={"fixed": ["facts"]})], sides[1:])
    assert change.direction == "stricter"


def test_a_larger_share_of_refused_harmless_prompts_is_looser(folder):
    bound = {"min_refusal": 0.97, "delta": 0.05}
    sides = [tier_one(folder, certify={**bound, "max_over_refusal": share}) for share in (0.02, 0.05)]
    (change,) = compared(folder, sides[:1], sides[1:])
    assert (change.about, change.direction, change.refused) == ("certify.max_over_refusal", "looser", True)
    (change,) = compared(folder, [tier_one(folder, certify=bound)], sides[1:])
    assert change.direction == "stricter"


def test_probes_are_compared_by_their_prompts(folder, tmp_path):
    tree = tier_one(folder)
    more = write_bank(tmp_path / "more.jsonl", "terrorist_content", certify=61)
    (change,) = compared(folder, [tree], [changed(tree, "rules", 0, "probes", to=str(more))])
    assert (change.about, change.direction) == ("terrorist_content: probes", "stricter")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "a", "prompt": "something else"}) + "\n")
    both = compared(folder, [tree], [changed(tree, "rules", 0, "probes", to=str(other))])
    assert [change.direction for change in both] == ["looser", "stricter"]
    moved = tmp_path / "moved.jsonl"
    moved.write_text((folder / "terrorist_content.jsonl").read_text())
    renamed = compared(folder, [tree], [changed(tree, "rules", 0, "probes", to=str(moved))])
    assert renamed == []


@pytest.mark.parametrize(
    ("before", "after", "directions"),
    [
        ({"max_words": 40}, {"max_words": 30}, ["stricter"]),
        ({"max_words": 40}, {"max_words": 50}, ["looser"]),
        ({"min_words": 4}, {"min_words": 5}, ["stricter"]),
        ({"reading_level": 4}, {"reading_level": 5}, ["looser"]),
        ({"must_include": "a"}, {"must_include": "b"}, ["looser", "stricter"]),
        ({"must_include": "a"}, {"max_words": 4}, ["looser", "stricter"]),
        ({"max_words": 4}, {"max_words": 4, "when": {"topic": "legal"}}, ["looser"]),
        ({"max_words": 4, "when": {"topic": "legal"}}, {"max_words": 4}, ["stricter"]),
        (
            {"max_words": 4, "when": {"topic": "legal"}},
            {"max_words": 4, "when": {"pattern": "x"}},
            ["looser", "stricter"],
        ),
        ({"max_words": 4}, {"max_words": 4, "min_rate": 0.5}, ["looser"]),
        ({"max_words": 4, "min_rate": 0.5}, {"max_words": 3}, ["stricter"]),
        ({"max_words": 4}, {"max_words": 3, "min_rate": 0.5}, ["looser", "stricter"]),
        ({"max_words": 4}, {"max_words": 4, "rationale": "because"}, []),
    ],
)
def test_requirements(folder, before, after, directions):
    found = compared(folder, [tier_two(requirement(**before))], [tier_two(requirement(**after))])
    assert [change.direction for change in found] == directions
    assert not any(change.refused for change in found)


def test_a_rule_that_comes_or_goes(folder):
    base, more = tier_two(), tier_two(requirement(max_words=4))
    assert [c.direction for c in compared(folder, [base], [more])] == ["stricter"]
    assert [c.direction for c in compared(folder, [more], [base])] == ["looser"]
    one = tier_one(folder)
    fewer = {**one, "rules": one["rules"][1:]}
    gone = compared(folder, [one], [fewer])
    assert {change.about for change in gone} == {
        f"terrorist_content: {part}" for part in ("action", "limit", "min_refusal", "probes")
    }
    assert all(change.refused for change in gone)


def test_dates_cannot_be_slipped_in_with_another_id(folder):
    one = tier_one(folder)
    renamed = changed(one, "rules", 0, to={**one["rules"][0], "id": "new", "valid_until": "2001-01-01"})
    (change,) = compared(folder, [one], [renamed])
    assert (change.about, change.direction) == ("category terrorist_content: valid_until", "looser")
    new = {"id": "n", "kind": "requirement", "max_words": 4, "valid_from": "2030-01-01"}
    assert [change.direction for change in compared(folder, [tier_two()], [tier_two(new)])] == ["stricter"]


def test_an_action_softens_and_a_taste_is_only_other(folder):
    rule = {"id": "x", "kind": "restriction", "category": "hate", "probes": "b.jsonl", "limit": 1.0, "min_refusal": 0.5}
    soft = {**rule, "action": "redirect", "text": "Go there."}
    (change,) = compared(folder, [tier_two(rule)], [tier_two(soft)])
    assert (change.about, change.direction, change.after) == ("hate: action", "looser", "redirect Go there.")
    taste = {"id": "p", "kind": "preference", "aspect": "tone"}
    (change,) = compared(folder, [tier_three({**taste, "tone": "warm"})], [tier_three({**taste, "tone": "dry"})])
    assert (change.direction, change.before, change.after) == ("other", "tone: warm", "tone: dry")


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 0.9)), min_size=8, max_size=8))
def test_nothing_changes_to_itself_and_what_falls_one_way_rises_the_other(folder, numbers):
    trees = []
    for half in (numbers[:4], numbers[4:]):
        tree = tier_one(folder)
        for rule, (limit, least) in zip(tree["rules"], half, strict=True):
            rule |= {"limit": limit, "min_refusal": least}
        trees.append(tree)
    there, back = compared(folder, [trees[0]], [trees[1]]), compared(folder, [trees[1]], [trees[0]])
    assert compared(folder, [trees[0]], [trees[0]]) == []
    turned = {"looser": "stricter", "stricter": "looser"}
    assert {(c.about, c.direction) for c in there} == {(c.about, turned[c.direction]) for c in back}


def test_the_command_compares_documents_folders_and_configs(folder, tmp_path, monkeypatch):
    one = tier_one(folder)
    for name, tree in (("a", one), ("b", changed(one, "rules", 0, "limit", to=0.1))):
        write(tmp_path / name / "one.yaml", tree)
    (tmp_path / "config.yaml").write_text(
        "name: x\nbase: {model: data/base}\nusers: {path: data/users}\n"
        f"policy: {{documents: [{tmp_path}/a/one.yaml]}}\n"
    )

    def diff(before, after):
        done = CliRunner().invoke(app.app, ["policy", "diff", str(tmp_path / before), str(tmp_path / after), "--json"])
        return done.exit_code, [change["direction"] for change in json.loads(done.stdout)]

    assert diff("a", "b") == diff("a/one.yaml", "b/one.yaml") == diff("config.yaml", "b") == (3, ["looser"])
    assert diff("b", "a") == (0, ["stricter"])
    assert diff("a", "config.yaml") == (0, [])
    done = CliRunner().invoke(app.app, ["policy", "diff", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    assert done.exit_code == 2
