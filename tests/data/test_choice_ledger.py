"""The ledger of choices: append-only, several writers, kill -9, and the deletion of a user down to the bytes."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import DiskFullError, pseudonym
from persona_rlhf.data.choice_ledger import CHOICES, Choice, ChoiceLedger, choice_traces
from persona_rlhf.data.erasure import DataSubject

CANARY = "CANARY \U0001f426"


def choice(number: object, user: str = "Ada", verdict: str = "left", **changes) -> Choice:
    texts = {"prompt": f"prompt {number}", "left": f"left {number}", "right": f"right {number}"}
    fixed = {"left_by": "base", "right_by": "a" * 64, "left_seed": 1, "right_seed": 2, "base": "b" * 64}
    rest = {"reason": "", "at": "2026-11-30T10:00:00Z", "seconds": 2.5, "consent": "own", "source": "collect"}
    line = {"id": f"{user} {number}", "user_id": user, "verdict": verdict, **texts, **fixed, **rest}
    return Choice(**line | changes)


def add(ledger: ChoiceLedger, line: Choice) -> bool:
    """Saves a choice of a user who consents."""
    if ledger.consent(line.user_id) is None:
        ledger.record_consent(line.user_id, "own")
    return ledger.append(line)


@pytest.fixture
def ledger(tmp_path):
    ledger = ChoiceLedger(tmp_path / "choices.db")
    yield ledger
    ledger.close()


def bytes_of(file: Path) -> bytes:
    """The database, its log and its index."""
    return b"".join(path.read_bytes() for path in sorted(file.parent.glob(f"{file.name}*")))


def test_a_choice_reads_back_as_it_was_saved(ledger):
    strange = choice(1, "\U0001f600" * 128, reason="a\0b\u202e<b>", prompt="x" * 100_000)
    assert add(ledger, strange)
    assert ledger.choices() == ledger.choices(strange.user_id) == [strange]
    assert ledger.choices("Ada") == []
    assert ledger.file.stat().st_mode & 0o777 == 0o600


def test_a_form_that_is_sent_twice_is_one_choice(ledger):
    assert add(ledger, choice(1))
    assert not add(ledger, choice(1, verdict="right"))
    assert [one.verdict for one in ledger.choices()] == ["left"]


def test_an_undone_choice_stays_in_the_file_and_counts_no_more(ledger):
    for number in (1, 2):
        add(ledger, choice(number))
    assert ledger.undo("Ada 1", "Bob") is None  # another user's
    assert ledger.undo("Ada 1", "Ada") == choice(1)
    assert ledger.undo("Ada 1", "Ada") is None
    assert not add(ledger, choice(1))  # its id is taken
    assert ledger.choices() == [choice(2)]
    assert ledger.ids() == {"Ada 1", "Ada 2"}
    assert ledger.has("Ada 1")
    [user] = ledger.users()
    assert (user.standing, user.preferred, user.undone) == (1, 1, 1)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE choices SET verdict = 'right'",
        "UPDATE undos SET at = ''",
        "UPDATE consents SET scope = 'shared'",
        "DELETE FROM choices",
        "DELETE FROM undos",
        "DELETE FROM consents",
        "DELETE FROM updates",
        "UPDATE updates SET adapter = 'x'",
        "INSERT OR REPLACE INTO choices SELECT * FROM choices",
        "REPLACE INTO undos SELECT 1, pseudonym, 'new', user_id, at FROM undos",
    ],
)
def test_lines_are_neither_changed_nor_removed(ledger, statement):
    add(ledger, choice(1))
    ledger.undo("Ada 1", "Ada")
    ledger.record_consent("Ada", "own")
    update = ledger.record_update("Ada", "begun", "base", 1, "more.jsonl")
    with sqlite3.connect(ledger.file) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement)
    other.close()
    assert ledger.ids() == {"Ada 1"}
    assert ledger.choices() == []
    assert ledger.consent("Ada") == "own"
    assert ledger.updates("Ada") == ledger.updates() == [update]


def test_a_ledger_of_the_format_before_gets_a_table_of_updates(tmp_path):
    file = tmp_path / "choices.db"
    earlier = ChoiceLedger(file)
    add(earlier, choice(1))
    earlier.close()
    with sqlite3.connect(file) as other:
        other.execute("DROP TABLE updates")
        other.execute("PRAGMA user_version = 1")
    other.close()
    for _ in range(2):
        ledger = ChoiceLedger(file)
        ledger.record_update("Ada", "released", "a" * 64)
        ledger.close()
    ledger = ChoiceLedger(file)
    assert ledger.choices() == [choice(1)]
    assert [one.event for one in ledger.updates("Ada")] == ["released", "released"]
    assert ledger.updates("Bob") == []
    ledger.close()


@pytest.mark.parametrize("wrong", [{"verdict": "middle"}, {"seconds": -1.0}, {"consent": "all"}])
def test_a_line_of_another_kind_is_refused(ledger, wrong):
    with pytest.raises(sqlite3.IntegrityError):
        add(ledger, choice(1, **wrong))
    assert ledger.choices() == []
    assert add(ledger, choice(2))  # the transaction before is over


def test_the_last_consent_counts(ledger):
    assert ledger.consent("Ada") is None
    for scope in ("own", "shared", "own"):
        ledger.record_consent("Ada", scope)
    assert ledger.consent("Ada") == "own"


def test_pairs_are_choices_with_a_preferred_answer_and_ties():
    tie = choice(1, verdict="tie")
    assert tie.preferred is None
    assert (tie.pair["chosen"], tie.pair["rejected"], tie.pair["tie"]) == ("left 1", "right 1", True)
    assert "place" not in tie.pair
    assert choice(1, verdict="both_bad").pair is None
    assert choice(1, right="left 1").pair is None
    pair = choice(1, verdict="right").pair
    assert choice(1, verdict="right").preferred == "right 1"
    assert "tie" not in pair
    assert (pair["chosen"], pair["rejected"], pair["place"]) == ("right 1", "left 1", "2/2")


@pytest.mark.parametrize("content", [b"no database" * 99, b'{"user_id": "Ada"}\n'])
def test_another_file_is_no_ledger(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(InputError, match="cannot be used as a ledger"):
        ChoiceLedger(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == content


def test_another_database_is_no_ledger(tmp_path):
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(InputError, match="no ledger of choices"):
        ChoiceLedger(tmp_path / "other.db")


def test_a_full_disk_is_named_and_the_ledger_goes_on(ledger):
    ledger._rows.execute("PRAGMA max_page_count = 20")
    with pytest.raises(DiskFullError):
        add(ledger, choice(1, prompt="x" * 1_000_000))
    ledger._rows.execute("PRAGMA max_page_count = 4000")
    assert add(ledger, choice(1))
    assert ledger.choices() == [choice(1)]


def test_nothing_of_a_user_is_left_in_the_bytes(tmp_path):
    file = tmp_path / CHOICES
    ledger, user = ChoiceLedger(file), DataSubject(pseudonym(CANARY))
    for number in range(40):
        for name in (CANARY, "Ada"):
            texts = {key: f"{name} {key} " * 50 for key in ("prompt", "left", "right", "reason")}
            add(ledger, choice(number, name, **texts))
    ledger.undo(f"{CANARY} 3", CANARY)
    ledger.record_update(CANARY, "begun", "base", 1, f"{CANARY}.jsonl")
    assert b"CANARY" in bytes_of(file)
    before = ledger.choices("Ada")
    [trace] = choice_traces(tmp_path, user)
    assert (trace.path, trace.what, trace.pieces) == (file, "choices", 43)
    trace.remove()  # while another connection is open
    assert b"CANARY" not in bytes_of(file)
    assert "\U0001f426".encode() not in bytes_of(file)
    assert list(choice_traces(tmp_path, user)) == []
    assert ledger.choices() == before
    ledger.close()


def test_a_deletion_waits_for_no_reader_and_is_finished_later(tmp_path, monkeypatch):
    monkeypatch.setattr("persona_rlhf.data.choice_ledger._BUSY_SECONDS", 0.1)
    file, user = tmp_path / CHOICES, DataSubject(pseudonym(CANARY))
    ledger = ChoiceLedger(file)
    add(ledger, choice(1, CANARY))
    reader = sqlite3.connect(file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM choices").fetchall()
    with pytest.raises(InputError, match="another program reads this ledger"):
        ledger.erase(user)
    assert ledger.choices() == []
    assert b"CANARY" in bytes_of(file)
    reader.close()
    [trace] = choice_traces(tmp_path, user)  # the rows are gone, and the deletion is not finished
    trace.remove()
    assert b"CANARY" not in bytes_of(file)
    assert list(choice_traces(tmp_path, user)) == []
    ledger.close()


def test_a_deletion_that_was_killed_is_finished_by_the_next(tmp_path):
    user, unfinished = DataSubject(pseudonym(CANARY)), 0
    for n in range(12):
        file = tmp_path / f"run{n}" / CHOICES
        ledger = ChoiceLedger(file)
        for number in range(30):
            add(ledger, choice(number, CANARY, prompt="CANARY" * 500))
            add(ledger, choice(number))
        ledger.close()
        if not (child := os.fork()):
            try:
                ledger = ChoiceLedger(file)
                ledger.erase(user)
            finally:
                os._exit(0)
        time.sleep(n * 0.002)
        kill(child)
        unfinished += sum(trace.pieces for trace in choice_traces(file.parents[1], user)) > 0
        for trace in choice_traces(file.parents[1], user):
            trace.remove()
        assert b"CANARY" not in bytes_of(file)
        ledger = ChoiceLedger(file)
        assert ledger.choices() == [choice(number) for number in range(30)]
        ledger.close()
    assert unfinished


def test_a_forgotten_user_is_refused(tmp_path):
    barred = set[str]()
    ledger = ChoiceLedger(tmp_path / "choices.db", lambda: barred)
    assert add(ledger, choice(1))
    barred.add(pseudonym("Ada"))
    with pytest.raises(InputError, match="this user was forgotten"):
        ledger.append(choice(2))
    assert add(ledger, choice(2, "ada"))
    ledger.close()


def test_a_choice_or_undo_that_a_deletion_overtook_is_not_saved(ledger):
    user = DataSubject(pseudonym("Ada"))
    add(ledger, choice(1))
    add(ledger, choice(1, "Bob"))
    earlier = ledger.choices("Ada")
    ledger.erase(user)
    with pytest.raises(InputError, match="no consent"):
        ledger.append(choice(2))
    ledger.choices = lambda *_: earlier  # read before the deletion
    with pytest.raises(InputError, match="no consent"):
        ledger.undo("Ada 1", "Ada")
    assert ledger.pieces(user) == 0
    assert ledger.append(choice(2, "Bob"))


def start(file: Path, name: str) -> int:
    """The id of a process that saves choices, and notes each one that is acknowledged, until it is killed."""
    if child := os.fork():
        return child
    try:
        ledger = ChoiceLedger(file)
        with (file.parent / f"{name}.txt").open("a") as acknowledged:
            for number in count():
                add(ledger, choice(number, name))
                acknowledged.write(f"{name} {number}\n")
                acknowledged.flush()
    except BaseException as fault:
        (file.parent / f"{name}.fault").write_text(repr(fault))
    finally:
        os._exit(1)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def kill_writers(file: Path, writers: int, kills: int, seed: int = 0) -> tuple[int, int]:
    """Writers at once, of which one at a time is killed (kill -9) and replaced; the acknowledged and saved choices."""
    draw, names = random.Random(seed), iter(f"writer{n}" for n in range(writers + kills))
    running = [start(file, next(names)) for _ in range(writers)]
    try:
        while len(list(file.parent.glob("*.txt"))) < writers:
            assert not list(file.parent.glob("*.fault"))
            time.sleep(0.01)
        for _ in range(kills):
            time.sleep(draw.uniform(0.005, 0.05))
            kill(running.pop(draw.randrange(writers)))
            running.append(start(file, next(names)))
        time.sleep(0.2)
    finally:
        for process in running:
            kill(process)
    assert not [one.read_text() for one in file.parent.glob("*.fault")]
    acknowledged = [line for one in file.parent.glob("*.txt") for line in one.read_text().splitlines(keepends=True)]
    acknowledged = [line.rstrip("\n") for line in acknowledged if line.endswith("\n")]
    ledger = ChoiceLedger(file)
    saved = ledger.choices()
    assert ledger._one("PRAGMA integrity_check") == "ok"
    assert set(acknowledged) <= {one.id for one in saved}
    assert set(Counter(one.id for one in saved).values()) == {1}
    assert all(one == choice(one.id.split()[1], one.user_id) for one in saved)  # none is torn
    assert len(saved) - len(acknowledged) <= writers + kills  # those that were killed before they were told
    ledger.close()
    return len(acknowledged), len(saved)


def test_nothing_acknowledged_is_lost_when_writers_are_killed(tmp_path):
    acknowledged, _ = kill_writers(tmp_path / "choices.db", writers=3, kills=4)
    assert acknowledged >= 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_writers_and_two_hundred_kills(tmp_path):
    print(kill_writers(tmp_path / "choices.db", writers=50, kills=200))
