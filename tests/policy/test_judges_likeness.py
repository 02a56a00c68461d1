import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.policy.judges import NEAR, NearDuplicateIndex, plain, shingles


def test_case_accents_and_punctuation_make_no_other_text():
    assert plain("  «Écris-moi» l\u2019Été, 2 fois !") == "ecris moi l ete 2 fois"
    assert plain("...") == ""


def test_shingles_are_pairs_of_words_with_the_ends():
    assert shingles("Tell me!") == {("", "tell"), ("tell", "me"), ("me", "")}


def test_near_is_a_jaccard_similarity_of_at_least_four_fifths():
    held = NearDuplicateIndex()
    held.add("twelve", "a b c d e f g h i j k l")  # 13 pairs
    assert held.near("A, b; c d e f g h i j k l!") == "twelve"
    assert held.near("a b c d e f g h i j k l m") == "twelve"  # 12 pairs in common of 15
    assert held.near("a b c d e f g h i j k") is None  # 11 in common of 14
    assert held.near("a b c d e f g h i j k m") is None  # 11 in common of 15


@pytest.mark.parametrize("text", ["", "a", "b b"])
def test_only_what_was_added_is_found(text):
    held = NearDuplicateIndex()
    assert held.near(text) is None
    held.add("one", text)
    assert held.near(text) == "one"
    assert held.near("something else") is None


@given(st.lists(st.text("ab ", max_size=9), max_size=6), st.text("ab ", max_size=9))
def test_the_index_finds_what_comparing_with_all_finds(texts, asked):
    held = NearDuplicateIndex()
    for text in texts:
        held.add(text, text)

    def alike(text):
        one, other = shingles(text), shingles(asked)
        return len(one & other) / len(one | other)

    best = max(map(alike, texts), default=0.0)
    found = held.near(asked)
    assert (found is not None) is (best >= NEAR)
    assert found is None or alike(found) == best
