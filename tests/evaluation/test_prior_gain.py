"""The gain over the prior: its test and its interval, by enumeration."""

from itertools import product
from random import Random

import pytest

from persona_rlhf.evaluation.metrics import PairScores, prompt_gains
from persona_rlhf.evaluation.prior_gain import heldout_gain, interval_of, left_out_gain
from persona_rlhf.models.adapted_model import RowScore

PROMPTS = [(1,), (1,), (2,), (3,)]


def scores(margins):
    return [PairScores(RowScore(margin, 3), RowScore(0.0, 3)) for margin in margins]


def test_a_prompt_is_one_unit_and_the_base_orders_half_of_its_pairs():
    base = scores([5.0, -1.0, 0.0, 2.0])
    adapted = scores([6.0, -2.0, 1.0, 1.0])  # reward margins 1, -1, 1, -1
    assert prompt_gains(PROMPTS, base, adapted) == [0.0, 0.5, -0.5]


def test_over_a_prior_adapter_only_pairs_that_it_orders_otherwise_count():
    base, adapted = scores([0.0] * 4), scores([1.0, 1.0, 1.0, -1.0])
    assert prompt_gains(PROMPTS, base, adapted, scores([-1.0, 1.0, 1.0, 1.0])) == [0.5, 0.0, -1.0]
    assert prompt_gains(PROMPTS, base, adapted, adapted) == [0.0, 0.0, 0.0]


def test_the_p_value_is_the_share_of_coin_flips_at_least_as_good():
    for gains in ([0.5] * 6 + [-0.5] * 2, [0.5, 0.0, -0.5], [0.5] * 5, [0.0]):
        votes = [gain for gain in gains if gain]
        better = sum(vote > 0 for vote in votes)
        flips = list(product((0, 1), repeat=len(votes)))
        expected = sum(sum(flip) >= better for flip in flips) / len(flips)
        gain = heldout_gain("base", gains)
        assert gain is not None
        assert gain.p_value == pytest.approx(expected)
        assert (gain.n, gain.gain) == (len(gains), pytest.approx(sum(gains) / len(gains)))
    assert heldout_gain("base", []) is None


def test_the_interval_covers_the_mean_at_95_percent():
    source, chance, missed = Random(0), 0.7, 0
    for _ in range(400):
        gains = [0.5 if source.random() < chance else -0.5 for _ in range(30)]
        low, high = interval_of(gains, "base")
        assert -0.5 <= low <= high <= 0.5
        missed += not low <= chance - 0.5 <= high
    assert missed <= 32  # P(Binomial(400, 0.05) > 32) = 0.005
    wide, narrow = (interval_of([0.5, -0.25, 0.5, 0.0] * n, "population") for n in (3, 30))
    assert wide[0] < narrow[0] < 0.1875 < narrow[1] < wide[1]


def test_the_sentence_names_the_pairs_their_prompts_and_the_test():
    assert str(left_out_gain([1.0, 0.0, 0.0], 0.25)).startswith("+0.33 (")
    assert str(left_out_gain([1.0, 0.0, 0.0], 0.25)).endswith("by the left-out pairs of 3 prompts, p = 0.25")
