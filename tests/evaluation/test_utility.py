import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.evaluation.utility import PROPERTIES, Utility, properties, read_utilities
from persona_rlhf.inputs.problems import InputError

TEXT = "First, warm the oven. 1. Mix the butter! 2. Don't worry, maybe add salt. Shall we begin?"


def test_properties_count_what_their_names_say():
    found = properties(TEXT)
    assert found["exclamations"] == 1 and found["questions"] == 1 and found["closing_question"] == 1
    assert found["numbered_steps"] == pytest.approx(2 / 3)
    assert found["words"] == pytest.approx(16 / 20 + 1 / 20)  # the two step numbers count as words
    assert found["sentences"] == pytest.approx(4 / 3)
    assert found["food"] == 3 and found["hedges"] == 1 and found["warm_words"] == 1


def test_markers_match_whole_words_only():
    assert properties("The chat was short.")["animals"] == 0
    assert properties("A CAT, a cat; cat-like.")["animals"] == 3


@given(st.text(max_size=300))
def test_every_property_is_finite_and_within_its_cap(text):
    for name, value in properties(text).items():
        assert 0 <= value <= PROPERTIES[name].cap, name


@given(st.text(max_size=80), st.text(max_size=80), st.floats(0, 2))
def test_chance_is_bradley_terry(first, second, noise):
    taste = Utility("u", "", noise, {"words": 1.0, "words*commas": -0.5})
    assert taste.chance(first, second) == pytest.approx(1 - taste.chance(second, first))
    if noise > 0.01:
        gap = taste(first) - taste(second)
        assert taste.chance(first, second) == pytest.approx(1 / (1 + math.exp(-gap / noise)), abs=1e-9)
    if taste.compare(first, second) == 1:
        assert taste.chance(first, second) > 0.5


def test_products_are_combinations():
    taste = Utility("u", "", 0, {"closing_question*exclamations": 1.0})
    assert taste("Yes! Shall we?") == 1 and taste("Yes. Shall we?") == 0 and taste("Yes! We shall.") == 0
    assert taste.compare("Yes! Shall we?", "Yes.") == 1 and taste.compare("Yes.", "No.") == 0.5


def test_read_names_every_fault_at_once(tmp_path):
    file = tmp_path / "utilities.yaml"
    file.write_text("""\
- user_id: ada
  describes: short
  noise: 0.3
  weights: {words: -1, closing_question*warm_words: 0.5}
- user_id: bob
  describes: steps
  noise: -1
  weights: {numberd_steps: 1}
- user_id: eve
  describe: x
  noise: 0
  weights: {words: many}
""")
    with pytest.raises(InputError) as caught:
        read_utilities(file)
    text = str(caught.value)
    assert "utilities.yaml:5: weights.numberd_steps" in text and "did you mean `numbered_steps`?" in text
    assert "utilities.yaml:5: noise" in text and "utilities.yaml:9: weights.words" in text
    assert "did you mean `describes`?" in text
    file.write_text(file.read_text().split("- user_id: bob")[0])
    assert read_utilities(file)["ada"]("one two three four") == pytest.approx(-0.2)
