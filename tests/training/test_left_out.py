"""Predictions of a user's pairs from those of other prompts, and the test of "the user follows the population"."""

import pytest
import torch

from persona_rlhf.training.left_out import DRAWS, left_out
from persona_rlhf.training.reward_basis import Prior, approximate

PRIOR = Prior(torch.zeros(3, dtype=torch.float64), 0.4)


def pairs_of(n: int, seed: int, taste: float, direction: int = 0) -> torch.Tensor:
    """Differences of chosen less rejected answers of a user who weighs one direction by `taste`."""
    generator = torch.Generator().manual_seed(seed)
    differences = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    chances = torch.sigmoid(taste * differences[:, direction])
    labels = torch.rand(n, generator=generator, dtype=torch.float64) < chances
    return differences * (labels * 2.0 - 1)[:, None]


def test_each_prompt_is_predicted_from_the_others_alone():
    differences, prompts = pairs_of(9, 0, 2.0), [0, 0, 1, 2, 3, 3, 3, 4, 5]
    predicted = left_out(differences, prompts, PRIOR)
    assert len(predicted.gains) == 6
    for prompt, gain in enumerate(predicted.gains):
        there = torch.tensor([one == prompt for one in prompts])
        mean = approximate(differences[~there][None], PRIOR).mean[0]
        assert gain == pytest.approx(float((differences[there] @ mean).sign().mean()) / 2)


def test_over_a_prior_that_orders_pairs_only_other_orders_gain():
    leaning = PRIOR._replace(location=torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64), scale=0.01)
    assert set(left_out(pairs_of(12, 1, 9.0), range(12), leaning).gains) == {0.0}


def test_random_labels_are_called_a_taste_at_the_level_and_a_taste_is_called_one():
    random = [left_out(pairs_of(12, seed, 0.0), range(12), PRIOR, seed).p_value for seed in range(60)]
    assert sum(value <= 0.1 for value in random) <= 12  # P(Binomial(60, 0.1) > 12) = 0.006
    assert min(random) >= 1 / (DRAWS + 1)
    clear = [left_out(pairs_of(12, seed, 3.0), range(12), PRIOR, seed).p_value for seed in range(30)]
    assert sum(value <= 0.1 for value in clear) >= 20


@pytest.mark.parametrize(("mean", "taste"), [(5.0, 0.0), (2.0, 2.0), (2.0, 6.0)])
@pytest.mark.parametrize("scale", [0.05, 0.4])
def test_users_who_repeat_the_population_or_choose_by_coins_have_no_gain(scale, mean, taste):
    leaning = Prior(torch.tensor([mean, 0.0, 0.0], dtype=torch.float64), scale)
    values = [left_out(pairs_of(20, seed, taste), range(20), leaning, seed).p_value for seed in range(25)]
    assert sum(value <= 0.05 for value in values) <= 5  # P(Binomial(25, 0.05) > 5) = 0.001


def test_a_taste_that_the_population_lacks_is_a_gain_over_it():
    leaning = Prior(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), 0.4)
    values = [left_out(pairs_of(20, seed, 4.0, 1), range(20), leaning, seed).p_value for seed in range(20)]
    assert sum(value <= 0.05 for value in values) >= 14


def test_pairs_of_one_prompt_are_flipped_together():
    alike = torch.ones(8, 3, dtype=torch.float64)
    assert left_out(alike, [0] * 8, PRIOR).p_value > 0.9  # one coin: both of its sides fit alike
    assert left_out(alike, range(8), PRIOR).p_value <= 0.05


def test_no_pair_is_an_error():
    with pytest.raises(ValueError, match="no pair"):
        left_out(torch.zeros(0, 3, dtype=torch.float64), [], PRIOR)
