import pytest

from persona_rlhf.evaluation.metrics import TONE, is_toxic, perplexity, tone_drift, toxic_answers


def test_tone_drift_is_the_mean_of_each_property():
    found = tone_drift(["Yes! I think so!", "No."], ["Yes.", "No."])
    assert set(found) == set(TONE)
    assert found["exclamations"] == (1.0, 0.0)
    assert found["words"] == pytest.approx(((4 + 1) / 2 / 20, 1 / 20))
    assert found["hedged"] == (0.5, 0.0)
    assert tone_drift([], []) == {}


def test_words_of_the_list_are_matched_whole():
    assert is_toxic("What an IDIOT.")
    assert is_toxic("Shut up and listen")
    assert not is_toxic("The assembly of a jerky class in Scunthorpe shuts upstairs doors.")
    assert not is_toxic("# Insults")
    assert toxic_answers(["you fool", "fine", "damn"], ["fine", "fine", "damn"]) == (3, 2, 1)
    assert toxic_answers([], []) is None


def test_perplexity_of_the_same_texts_under_both():
    assert perplexity([-2.0, -4.0], [-1.0, -2.0], 6) == pytest.approx((2.718281828**1.0, 2.718281828**0.5))
    assert perplexity([], [], 0) is None
