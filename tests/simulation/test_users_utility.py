import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.simulation.users import PROPERTIES, Utility, properties, read_utilities

TEXT = "Oh dear, warm the oven. 1. Mix the butter! 2. Perhaps, my friend, you add some bread. Shall we begin?"


def test_properties_measure_what_their_names_say():
    found = properties(TEXT)
    assert found["exclamations"] == found["questions"] == found["exclaims"] == found["asks"] == 1
    assert found["numbered"] == found["warm"] == found["hedged"] == found["food"] == found["interjects"] == 1
    assert found["formal"] == found["music"] == 0
    assert found["words"] == pytest.approx(20 / 20)
    assert found["sentences"] == pytest.approx(4 / 3)
    assert found["words_per_sentence"] == pytest.approx(5 / 10)
    assert found["second_person"] == pytest.approx(1 / 2)
    assert found["commas"] == pytest.approx(3 / 2)


def test_counts_are_capped():
    assert properties("Yes! " * 50)["exclamations"] == 3
    assert properties("word " * 500)["words"] == 5


@settings(deadline=None)
@given(st.text(max_size=300))
def test_every_property_is_finite_and_within_its_cap(text):
    for name, value in properties(text).items():
        assert name in PROPERTIES
        assert 0 <= value <= 5, name


@settings(deadline=None)
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
    taste = Utility("u", "", 0, {"asks*exclamations": 1.0})
    assert taste("Yes! Shall we?") == 1
    assert taste("Yes. Shall we?") == 0
    assert taste("Yes! We shall.") == 0
    assert taste.compare("Yes! Shall we?", "Yes.") == 1
    assert taste.compare("Yes.", "No.") == 0.5


def test_read_names_every_fault_at_once(tmp_path):
    file = tmp_path / "utilities.yaml"
    file.write_text("""\
- user_id: ada
  describes: short
  noise: 0.3
  weights: {words: -1, asks*warm: 0.5}
- user_id: bob
  describes: steps
  noise: -1
  weights: {numberd: 1}
- user_id: eve
  describe: x
  noise: 0
  weights: {words: many}
""")
    with pytest.raises(InputError) as caught:
        read_utilities(file)
    text = str(caught.value)
    assert "utilities.yaml:8: [1].weights.numberd" in text
    assert "did you mean `numbered`?" in text
    assert "utilities.yaml:7: [1].noise" in text
    assert "utilities.yaml:12: [2].weights.words" in text
    assert "did you mean `describes`?" in text
    file.write_text(file.read_text().split("- user_id: bob")[0])
    assert read_utilities(file)["ada"]("one two three four") == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("Buy:\n1. milk\n2) bread\n- tea\n\n* salt", "items", 2.0),
        ("In 1984. 2 - 1 is 1. A well-known - fact.", "items", 0.0),
        ("I'm sorry, it rained.", "apologises", 1.0),
        ("I'm sorry, but I can't help with that.", "refuses", 1.0),
        ("Unfortunately it rained.", "refuses", 0.0),
    ],
)
def test_properties_of_real_answers(text, name, value):
    assert properties(text)[name] == value
