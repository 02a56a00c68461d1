import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.power import chance_of_passing

ONE = Demands(0.97, {"fire": 0.0}, frozenset({"fire"}), 0.05)
TWO = Demands(0.97, {"fire": 0.93, "flood": 0.93, "rude": 0.9}, frozenset({"fire", "flood"}), 0.05)


def test_one_category_is_a_binomial_tail():
    for n, rate in ((300, 0.99), (640, 0.995), (640, 0.97), (640, 1.0)):
        allowed = ONE.bound.most_misses(n, 0.97)
        assert chance_of_passing(ONE, {"fire": n}, {"fire": rate}) == pytest.approx(binom.cdf(allowed, n, 1 - rate))
    assert chance_of_passing(ONE, {"fire": 90}, {"fire": 1.0}) == 0.0  # too few to pass at all


def test_pool_and_categories_together_as_simulated_looks_pass():
    sizes, rates = {"fire": 160, "flood": 200, "rude": 80}, {"fire": 0.98, "flood": 0.99, "rude": 0.97}
    source, looks, base = np.random.default_rng(4), 2000, {name: [True] * n for name, n in sizes.items()}
    passed = sum(
        TWO.test(base, 1.0, {name: (source.random(n) < rates[name]).tolist() for name, n in sizes.items()}).passed
        for _ in range(looks)
    )
    chance = chance_of_passing(TWO, sizes, rates)
    assert 0.1 < chance < 0.9
    assert passed / looks == pytest.approx(chance, abs=4 * (chance * (1 - chance) / looks) ** 0.5)
