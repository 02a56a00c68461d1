"""The quarantine of a run and what people decide about it; the run is written by hand."""

import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.experiment import read_config
from persona_rlhf.data.feedback import read_reviews
from persona_rlhf.pipeline.curate import quarantine, review
from persona_rlhf.release import integrity

TEXTS = [
    ("ann", "a1", "kill a process", "Type kill."),
    ("ann", "a2", "tea?", "Yes."),
    ("bob", "b1", "a probe", "Sure."),
]
ROWS = [
    {"user_id": user, "id": name, "prompt": prompt, "chosen": chosen, "rejected": "No.", "split": "train"}
    for user, name, prompt, chosen in TEXTS
]


@pytest.fixture
def run(tmp_path):
    users, run = tmp_path / "users.jsonl", tmp_path / "run"
    users.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run.mkdir()
    (run / "config.yaml").write_text(read_config("configs/quickstart.yaml", [f"users.path={users}"]).to_yaml())
    found = [("ann", "a1", 1, "refused: the base refuses it"), ("bob", "b1", 3, "probe: it is one of `t1.terrorism`")]
    rows = [
        {"user_id": user, "pair_id": pair, "file": str(users), "line": line, "action": "quarantined", "reason": why}
        for user, pair, line, why in found
    ]
    rows.append(rows[0] | {"pair_id": "a2", "line": 2, "action": "dropped"})
    (run / "screening.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_quarantine_is_shown_with_its_texts_and_decisions(run):
    assert [(held.pair.id, held.review) for held in quarantine(run)] == [("a1", None), ("b1", None)]
    made = review(run, "ann", "a1", "accept", "about computers", "Ann Officer")
    assert [held.review for held in quarantine(run, "ann")] == [made]
    [entry] = integrity.read(run)
    assert (entry.event, entry.facts) == ("review", made._asdict() | {"user_id": pseudonym("ann")})
    assert "kill" not in (run / "reviews.jsonl").read_text()
    assert not any(text in (run / integrity.AUDIT).read_text() for text in ("kill", "ann"))
    review(run, "ann", "a1", "reject", "on second thoughts", "Bob")
    assert [own.decision for own in read_reviews(run / "reviews.jsonl").values()] == ["reject"]


def test_what_no_review_lifts_and_what_is_not_there(run):
    with pytest.raises(InputError, match="cannot be accepted; it is one of `t1.terrorism`"):
        review(run, "bob", "b1", "accept", "please", "Ann")
    with pytest.raises(InputError, match="no pair `a2` of `ann` is in quarantine; `data review RUN` lists"):
        review(run, "ann", "a2", "accept", "fine", "Ann")
    assert not (run / "reviews.jsonl").exists()
    review(run, "bob", "b1", "reject", "poison", "Ann")
    (run / "screening.jsonl").unlink()
    with pytest.raises(InputError, match="is this a finished run"):
        quarantine(run)


def test_the_verb(run):
    call = CliRunner().invoke
    shown = call(app, ["data", "review", str(run), "--json"])
    assert [held["prompt"][0]["content"] for held in json.loads(shown.stdout)] == ["kill a process", "a probe"]
    words = ["data", "review", str(run), "--user", "ann", "--pair", "a1", "--decide", "accept"]
    assert call(app, words).exit_code == 2  # without a reason
    assert call(app, [*words, "--reason", "fine", "--reviewer", "Ann"]).exit_code == 0
    assert call(app, [*words[:-1], "perhaps", "--reason", "fine", "--reviewer", "Ann"]).exit_code == 2
    again = call(app, ["data", "review", str(run)])
    assert "accept by Ann: fine" in " ".join(again.output.split())
