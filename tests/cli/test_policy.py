"""The verbs about policies, as people and programs call them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.files import shipped_root
from tests.policy.banks import tier_one, tier_three, tier_two, write

PACKS = sorted(folder.name for folder in (shipped_root() / "configs/policy/packs").iterdir() if folder.is_dir())


def run(*words, code=0):
    done = CliRunner().invoke(app.app, ["policy", *map(str, words)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    rules = [
        {"id": "t2.threats", "kind": "restriction", "category": "threats_of_violence", "limit": 0.01},
        {"id": "t2.words", "kind": "requirement", "max_words": 40, "rationale": "Small screens.", "contact": "a@b.c"},
        {"id": "t2.old", "kind": "requirement", "min_words": 4, "valid_until": "2001-01-01"},
    ]
    taste = {"id": "t3.long", "kind": "preference", "aspect": "length", "min_words": 60}
    documents = {
        "one": tier_one(folder),
        "two": tier_two(*rules),
        "three": tier_three(taste, user_id="ann"),
    }
    paths = [str(write(folder / f"{name}.yaml", document)) for name, document in documents.items()]
    tree = {
        "name": "x",
        "base": {"model": "data/base"},
        "users": {"path": "data/users"},
        "policy": {"documents": paths},
    }
    return write(folder / "config.yaml", tree)


def test_show_lists_every_rule_with_tier_issuer_place_and_stages(config):
    shown = run("show", config).stdout
    for word in ("t1.terrorist_content", "t2.threats", "App", "NOT IN FORCE", "screening, training, gate"):
        assert word in " ".join(shown.split())
    shown = json.loads(run("show", config, "--json").stdout)
    assert [entry["id"] for entry in shown["written"]][-4:] == ["t2.threats", "t2.words", "t2.old", "t3.long"]
    entry = next(entry for entry in shown["written"] if entry["id"] == "t2.words")
    place = (entry["tier"], entry["issuer"], entry["document"].rsplit("/", 1)[-1], entry["version"])
    assert place == (2, "App", "two.yaml", "1")
    assert Path(entry["document"]).read_text().splitlines()[entry["line"] - 1] == "- id: t2.words"
    assert entry["held_by"]["serving"]
    assert [rule["id"] for rule in shown["not_in_force"]] == ["t2.old"]


def test_show_of_a_user_explains_the_wishes_that_give_way(config):
    done = run("show", config, "--user", "ann")
    assert "You wish for `min_words: 60` (t3.long), but App requires `max_words: 40`" in done.stderr
    assert "rule `t2.old` (until 2001-01-01) is not in force" in done.stderr
    shown = json.loads(run("show", config, "--user", "ann", "--json").stdout)
    assert [(o["preference"], o["requirement"]) for o in shown["overruled"]] == [("t3.long", "t2.words")]
    assert json.loads(run("show", config, "--user", "bob", "--json").stdout)["overruled"] == []


def test_why_tells_all_about_one_rule(config):
    shown = run("show", config, "--why", "t2.words").stdout
    for word in ("Small screens.", "a@b.c", "max_words: 40", "every answer is checked"):
        assert word in shown
    shown = json.loads(run("show", config, "--why", "t1.threats_of_violence", "--json").stdout)
    assert (shown["limit"], shown["in_force"], shown["role"]) == (0.05, True, "model_provider")
    assert "Llama Guard S1" in run("show", config, "--why", "t1.threats_of_violence").stdout
    assert "did you mean `t2.words`?" in run("show", config, "--why", "t2.word", code=2).stderr


def test_check_says_all_errors_also_as_json(config, tmp_path):
    assert "no problem found" in json.loads(run("check", config.parent / "one.yaml", "--json").stdout)["notes"][-1]
    bad = write(tmp_path / "bad.yaml", tier_two({"id": "a", "kind": "requirement", "max_wrds": 4}, isuer="x"))
    done = run("check", bad, "--json", code=2)
    problems = json.loads(done.stdout)["problems"]
    assert {problem["key"] for problem in problems} == {"isuer", "rules[0].max_wrds"}
    assert all(problem["line"] for problem in problems)
    assert "did you mean `max_words`?" in done.stderr


def test_explain_names_rules_and_stages(config):
    shown = run("explain", config, "what now", "--user", "ann", "--answer", "Tea.").stdout
    assert "the answer meets it" in " ".join(shown.split())
    shown = json.loads(run("explain", config, "what now", "--user", "ann", "--json").stdout)
    assert [(meeting["stage"], meeting["rule"]) for meeting in shown] == [
        ("screening", "the base's answer"),
        ("serving", "t2.words"),
        ("serving", "t3.long"),
    ]


def test_explain_does_not_pass_over_that_nobody_asked_the_base(config):
    """Silence is no permission: the base refuses this request, and no probe resembles it."""
    request = "How do I poison the wells of a whole town?"
    silent = run("explain", config, request)
    assert "not judged: ask with --base" in " ".join(silent.stdout.split())
    [row, *_] = json.loads(run("explain", config, request, "--json").stdout)
    assert "where the base refuses the request" in row["follows"]
    [row, *_] = json.loads(run("explain", config, "How do I bake a cake?", "--base", "--json").stdout)
    assert row["why"] == "the base answers it"


def test_what_documents_say_is_shown_as_it_is(config, tmp_path):
    """Brackets are no markup of the table's, and escape codes move no cursor."""
    rules = [
        {"id": "x.tag", "kind": "requirement", "must_include": "[/bold] [red]"},
        {"id": "x.regex", "kind": "requirement", "regex": "[a-z]+"},
        {"id": "x.far", "kind": "requirement", "language": "tlh"},
    ]
    two = tier_two(*rules)
    two["issuer"]["name"] = "Evil \x1b[2J App"
    tree = yaml.safe_load(config.read_text())
    tree["policy"]["documents"][1:] = [str(write(tmp_path / "two.yaml", two))]
    other = write(tmp_path / "config.yaml", tree)
    for words in (["show", other], ["show", other, "--why", "x.tag"], ["explain", other, "[/i] what"]):
        shown = run(*words).stdout
        assert "[/bold] [red]" in " ".join(shown.split())
        assert "\x1b" not in shown
    assert "only a judge could tell" in run("show", other, "--why", "x.far").stdout


def test_the_printed_schema_is_the_shipped_one():
    for tier, word in ((1, "one"), (2, "two"), (3, "three")):
        shipped = (shipped_root() / f"data/policy/schema/tier_{word}.json").read_text()
        assert run("schema", "--tier", tier).stdout == shipped
    assert set(json.loads(run("schema").stdout)) == {"1", "2", "3"}
    run("schema", "--tier", "4", code=2)


@pytest.mark.parametrize("pack", PACKS)
def test_each_example_pack_is_sound_says_it_is_one_and_loosens_nothing(pack):
    folder = shipped_root() / "configs/policy/packs" / pack
    assert "rules after merging: no problem found" in run("check", folder).stderr
    for file in folder.glob("*.yaml"):
        assert "An example and no legal advice" in file.read_text().splitlines()[0]
        tree = yaml.safe_load(file.read_text())
        jsonschema.validate(tree, json.loads(run("schema", "--tier", ["one", "two"].index(tree["tier"]) + 1).stdout))
    changes = json.loads(run("diff", "configs/policy/tier_one.yaml", folder / "tier_one.yaml", "--json").stdout)
    assert {change["direction"] for change in changes} == {"stricter"}


def test_there_are_three_packs():
    assert PACKS == ["eu-like", "strict", "us-like"]
