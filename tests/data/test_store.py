"""What comes out of the store is what `read_pairs` reads, a few users at a time."""

from __future__ import annotations

import json
import random

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.store import PairStore, UserSelection, fingerprint_of


def row(user, n, **more):
    return {"user_id": user, "prompt": f"question {n} \U0001f600", "chosen": f"yes {n}", "rejected": "no", **more}


@pytest.fixture
def file(tmp_path):
    """Seven users whose rows lie scattered, some with a split, a weight, a date or a conversation."""
    source = random.Random(3)
    rows = [row(f"user {n % 7}/\x00é", n) for n in range(120)]
    for n, one in enumerate(rows):
        one |= [{}, {"split": "heldout"}, {"weight": 0.1, "id": n}, {"created_at": "2026-01-02", "source": "s"}][n % 4]
        one |= {"clean_choice": n % 3 == 0} if n % 5 else {"prompt": [{"role": "user", "content": f"p {n // 20}"}]}
    source.shuffle(rows)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def test_users_come_out_whole_and_in_order(file):
    pairs = read_pairs(file, 0.25)
    store = PairStore(file, 0.25)
    users = list(dict.fromkeys(pair.user_id for pair in pairs))
    assert (len(store), store.users) == (120, 7)
    assert store.of(range(7)) == pairs
    for size in (1, 3):
        for start in range(0, 7, size):
            wanted = set(users[start : start + size])
            assert store.of(range(start, start + size)) == [pair for pair in pairs if pair.user_id in wanted]
    assert sorted(store, key=lambda pair: pair.line) == pairs
    assert {pair.split for pair in pairs} == {"train", "heldout"}


def test_its_fingerprint_is_of_what_the_rows_say(file, tmp_path):
    whole = file.read_text(encoding="utf-8")
    other = tmp_path / "other.jsonl"
    other.write_text(whole, encoding="utf-8")
    assert PairStore(other, 0.25).fingerprint == PairStore(file, 0.25).fingerprint
    for old, new in (("yes 7", "yes 07"), ('"weight": 0.1', '"weight": 0.2'), ('"heldout"', '"train"')):
        other.write_text(whole.replace(old, new, 1), encoding="utf-8")
        assert PairStore(other, 0.25).fingerprint != PairStore(file, 0.25).fingerprint


def test_a_run_keeps_the_numbers_of_its_users(file, tmp_path):
    first = PairStore(file, 0.25)
    names = [user[0] for user in first.user_digests]
    assert names == [pseudonym(user) for user in dict.fromkeys(pair.user_id for pair in first.of(range(7)))]
    gone = (*first.user_digests[:2], None, *first.user_digests[3:])
    more = tmp_path / "more.jsonl"
    changed = next(pair.user_id for pair in first.of(range(4, 5)))
    more.write_text("".join(json.dumps(row(user, n)) + "\n" for n, user in enumerate(["new", changed, "new"])))
    later = PairStore(file, 0.25, UserSelection(gone, frozenset({names[2], names[6]}), (str(more),)))
    assert (later.users, later.left_out) == (8, 2)
    assert [pair.chosen for pair in later.of(range(4, 5))] == ["yes 1"]  # the later file has all of the user's pairs
    assert [pair.user_id for pair in later.of(range(7, 8))] == ["new", "new"]
    assert later.of(range(2, 3)) == later.of(range(6, 7)) == []
    for number in (0, 1, 3, 5):
        assert later.of(range(number, number + 1)) == first.of(range(number, number + 1))
        assert later.user_digests[number] == first.user_digests[number]
    assert later.user_digests[4] != first.user_digests[4]
    assert len(later) == sum(1 for _ in later)
    assert later.fingerprint == fingerprint_of(later.user_digests) != first.fingerprint
    assert fingerprint_of(first.user_digests) == fingerprint_of((None, *first.user_digests, None))
    without = [user for user in later.user_digests if user is not None]
    assert fingerprint_of(without) == later.fingerprint


def test_bad_rows_are_all_counted_and_the_first_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(row("u", 1)) + "\nnonsense\n") * 200)
    with pytest.raises(InputError) as error:
        PairStore(path, 0.25)
    assert len(error.value.problems) == 51
    assert "and 150 more problems" in error.value.problems[-1].sentence


def test_a_file_of_a_folder_that_breaks_off_is_named(tmp_path):
    import gzip

    (tmp_path / "a.jsonl").write_text(json.dumps(row("u", 1)) + "\n")
    packed = gzip.compress("".join(json.dumps(row("v", n)) + "\n" for n in range(500)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"b\.jsonl\.gz:\d+: the file cannot be read from here on"):
        PairStore(tmp_path, 0.25)


def test_memory_does_not_hold_the_texts(tmp_path):
    """40 MB of texts cost a few MB."""
    import tracemalloc

    path = tmp_path / "pairs.jsonl"
    text = "word " * 1000
    with path.open("w") as lines:
        for n in range(4000):
            lines.write(json.dumps(row(f"u{n}", n, chosen=text, rejected=text + "!")) + "\n")
    tracemalloc.start()
    store = PairStore(path, 0.25)
    assert sum(1 for _ in store) == 4000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000
