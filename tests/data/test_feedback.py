from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check
from persona_rlhf.data.feedback import LEDGER, append_pair
from persona_rlhf.data.pairs import Message, read_pairs

ASKED = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "why\nnot \U0001f600"))


def test_what_is_added_is_read_as_users_are(tmp_path):
    for n in range(3):
        append_pair(tmp_path, "../../etc", ASKED, f"good {n}", "bad", "chat")
    pairs = read_pairs(tmp_path / LEDGER, 0.0)
    assert [(pair.user_id, pair.prompt, pair.chosen, pair.rejected, pair.source) for pair in pairs] == [
        ("../../etc", ASKED, f"good {n}", "bad", "chat") for n in range(3)
    ]
    assert all(pair.created_at for pair in pairs)
    check([tmp_path / LEDGER])


def test_what_a_killed_process_left_is_cut_off(tmp_path):
    append_pair(tmp_path, "ann", ASKED, "a", "b", "chat")
    whole = (tmp_path / LEDGER).read_bytes()
    for half in (whole[:-1], b'{"user_id', b"x" * 200_000):
        (tmp_path / LEDGER).write_bytes(whole + half)
        append_pair(tmp_path, "ann", ASKED, "c", "d", "chat")
        assert [pair.chosen for pair in read_pairs(tmp_path / LEDGER, 0.0)] == ["a", "c"]
    (tmp_path / LEDGER).write_bytes(b"half of the first")
    append_pair(tmp_path, "ann", ASKED, "c", "d", "chat")
    assert len(read_pairs(tmp_path / LEDGER, 0.0)) == 1


def test_many_at_once_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as people:
        list(people.map(lambda n: append_pair(tmp_path, f"u{n % 5}", ASKED, f"a{n}", "b" * n, "chat"), range(80)))
    assert {pair.chosen for pair in read_pairs(tmp_path / LEDGER, 0.0)} == {f"a{n}" for n in range(80)}


def test_half_a_character_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="surrogate"):
        append_pair(tmp_path, "ann", ASKED, "\ud83d", "b", "chat")
    assert not (tmp_path / LEDGER).exists()
