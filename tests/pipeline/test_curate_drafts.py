"""Pairs from stated tastes: nearer to the wish is chosen, and nothing above the wish is touched."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.properties import distance
from persona_rlhf.policy.rule_schema import PropertyValue

TWO = {"tier": "two", "issuer": {"role": "application_provider", "name": "App"}, "version": "1"}
THREE = {"tier": "three", "issuer": {"role": "end_user", "name": "Ann", "user_id": "ann"}, "version": "1"}


def taste(name, **wish):
    return {"id": f"t3.{name}", "kind": "preference", "aspect": "length", **wish}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment on the bundled base; the function writes Ann's tastes and her provider's rules."""
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "mine"]).exit_code == 0
    monkeypatch.chdir(tmp_path / "mine")

    def write(tastes, rules=()):
        (tmp_path / "mine/ann.yaml").write_text(yaml.safe_dump({**THREE, "rules": tastes}))
        (tmp_path / "mine/app.yaml").write_text(yaml.safe_dump({**TWO, "rules": list(rules)}))
        config = yaml.safe_load((tmp_path / "mine/experiment.yaml").read_text())
        documents = ["policy/tier_one.yaml", *(["app.yaml"] if rules else []), "ann.yaml"]
        (tmp_path / "mine/draft.yaml").write_text(yaml.safe_dump(config | {"policy": {"documents": documents}}))

    return write


def drafted(*words):
    return CliRunner().invoke(app, ["data", "draft", "draft.yaml", "out.jsonl", "--user", "ann", *words])


def test_distances_by_hand():
    assert distance([PropertyValue("max_words", 4)], "one two three") == 0
    assert distance([PropertyValue("max_words", 4)], "one two three four five six") == 0.5
    assert distance([PropertyValue("min_words", 4)], "one") == 0.75
    assert distance([PropertyValue("language", "fr")], "the cat is on the table and it is not the dog") == 1
    assert distance([PropertyValue("avoid", "medical, dragons")], "A doctor says: rest.") == 0.5
    assert distance([PropertyValue("avoid", "medical, dragons")], "Here be Dragons.") == 0.5
    assert distance([PropertyValue("max_words", 1), PropertyValue("avoid", "dragons")], "dragons here") == 2
    with pytest.raises(ValueError, match="formality"):
        distance([PropertyValue("formality", "formal")], "Sir")


def test_the_shorter_answer_is_chosen_within_what_the_provider_requires(experiment, tmp_path):
    calm = {"id": "t2.calm", "kind": "requirement", "must_not_include": "!"}
    experiment([taste("short", max_words=8), taste("warm", tone="warm")], [calm])
    done = drafted("--pairs", "6", "--json")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "mine/out.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    wish = [PropertyValue("max_words", 8)]
    for row in rows:
        assert distance(wish, row["chosen"]) < distance(wish, row["rejected"])
        assert "!" not in row["chosen"] + row["rejected"]
        assert not is_refusal(row["chosen"])
        assert (row["user_id"], row["source"]) == ("ann", "drafted: t3.short")
    said = json.loads(done.stdout)
    assert (said["pairs"], said["tastes"], said["unread"]) == (6, ["t3.short"], ["t3.warm"])
    assert CliRunner().invoke(app, ["data", "check", "out.jsonl"]).exit_code == 0
    before = (tmp_path / "mine/out.jsonl").read_text()
    again = drafted("--pairs", "2")
    assert again.exit_code == 2
    assert "out.jsonl" in again.stderr
    assert (tmp_path / "mine/out.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("tastes", "rules", "words"),
    [
        ([taste("warm", tone="warm")], [], ("ann.yaml", "min_words")),
        (
            [taste("short", max_words=8)],
            [{"id": "t2.long", "kind": "requirement", "min_words": 30}],
            ("no requirement overrules",),
        ),
    ],
    ids=["nobody can read it", "overruled"],
)
def test_a_taste_that_cannot_be_drafted_from_is_said(experiment, tmp_path, tastes, rules, words):
    experiment(tastes, rules)
    done = drafted()
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "mine/out.jsonl").exists()


def test_everything_wrong_is_said_at_once(experiment, tmp_path):
    experiment([taste("warm", tone="warm")])
    (tmp_path / "mine/out.jsonl").write_text("mine")
    done = drafted("evaluation.ordinary=null")
    assert done.exit_code == 2
    for words in ("ann.yaml", "evaluation.ordinary", "out.jsonl"):
        assert words in done.stderr
    assert (tmp_path / "mine/out.jsonl").read_text() == "mine"
