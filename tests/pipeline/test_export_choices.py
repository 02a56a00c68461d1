"""Choices as pairs: each user with all of their pairs, in a form that every reader of pairs takes."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.check import check
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.store import PairStore
from persona_rlhf.pipeline.export_choices import ExportedChoices, export_choices
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from tests.data.test_choice_ledger import add, choice

CONFIG = {"name": "tiny", "base": {"model": "data/base"}, "policy": {"documents": ["configs/policy/tier_one.yaml"]}}


@pytest.fixture
def run(tmp_path):
    """The index of a run with two users, Ada and Bob, and their pairs."""
    rows = [
        {"user_id": user, "prompt": f"question {n}", "chosen": "yes", "rejected": "no", "id": f"{user}-{n}"}
        | {"split": "train" if n else "heldout", "clean_choice": n == 1, "source": "form", "place": "2/2"}
        for user in ("Ada", "Bob")
        for n in range(3)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "state/identity.json").write_text(json.dumps({PAIRS: "", "users per chunk": "9"}))
    RunDir(run).change_users(PairStore(tmp_path / "pairs.jsonl", 0.25).user_digests)
    return run


@pytest.fixture
def config(run, tmp_path):
    return Config.model_validate({**CONFIG, "users": {"path": str(tmp_path / "pairs.jsonl")}})


@pytest.fixture
def ledger(run):
    ledger = ChoiceLedger(run / CHOICES)
    yield ledger
    ledger.close()


def test_each_user_comes_with_all_pairs_and_the_order_of_time(run, config, ledger, tmp_path):
    for number, verdict in enumerate(("left", "right", "tie", "both_bad", "left")):
        add(ledger, choice(number, "Ada", verdict))
        add(ledger, choice(number, "new user", verdict))
    add(ledger, choice(9, "Carl", "tie"))
    add(ledger, choice(10, "Ada", right="left 10"))
    ledger.undo("Ada 4", "Ada")
    out = tmp_path / "out/choices.jsonl"
    assert export_choices(run, config, ledger, out) == ExportedChoices(users=2, chosen=7, earlier=3)
    pairs = read_pairs(out, 0.25)
    assert Counter(pair.user_id for pair in pairs) == {"Ada": 6, "new user": 4}
    before = [pair for pair in read_pairs(tmp_path / "pairs.jsonl", 0.25) if pair.user_id == "Ada"]
    again = [pair for pair in pairs if pair.source == "form"]
    facts = ("prompt", "chosen", "rejected", "id", "split", "clean_choice", "place", "weight", "created_at")
    assert [[getattr(pair, fact) for fact in facts] for pair in again] == [
        [getattr(pair, fact) for fact in facts] for pair in before
    ]
    chosen = {pair.id: (pair.chosen, pair.place) for pair in pairs if pair.source == "collect"}
    assert chosen["Ada 0"] == ("left 0", (1, 2))
    assert chosen["Ada 1"] == ("right 1", (2, 2))
    assert [pair.id for pair in pairs if pair.tie] == ["Ada 2", "new user 2"]
    assert (check([out]).pairs, check([out]).ties) == (10, 2)
    assert out.stat().st_mode & 0o777 == 0o600


def test_a_second_export_holds_no_pair_twice_and_drops_undone_ones(run, config, ledger, tmp_path):
    for number in range(3):
        add(ledger, choice(number, "Ada"))
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    export_choices(run, config, ledger, first)
    RunDir(run).add_source(str(first))  # as `add` does
    store = PairStore(config.users.path, 0.25, RunDir(run).selection)
    RunDir(run).change_users(store.user_digests)
    ledger.undo("Ada 2", "Ada")
    add(ledger, choice(3, "Ada"))
    assert export_choices(run, config, ledger, second) == ExportedChoices(users=1, chosen=3, earlier=3)
    ids = [pair.id for pair in read_pairs(second, 0.25)]
    assert ids == ["Ada-0", "Ada-1", "Ada-2", "Ada 0", "Ada 1", "Ada 3"]


def test_a_tie_that_the_run_has_comes_along(run, config, ledger, tmp_path):
    for number, verdict in enumerate(("left", "tie")):
        add(ledger, choice(number, "new user", verdict))
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    export_choices(run, config, ledger, first)
    ledger.close()
    RunDir(run).add_source(str(first))
    RunDir(run).change_users(PairStore(config.users.path, 0.25, RunDir(run).selection).user_digests)
    (run / CHOICES).unlink()
    later = ChoiceLedger(run / CHOICES)
    add(later, choice(7, "new user"))
    export_choices(run, config, later, second)
    later.close()
    assert [(pair.id, pair.tie) for pair in read_pairs(second, 0.25)] == [
        ("new user 0", False),
        ("new user 1", True),
        ("new user 7", False),
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_without_a_preferred_answer_nothing_is_written(run, config, ledger, tmp_path, shared):
    add(ledger, choice(1, verdict="tie"))
    with pytest.raises(InputError, match="prefers an answer, so there are no pairs"):
        export_choices(run, config, ledger, tmp_path / "out.jsonl", shared)
    assert not (tmp_path / "out.jsonl").exists()


def test_for_sharing_only_choices_with_consent_that_still_holds(run, config, ledger, tmp_path):
    for user, last in (("Ada", "shared"), ("Bob", "own"), ("Carl", "shared")):
        ledger.record_consent(user, "shared")
        add(ledger, choice(1, user, consent="shared"))
        add(ledger, choice(2, user, consent="own"))
        ledger.record_consent(user, last)
    out = tmp_path / "shared.jsonl"
    assert export_choices(run, config, ledger, out, shared=True) == ExportedChoices(users=2, chosen=2, earlier=0)
    assert [pair.id for pair in read_pairs(out, 0.25)] == ["Ada 1", "Carl 1"]


def test_a_forgotten_users_pairs_stay_out(run, config, ledger, tmp_path):
    (run / "forgotten").mkdir()
    (run / f"forgotten/{pseudonym('Ada')}.json").write_text("{}")
    barred = ChoiceLedger(run / CHOICES, lambda: {pseudonym("Ada")})
    with pytest.raises(InputError):
        barred.append(choice(1))
    barred.close()
    add(ledger, choice(1, "Bob"))
    export_choices(run, config, ledger, tmp_path / "out.jsonl")
    assert {pair.user_id for pair in read_pairs(tmp_path / "out.jsonl", 0.25)} == {"Bob"}


@pytest.mark.parametrize("name", ["pairs.jsonl", "new.csv"])
def test_nothing_is_overwritten(run, config, ledger, tmp_path, name):
    before = (tmp_path / "pairs.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"name a new file \*.jsonl"):
        export_choices(run, config, ledger, tmp_path / name)
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
