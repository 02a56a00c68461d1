from __future__ import annotations

import json
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check
from persona_rlhf.data.columns import UserSpellings, moment
from persona_rlhf.data.store import PairStore
from persona_rlhf.release.manifest import DataInfo
from tests.data.test_pairs import ROW, good, write


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-01T10:00:00Z", "2026-11-01"),
        ("20261103T100000", "2026-11-03"),
        ("20261103", "2026-11-03"),
        ("2026-W45-5", "2026-11-06"),
        ("2026W455T1000", "2026-11-06"),
        ("2026-11-06 23:30:00-05:00", "2026-11-06"),
    ],
)
def test_every_form_of_iso_8601_is_a_day(text: str, day: str) -> None:
    assert moment(text)[:10] == day
    assert moment(moment(text)) == moment(text)
    pairs = [good({**ROW, "created_at": at}) for at in ("2026-11-07T00:00:00", text, "2026-10-31")]
    assert DataInfo.of(pairs, 0)[2:4] == ("2026-10-31", "2026-11-07")
    assert DataInfo.of(pairs[1:2], 0)[2:4] == (day, day)


ALIKE = [("Jos\u00e9", "Jose\u0301"), ("ana", "ana "), ("a b", "a\u00a0 b"), ("ana", "a\u200bna"), ("ana", "\ufeffana")]


@pytest.mark.parametrize(("first", "second"), ALIKE)
def test_two_user_ids_that_print_alike_are_one_problem(tmp_path: Path, first: str, second: str) -> None:
    path = write(tmp_path / "p.jsonl", *[{**ROW, "user_id": user} for user in (first, second, first, second)])
    for reading in (lambda: PairStore(path, 0.25), lambda: check([path])):
        with pytest.raises(InputError) as error:
            reading()
        [problem] = error.value.problems
        assert (problem.line, problem.key) == (2, "user_id")
        assert problem.sentence.startswith(f"{second!a} prints alike with {first!a} at {path}:1")


def test_alike_ids_of_two_files_are_a_problem_and_different_ones_are_none(tmp_path: Path) -> None:
    for name, (user, _) in zip("ab", (ALIKE[1], ALIKE[1][::-1]), strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**ROW, "user_id": user}) + "\n")
    with pytest.raises(InputError, match="prints alike"):
        check([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    users = UserSpellings()
    assert not [user for user in ("Ann", "ann", "a b", "ab", "José", "Jose", "Ann") if users.problem(user, "f", 1)]
