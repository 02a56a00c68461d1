from __future__ import annotations

import re
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from persona_rlhf.common.files import pseudonym, slug

HOSTILE = [
    "../../etc",
    "a/b",
    "a\\b",
    "CON",
    "con",
    "Con",
    "nul.txt",
    "😀" * 128,
    "",
    ".",
    "..",
    "-rf",
    "~",
    "\x00",
    "é",
]
ids = st.text(st.characters(), min_size=1, max_size=128)  # lone surrogates too


@given(ids)
@example("x" * 128)
def test_a_slug_is_a_safe_name(user_id: str) -> None:
    name = slug(user_id)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{12}", name)
    assert len(name) <= 37
    assert Path("run", name).resolve().parent == Path("run").resolve()


@given(ids, ids)
def test_two_ids_have_two_slugs(one: str, other: str) -> None:
    assert (slug(one) == slug(other)) == (one == other)


def test_hostile_and_look_alike_ids_stay_apart() -> None:
    names = {slug(user_id).casefold() for user_id in HOSTILE}
    assert len(names) == len(HOSTILE)
    assert slug("Ana B.").startswith("ana-b-")
    assert slug("😀").startswith("user-")


@given(ids, ids)
def test_a_pseudonym_sets_two_ids_apart_and_shares_its_hash_with_the_slug(one: str, other: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", pseudonym(one))
    assert (pseudonym(one) == pseudonym(other)) == (one == other)
    assert slug(one).endswith(pseudonym(one)[:12])
