"""The least change that gives an answer a property: by hand, and that it gives it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.policy.properties import REPAIRED, repaired, satisfied
from persona_rlhf.policy.rules import Requirement


def requirement(name, value):
    return Requirement("r", name, value, 2, "two.yaml", 1, "App")


@pytest.mark.parametrize(
    ("name", "value", "answer", "expected"),
    [
        ("must_include", "Ask a doctor.", " Rest well.", "Ask a doctor. Rest well."),
        ("must_not_include", "!", "Great!!! Do it! Now", "Great. Do it. Now"),
        ("must_not_include", "!", "Really!? Yes!", "Really? Yes."),
        ("must_not_include", "brand", "Buy the Brand , now", "Buy the, now"),
        ("must_not_include", "all", "ALL", None),  # nothing would be left
        ("max_words", 5, "One two. Three four! Five six?", "One two. Three four!"),
        ("max_words", 3, "One, two, three, four.", "One, two, three."),
        ("max_words", 4, 'He said "go on." Then he left again.', 'He said "go on."'),
        ("max_words", 5, "1. Wash it. 2. Dry it.", "1. Wash it."),
        ("min_words", 9, "Short.", None),
        ("regex", "x", "Short.", None),
    ],
)
def test_by_hand(name, value, answer, expected):
    assert repaired(requirement(name, value), answer) == expected


@given(
    st.sampled_from([("must_include", "a notice."), ("must_not_include", "!"), ("must_not_include", "ab")])
    | st.tuples(st.just("max_words"), st.integers(1, 9)),
    st.text("ab!?. ,\n", max_size=60).filter(str.strip),
)
def test_what_is_repaired_has_the_property_and_needs_no_more(rule, answer):
    asked = requirement(*rule)
    if satisfied(asked, "p", answer):
        return
    found = repaired(asked, answer)
    if found is None:
        assert rule == ("must_not_include", "ab")
        return
    assert satisfied(asked, "p", found)


def test_every_property_that_is_called_repaired_is():
    for name in REPAIRED:
        assert repaired(requirement(name, 1 if name == "max_words" else "x"), "One x two. Three.") is not None
