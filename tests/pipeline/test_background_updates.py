"""Updates in the background: who is trained, how it ends, and stops, deletions and kills in the middle.

A stand-in for `add` writes the lines that a training writes; `tests/story/test_collect.py` trains.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
from persona_rlhf.data.collected_users import collected_users
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.pipeline.background_updates import BackgroundUpdates, without_update
from persona_rlhf.pipeline.export_choices import UPDATES, trained_ids
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.results import PairCounts, skipped, write_results
from tests.data.test_choice_ledger import add, choice
from tests.pipeline.test_export_choices import CONFIG, config, run  # noqa: F401 - fixtures

ADD = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.release import integrity
from persona_rlhf.release.results import PairCounts, read_results, skipped, write_results

run, source, mode = Path(sys.argv[2]), sys.argv[4], (Path(sys.argv[2]) / "state/mode").read_text()
assert (sys.argv[1], sys.argv[5]) == ("add", "--keep-earlier")
if mode == "fault":
    sys.exit("no memory\\nleft")
if mode == "slow":
    inner = RunDir(RunDir(run).addition)
    user = json.loads(Path(source).read_text().splitlines()[0])["user_id"]
    inner.state.mkdir(parents=True)
    users = [(integrity.pseudonym(user), "pairs")]
    inner.begin_as(RunDir(run), users, 1)
    inner.change_users(users)
    (run / "state/under way").touch()
    time.sleep(60)
rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
user = rows[0]["user_id"]
line = skipped(user, "", PairCounts(len(rows), 0, 0))
if mode == "released":
    line = replace(line, status="released", path=f"adapters/{line.slug}", manifest_sha256="a" * 64)
else:
    line = replace(line, status=mode)
integrity.append_all(run, [integrity.ended(line)])
if mode == "released":
    write_results(run, [*(one for one in read_results(run) if one.user_id != user), line])
RunDir(run).add_source(source)
print(json.dumps([line.to_json()]))
sys.exit(0 if mode == "released" else 3)
"""


class Updates:
    """Updates of a run after 3 choices, with a stand-in for `add`."""

    def __init__(self, run: Path, config, program: Path):
        self.run, self.log = run, []
        self.ledger = ChoiceLedger(run / CHOICES, lambda: forgotten(run))
        self.config, self.program = config, (sys.executable, str(program))
        self.restart()

    def restart(self):
        self.updates = BackgroundUpdates(self.run, self.config, self.ledger, 3, self.log.append, self.program)

    def choose(self, *numbers, user="Ada", verdict="left"):
        for number in numbers:
            add(self.ledger, choice(number, user, verdict))

    def next_ends(self, mode: str) -> str | None:
        """Trains the next user, and the training ends in this way; the user."""
        (self.run / "state/mode").write_text(mode)
        user = self.updates.next_user()
        if user is not None:
            self.updates.update(user)
        return user

    def steps(self, user="Ada"):
        return [(one.event, one.detail if one.event != "begun" else "") for one in self.ledger.updates(user)]


@pytest.fixture
def updates(run, config, tmp_path):
    (tmp_path / "add.py").write_text(ADD)
    write_results(run, [skipped("Ada", "", PairCounts(2, 1, 0))])
    made = Updates(run, config, tmp_path / "add.py")
    yield made
    made.ledger.close()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_user_is_trained_when_enough_choices_prefer_an_answer(updates):
    updates.choose(0, 1)
    updates.choose(2, 3, 4, verdict="tie")
    assert updates.next_ends("released") is None
    updates.choose(5)
    updates.choose(0, 1, 2, user="Carl")
    assert updates.next_ends("released") == "Ada"
    assert updates.steps() == [("begun", ""), ("released", "")]
    begun, released = updates.ledger.updates("Ada")
    assert (begun.adapter, released.adapter, begun.choices) == ("base", "a" * 64, 3)
    ids = {pair.id for pair in read_pairs(begun.detail, 0.25)}
    assert ids == {f"Ada-{n}" for n in range(3)} | {f"Ada {n}" for n in range(6)}
    assert Path(begun.detail).stat().st_mode & 0o777 == 0o600
    assert updates.next_ends("released") == "Carl"
    assert updates.next_ends("released") is None
    updates.choose(6, 7)
    assert updates.next_ends("released") is None
    updates.choose(8)
    assert updates.next_ends("released") == "Ada"
    assert [
        one.update.partition(",")[0] for one in collected_users(updates.run, updates.ledger, trained_ids(updates.run))
    ] == ["released"] * 2


@pytest.mark.parametrize(("status", "cause"), [("held_back", "safety"), ("skipped", "few"), ("failed", "fault")])
def test_an_adapter_that_is_not_released_is_noted_with_its_cause(updates, status, cause):
    updates.choose(0, 1, 2)
    updates.next_ends(status)
    assert updates.steps() == [("begun", ""), ("not_released", cause)]
    assert updates.next_ends(status) is None  # not again with the same pairs
    [user] = collected_users(updates.run, updates.ledger, trained_ids(updates.run))
    assert user.update.startswith(f"not released: {cause}, 20")


def test_a_fault_is_logged_and_tried_again_only_with_as_many_new_choices(updates):
    updates.choose(0, 1, 2)
    assert updates.next_ends("fault") == "Ada"
    assert updates.steps() == [("begun", ""), ("failed", "fault")]
    assert any("exited with 1 for 'Ada': left" in line for line in updates.log)
    updates.choose(3, 4)
    assert updates.next_ends("fault") is None
    updates.choose(5)
    assert updates.next_ends("released") == "Ada"
    assert updates.steps()[-1] == ("released", "")


def test_a_server_that_ends_stops_the_training_and_the_next_one_goes_on_with_it(updates):
    updates.choose(0, 1, 2)
    (updates.run / "state/mode").write_text("slow")
    with updates.updates.going_on():
        wait_for((updates.run / "state/under way").exists)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert updates.steps() == [("begun", "")]
    [begun] = updates.ledger.updates("Ada")
    updates.choose(3)
    updates.restart()
    assert updates.next_ends("released") == "Ada"
    assert updates.steps() == [("begun", ""), ("released", "")]
    assert [file.name for file in (updates.run / UPDATES).iterdir()] == [Path(begun.detail).name]


@pytest.mark.parametrize("way", ["page", "forgotten", "forget"])
def test_the_training_of_a_user_who_leaves_is_stopped_and_removed(updates, way):
    updates.choose(0, 1, 2)
    (updates.run / "state/mode").write_text("slow")
    with updates.updates.going_on():
        wait_for((updates.run / "state/under way").exists)
        [begun] = updates.ledger.updates("Ada")
        if way == "page":
            updates.ledger.erase(DataSubject(pseudonym("Ada")))
        elif way == "forgotten":
            (updates.run / "forgotten").mkdir()
            (updates.run / f"forgotten/{pseudonym('Ada')}.pending").write_text("{}")
        else:
            with without_update(updates.run, "Ada"):
                wait_for(lambda: not Path(begun.detail).exists())
                assert updates.updates.next_user() is None
        wait_for(lambda: not Path(begun.detail).exists())
        assert not RunDir(updates.run).addition.exists()
    assert not (updates.run / UPDATES / f"{pseudonym('Ada')}.stop").exists()


def test_one_server_trains_and_a_look_that_fails_ends_nothing(updates, monkeypatch):
    looks = []

    def next_user():
        looks.append(threading.current_thread().name)
        raise InputError([])

    monkeypatch.setattr(updates.updates, "next_user", next_user)
    with updates.updates.going_on():
        wait_for(lambda: looks)
        seen = len(looks)
        updates.updates.wake()
        wait_for(lambda: len(looks) > seen)
        other = BackgroundUpdates(updates.run, updates.config, updates.ledger, 3, updates.log.append)
        errors = []

        def start():
            try:
                with other.going_on():
                    pass
            except InputError as fault:
                errors.append(str(fault))

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert "`collect --update-after`" in errors[0]
    assert set(looks) == {"updates"}
    assert any("No update now" in line for line in updates.log)


def test_a_user_with_an_update_has_one_source_in_the_end(updates):
    updates.choose(0, 1, 2)
    updates.next_ends("released")
    assert json.loads((updates.run / "sources.json").read_text()) == [
        str(updates.run / UPDATES / f"{pseudonym('Ada')}-1.jsonl")
    ]
