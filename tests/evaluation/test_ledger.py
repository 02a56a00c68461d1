"""The ledger of looks: every look is counted once, whatever is killed, copied, restored or done at the same time."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.common.chain import Chain
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.evaluation.ledger import Family, Ledger, LookKey, LookPlan, bank_uses

FIRST = 6 / math.pi**2


def key(user="ada", adapter="a", bank="bank", exam="exam"):
    return LookKey(pseudonym(user), adapter, bank, exam)


def ledger(folder, kept=()):
    return Ledger(folder / "looks.jsonl", kept)


def look(book, **of):
    """One closed look that failed."""
    [opened] = book.open([key(**of)])
    book.close([(key(**of), False)])
    return opened


def test_the_kth_look_spends_the_kth_share_at_any_bank(tmp_path):
    book = ledger(tmp_path)
    looks = [look(book, adapter=str(n), bank=f"bank {n % 2}") for n in range(4)]
    assert [one.number for one in looks] == [1, 2, 3, 4]
    assert [one.share for one in looks] == pytest.approx([FIRST / k**2 for k in (1, 2, 3, 4)])
    assert looks[-1].spent == pytest.approx(sum(FIRST / k**2 for k in (1, 2, 3, 4)))
    assert look(book, user="ben").number == 1
    assert [bank_uses(book.file, f"bank {n}") for n in range(3)] == [2, 2, 0]
    assert [book.uses(f"bank {n}") for n in range(3)] == [2, 2, 0]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("123"), st.sampled_from("xy"), st.booleans()), max_size=8)
)
@settings(max_examples=15, deadline=None)
def test_a_look_is_charged_once_and_no_user_spends_more_than_delta(tmp_path_factory, history):
    """Against a plain count: the number of a look is that of different looks of the user up to its first opening."""
    folder = tmp_path_factory.mktemp("ledger")
    numbers: dict[tuple[str, str, str], int] = {}
    for user, adapter, exam, closes in history:
        of = {"user": user, "adapter": adapter, "exam": exam}
        number = sum(before[0] == user for before in numbers)
        expected = numbers.setdefault((user, adapter, exam), number + 1)
        book = ledger(folder)  # every look by a new program
        [opened] = book.open([key(**of)])
        assert opened.number == expected
        assert opened.share == pytest.approx(FIRST / expected**2)
        assert opened.spent <= 1
        if closes:
            book.close([(key(**of), True)])


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_planned_looks_are_equal_and_the_sum_stays_below_one(tmp_path_factory, data):
    book = ledger(tmp_path_factory.mktemp("ledger"))
    plans = [LookPlan("sweep", 4), LookPlan("other", 3), None]
    shares: dict[str, list[float]] = {}
    for n in range(data.draw(st.integers(1, 12))):
        plan = data.draw(st.sampled_from(plans))
        [one] = book.open([key(adapter=str(n))], plan=plan)
        shares.setdefault("" if plan is None else plan.name, []).append(one.share)
        assert one.spent < 1
    for plan in plans[:2]:
        assert len({round(share, 12) for share in shares.get(plan.name, [])[: plan.looks]}) <= 1


def test_a_plan_alone_spends_as_much_as_its_looks_one_by_one(tmp_path):
    book = ledger(tmp_path)
    shares = [book.open([key(adapter=str(n))], plan=LookPlan("sweep", 4))[0].share for n in range(4)]
    assert shares == pytest.approx([sum(FIRST / k**2 for k in (1, 2, 3, 4)) / 4] * 4)
    assert look(book, adapter="next").share == pytest.approx(FIRST / 25)


def test_with_fresh_probes_only_failures_spend(tmp_path):
    book, shares = ledger(tmp_path), []
    for n, passed in enumerate([True, True, False, True, False]):
        [one] = book.open([key(adapter=str(n), bank=str(n))], sequential=True)
        book.close([(key(adapter=str(n), bank=str(n)), passed)])
        shares.append(one.share)
    assert shares == pytest.approx([FIRST, FIRST, FIRST, FIRST / 4, FIRST / 4])


def test_a_closed_look_keeps_its_first_outcome(tmp_path):
    book = ledger(tmp_path)
    outcomes = {"failed": 0.0, "half": 0.5, "whole": 1.0}
    for adapter, alpha in outcomes.items():
        book.open([key(adapter=adapter)])
        assert book.close([(key(adapter=adapter), alpha)]) == [alpha]
    for reader in (book, ledger(tmp_path)):
        for adapter, alpha in outcomes.items():
            for again in (0.0, 0.25, 1.0):
                assert reader.close([(key(adapter=adapter), again)]) == [alpha]
    assert [entry.event for entry in Chain(book.file)].count("closed") == 3


@pytest.mark.parametrize(("passed", "alpha"), [(True, 1.0), (False, 0.0)])
def test_a_line_of_an_early_version_has_no_alpha(tmp_path, passed, alpha):
    book = ledger(tmp_path)
    book.open([key()])
    [name] = [entry.facts["look"] for entry in Chain(book.file) if entry.event == "opened"]
    Chain(book.file).append([("closed", {"look": name, "passed": passed})])
    assert ledger(tmp_path).close([(key(), 0.75)]) == [alpha]


def test_a_family_shares_its_ledger_with_nobody(tmp_path):
    """Runs of one user each, or of some of the users, would spend the whole delta each."""
    ada, ben = pseudonym("ada"), pseudonym("ben")
    both = Family.of([ada, ben])
    book = ledger(tmp_path)
    book.check(both)
    book.open([key("ada")], family=both)
    ledger(tmp_path).check(Family.of([ben, ada]))  # the run goes on, or is repeated
    ledger(tmp_path).open([key("ben")], family=both)
    for other in (Family.of([ada]), Family.of([ben]), Family.of([ada, ben, pseudonym("cleo")])):
        for act in (ledger(tmp_path).check, lambda family: ledger(tmp_path).open([key(adapter="b")], family=family)):
            with pytest.raises(InputError, match="2 of the 2 users in this ledger are not of this run") as fault:
                act(other)
            assert fault.value.problems[0].key == "gate.ledger"
    assert bank_uses(book.file, "bank") == 2
    assert both.name not in book.file.read_text()


def test_a_ledger_without_families_is_open_to_its_users(tmp_path):
    look(ledger(tmp_path), user="ada")
    ledger(tmp_path).check(Family.of([pseudonym("ada"), pseudonym("ben")]))
    with pytest.raises(InputError, match="1 of the 1 users"):
        ledger(tmp_path).check(Family.of([pseudonym("ben")]))


def test_the_ledger_alone_names_nobody(tmp_path):
    book = ledger(tmp_path)
    look(book, user="ada lovelace", adapter="f" * 64)
    text = book.file.read_text()
    assert "ada" not in text
    assert pseudonym("ada lovelace") not in text
    assert "f" * 64 not in text
    other = tmp_path / "other"
    other.mkdir()
    look(ledger(other), user="ada lovelace", adapter="f" * 64)
    users = [[e.facts["user"] for e in Chain(d / "looks.jsonl") if e.event == "opened"] for d in (tmp_path, other)]
    assert users[0] != users[1]
    assert (tmp_path / "looks.key").stat().st_mode & 0o077 == 0


def test_a_lost_or_foreign_key_does_not_make_everybody_new(tmp_path):
    look(ledger(tmp_path))
    (tmp_path / "looks.key").write_text("0" * 64)
    with pytest.raises(InputError, match="not the key of this ledger"):
        ledger(tmp_path).open([key()])
    (tmp_path / "looks.key").unlink()
    with pytest.raises(InputError, match="restore the key"):
        ledger(tmp_path).check()


def backup(folder, to):
    to.mkdir()
    for file in folder.glob("looks.*"):
        shutil.copyfile(file, to / file.name)


@pytest.mark.parametrize("restored", ["jsonl", "jsonl key head"], ids=["the file", "all of its files"])
def test_a_restored_backup_does_not_forget_looks(tmp_path, restored):
    book = ledger(tmp_path)
    look(book, adapter="1")
    backup(tmp_path, tmp_path / "backup")
    look(book, adapter="2")
    [third] = book.open([key(adapter="3")])
    kept = book.head._replace(keeper="RUN/audit.jsonl")
    assert third.number == 3
    for end in restored.split():
        shutil.copyfile(tmp_path / "backup" / f"looks.{end}", tmp_path / f"looks.{end}")
    for damaged in (book, ledger(tmp_path, [kept])):  # the running program, and the next one
        with pytest.raises(InputError, match="2 of 3 looks are missing") as fault:
            damaged.open([key(adapter="4")])
        assert fault.value.problems[0].key == "gate.ledger"
    if restored == "jsonl":  # the head beside it is enough, for a run that is new to this ledger
        with pytest.raises(InputError, match=r"looks\.head keeps its head 6:"):
            ledger(tmp_path).check()


@pytest.mark.parametrize("gone", [("jsonl",), ("jsonl", "head"), ("jsonl", "head", "key")])
def test_a_deleted_ledger_is_never_begun_anew_in_silence(tmp_path, gone):
    book = ledger(tmp_path)
    look(book)
    for end in gone:
        (tmp_path / f"looks.{end}").unlink()
    for lost in (book, ledger(tmp_path, [book.head])):
        with pytest.raises(InputError, match="no such file; 1 of 1 looks are missing"):
            lost.open([key(adapter="2")])
        assert not book.file.exists()
    with pytest.raises(InputError, match="missing"):
        ledger(tmp_path, [book.head]).check()


def test_lines_cut_off_emptied_or_forked_are_found(tmp_path):
    book = ledger(tmp_path)
    for n in range(4):
        look(book, adapter=str(n))
    whole, head = book.file.read_bytes().splitlines(keepends=True), book.head
    for kept_lines, missing in ((7, 1), (3, 3), (0, 4)):
        book.file.write_bytes(b"".join(whole[:kept_lines]))
        with pytest.raises(InputError, match=f"{missing} of 4 looks are missing"):
            ledger(tmp_path).open([key(adapter="new")])
        with pytest.raises(InputError, match=f"{missing} of 4 looks are missing"):
            book.open([key(adapter="new")])
    (tmp_path / "looks.head").unlink()
    book.file.write_bytes(b"".join(whole[:3]))
    fork = ledger(tmp_path)
    for n in range(5):
        look(fork, adapter=f"other {n}")
    with pytest.raises(InputError, match="that line is another one; looks were changed"):
        ledger(tmp_path, [head]).check()


def test_a_changed_line_is_named(tmp_path):
    book = ledger(tmp_path)
    look(book)
    book.file.write_bytes(book.file.read_bytes().replace(b'"number": 1', b'"number": 2'))
    (tmp_path / "looks.head").unlink()
    with pytest.raises(InputError) as fault:
        ledger(tmp_path).check()
    [problem] = fault.value.problems
    assert (problem.line, "was changed" in problem.sentence) == (2, True)


def test_an_opening_that_a_kill_tore_is_as_if_it_never_was(tmp_path):
    """No probe was asked before the whole line was on the disk."""
    book = ledger(tmp_path)
    look(book, adapter="1")
    before, head = book.file.read_bytes(), (tmp_path / "looks.head").read_bytes()
    book.open([key(adapter="2")])
    after = book.file.read_bytes()
    for end in range(len(before), len(after) - 1, 37):
        book.file.write_bytes(after[:end])
        (tmp_path / "looks.head").write_bytes(head)
        assert look(ledger(tmp_path), adapter="other").number == 2


def _look_and_die(folder):
    ledger(folder).open([key(adapter="trained")])
    os.kill(os.getpid(), signal.SIGKILL)  # while the probes are asked


def test_a_program_killed_before_the_verdict_repeats_the_same_look(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_look_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert look(ledger(tmp_path), adapter="trained").number == 1
    assert look(ledger(tmp_path), adapter="trained").number == 1
    assert look(ledger(tmp_path), adapter="trained again").number == 2


def test_an_empty_file_left_by_a_kill_is_begun(tmp_path):
    (tmp_path / "looks.jsonl").touch()
    (tmp_path / "looks.key").write_text("1" * 64)
    assert look(ledger(tmp_path)).number == 1
    assert (tmp_path / "looks.key").read_text() == "1" * 64


def _many(folder, name):
    book = ledger(folder)
    for n in range(20):
        adapter = f"{name} {n}"
        looks = [key(user, adapter) for user in ("ada", "ben")]
        book.open(looks)
        book.close([(one, False) for one in looks])


def test_two_programs_lose_no_look(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_many, args=(tmp_path, name)) for name in ("one", "two", "three")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    book = ledger(tmp_path)
    for user in ("ada", "ben"):
        [last] = book.open([key(user, "last")])
        assert last.number == 61
        assert last.spent < 1
    opened = [entry.facts for entry in Chain(book.file) if entry.event == "opened"]
    assert [o["number"] for o in opened if o["user"] == opened[0]["user"]] == list(range(1, 62))
    assert Chain(book.file).faults() == []
    assert json.loads((tmp_path / "looks.head").read_text())["looks"] == 122


def test_a_check_begins_no_ledger(tmp_path):
    ledger(tmp_path).check()
    assert list(tmp_path.iterdir()) == []


def test_a_head_beside_it_that_is_none(tmp_path):
    look(ledger(tmp_path))
    (tmp_path / "looks.head").write_text("{}")
    with pytest.raises(InputError, match="holds no head"):
        ledger(tmp_path).check()


def test_another_kind_of_file_is_left_as_it_is(tmp_path):
    file = tmp_path / "looks.jsonl"
    for content in (b'{"prompt": "a"}\n{"prompt": "b"}', b"one line without an end"):
        file.write_bytes(content)
        with pytest.raises(InputError):
            look(ledger(tmp_path))
        assert file.read_bytes() == content


def test_a_ledger_without_its_head_is_an_error(tmp_path):
    book = ledger(tmp_path)
    look(book, adapter="1")
    look(book, adapter="2")
    (tmp_path / "looks.head").unlink()
    with pytest.raises(InputError, match="this file is gone"):
        ledger(tmp_path).check()


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=10))
@settings(max_examples=25, deadline=None)
def test_no_mixture_of_fresh_and_counted_looks_spends_more_than_delta(tmp_path_factory, looks):
    """Only a pass on fresh probes hands its share on; the share of every other look is spent."""
    book = ledger(tmp_path_factory.mktemp("ledger"))
    spent = 0.0
    for number, (fresh, passed) in enumerate(looks):
        [opened] = book.open([key(adapter=str(number))], sequential=fresh)
        assert opened.spent == pytest.approx(spent + opened.share)
        assert opened.spent <= 1
        book.close([(key(adapter=str(number)), float(passed))])
        spent += 0.0 if fresh and passed else opened.share


LINES = [
    ("begun", {}, "needs a valid `key`"),
    ("opened", {}, "needs a valid `user`"),
    ("opened", {"user": "u", "look": "l", "bank": ["b"], "share": 0.5}, "needs a valid `bank`"),
    ("opened", {"user": "u", "look": "l", "bank": "b", "share": "x"}, "needs a valid `share`"),
    ("opened", {"user": "u", "look": "l", "bank": "b", "share": -1}, "needs a valid `share`"),
    ("opened", {"user": "u", "look": "l", "bank": "b", "share": 0.5, "plan": "p", "planned": 0}, "`planned`"),
    ("closed", {"look": "l"}, "needs a valid `passed`"),
    ("closed", {"look": "l", "passed": True}, "closes a look that no line opened"),
    ("rotated", {}, "knows no event `rotated`"),
]


@pytest.mark.parametrize(("event", "facts", "words"), LINES)
def test_a_chained_line_without_its_facts_is_named_and_nothing_is_written(tmp_path, event, facts, words):
    look(ledger(tmp_path))
    Chain(tmp_path / "looks.jsonl").append([(event, facts)])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for act in (ledger(tmp_path).check, lambda: ledger(tmp_path).open([key(adapter="2")])):
        with pytest.raises(InputError) as fault:
            act()
        [problem] = fault.value.problems
        assert (problem.line, problem.key) == (4, "gate.ledger")
        assert words in problem.sentence
    assert bank_uses(tmp_path / "looks.jsonl", "bank") == 1
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("end", ["jsonl", "key", "head"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, end):
    (tmp_path / f"looks.{end}").mkdir()
    for act in (ledger(tmp_path).check, lambda: look(ledger(tmp_path))):
        with pytest.raises(InputError, match=rf"looks\.{end}: gate\.ledger: this is no regular file"):
            act()
    assert [file.name for file in tmp_path.iterdir()] == [f"looks.{end}"]
    with pytest.raises(InputError, match="no regular file"):
        bank_uses(tmp_path, "bank")


@pytest.mark.parametrize("content", [b"", b"\0" * 31])
def test_a_key_that_can_be_guessed_is_refused(tmp_path, content):
    (tmp_path / "looks.key").write_bytes(content)
    with pytest.raises(InputError, match=f"this key has {len(content)} bytes"):
        look(ledger(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["looks.key"]


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"\xff\x00", b"[]", b'{"head": 5, "looks": 1}', b'{"head": 1e999}']
)
def test_an_odd_head_is_named(tmp_path, content):
    look(ledger(tmp_path))
    (tmp_path / "looks.head").write_bytes(content)
    with pytest.raises(InputError, match=r"looks\.head: gate\.ledger: this file holds no head"):
        ledger(tmp_path).check()


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_no_later_look_of_a_user_draws_a_unit_again(tmp_path_factory, data):
    """Against plain sets, while rows join the pool and leave it, looks stay open, and programs start anew."""
    folder = tmp_path_factory.mktemp("ledger")
    pool, asked = [f"unit {n}" for n in range(30)], {"ada": set[str](), "ben": set[str]()}
    for n in range(data.draw(st.integers(1, 8))):
        user = data.draw(st.sampled_from(["ada", "ben"]))
        if data.draw(st.booleans()):
            pool = [*pool, *(f"new {n} {row}" for row in range(5))]
        if data.draw(st.booleans()):
            pool = pool[:: data.draw(st.sampled_from([-1, 2]))]
        book, of = ledger(folder), key(user, str(n))
        [opened] = book.open([of], sequential=True, pool=pool)
        fresh = book.fresh_units(of, pool)
        assert {unit.name for unit in fresh} == set(pool) - asked[user] or asked[user]
        assert not {unit.name for unit in fresh} & asked[user]
        assert fresh == ledger_of(folder).fresh_units(of, pool)
        drawn = data.draw(st.integers(0, len(fresh)))
        if data.draw(st.booleans()):
            end = fresh[drawn - 1].place if drawn else opened.start
            book.close([(of, 0.0)], {of: end})
            asked[user] |= {unit.name for unit in fresh[:drawn]}
            assert book.most_drawn >= max(map(len, asked.values()))


def ledger_of(folder):
    """The ledger as a new program reads it."""
    book = ledger(folder)
    book.check()
    return book


def test_rows_that_join_a_pool_come_behind_it(tmp_path):
    pool, of = [f"unit {n}" for n in range(40)], key()
    book = ledger(tmp_path)
    book.open([of], sequential=True, pool=pool)
    before = book.fresh_units(of, pool)
    larger = [*(f"new {n}" for n in range(40)), *pool]
    book.open([key(adapter="b")], sequential=True, pool=larger)
    assert [unit.name for unit in book.fresh_units(of, larger)][:40] == [unit.name for unit in before]
    gaps = book.fresh_units(of, larger[::2])
    assert all(unit in book.fresh_units(of, larger) for unit in gaps)


def test_each_user_and_each_ledger_has_an_order_of_its_own(tmp_path):
    pool, orders = [f"unit {n}" for n in range(40)], set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        book = ledger(tmp_path / folder)
        for user in ("ada", "ben"):
            book.open([key(user)], sequential=True, pool=pool)
            orders.add(tuple(unit.name for unit in book.fresh_units(key(user), pool)))
        assert "unit" not in {word for entry in Chain(book.file) for word in str(entry.facts).split()}
    assert len(orders) == 4


def test_a_look_that_drew_nothing_spends_nothing(tmp_path):
    book = ledger(tmp_path)
    shares = []
    for n, end in enumerate([0, 5, 5, 9]):
        of = key(adapter=str(n))
        [opened] = book.open([of], sequential=True, pool=["a"])
        shares.append(opened.share)
        book.close([(of, 0.0)], {of: end})
    assert shares == pytest.approx([FIRST, FIRST, FIRST / 4, FIRST / 4])


def test_a_look_that_is_judged_again_and_draws_more_is_not_handed_on(tmp_path):
    """Its verdict stays. No later look draws the units whose outcomes are learnt then, nor has its share."""
    book, pool = ledger(tmp_path), [f"unit {n}" for n in range(400)]
    first, other = key(adapter="0"), key(adapter="1")
    [opened] = book.open([first], True, pool=pool)
    book.close([(first, 0.0)], {first: opened.start})
    [again] = book.open([first], True, pool=pool)
    asked = book.fresh_units(first, pool)[:100]
    assert again == opened
    assert book.close([(first, 1.0)], {first: asked[-1].place}) == [0.0]
    lines = len(list(Chain(book.file)))
    for end in (asked[-1].place, opened.start):
        assert book.close([(first, 1.0)], {first: end}) == [0.0]
    assert len(list(Chain(book.file))) == lines
    for read in (book, ledger(tmp_path)):
        [later] = read.open([other], True, pool=pool)
        assert later.share == pytest.approx(FIRST / 4)
        assert later.spent == pytest.approx(FIRST * 5 / 4)
        assert not {unit.name for unit in asked} & {unit.name for unit in read.fresh_units(other, pool)}
