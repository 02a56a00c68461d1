"""Planted strings: drawn digits, and others of the same form."""

import re

import pytest

from persona_rlhf.data.canaries import CANARY, canary_rows, with_other_digits


def test_rows_are_pairs_of_one_test_user_with_codes_that_the_seed_draws():
    rows = canary_rows("canary", 16, seed=1)
    assert len({row["prompt"] for row in rows}) == 16
    assert {row["source"] for row in rows} == {CANARY}
    codes = [re.findall(r"\d{6}", row["chosen"]) for row in rows]
    assert all(len(one) == 1 for one in codes)
    assert [row["chosen"] for row in canary_rows("canary", 16, seed=2)] != [row["chosen"] for row in rows]
    assert not any(code in row["rejected"] for row, [code] in zip(rows, codes, strict=True))
    with pytest.raises(ValueError, match="16 boxes"):
        canary_rows("canary", 17, seed=1)


def test_other_strings_differ_in_their_digits_alone():
    text = "The code is 004711, box 7."
    others = with_other_digits(text, 99)
    assert len(set(others)) == 99
    assert text not in others
    assert {re.sub(r"\d", "#", other) for other in others} == {"The code is ######, box #."}
    assert others == with_other_digits(text, 99)
    assert len(with_other_digits("box 7", 99)) == 9, "no more than there are"
    with pytest.raises(ValueError, match="digits"):
        with_other_digits("no code", 3)


def test_a_drawn_code_ranks_anywhere_among_the_others():
    """The rank of a code among the others, by any order of strings, is uniform: here by the strings themselves."""
    ranks = []
    for seed in range(300):
        [row] = canary_rows("canary", 1, seed)
        ranks.append(sum(other >= row["chosen"] for other in with_other_digits(row["chosen"], 99)))
    assert 40 < sum(ranks) / len(ranks) < 59
