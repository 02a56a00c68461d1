import pytest

from persona_rlhf.evaluation.metrics import (
    TONE,
    PairScores,
    is_toxic,
    perplexity,
    tone_drift,
    toxic_answers,
    untied_margins,
)
from persona_rlhf.models.scores import RowScore


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


def test_pairs_of_one_prompt_have_one_margin_their_mean():
    """Twenty pairs of a prompt that lean the same way would else be twenty votes."""
    none = RowScore(0.0, 1)
    raised = [-0.5] * 19 + [1.0, 2.0, 0.25, -0.25, 0.0]
    prompts = [(1,)] * 20 + [(2,), (3,), (3,), (4,)]
    adapted = [PairScores(RowScore(value, 1), none) for value in raised]
    assert untied_margins(prompts, [PairScores(none, none)] * 24, adapted) == pytest.approx([-8.5 / 20, 2.0])
