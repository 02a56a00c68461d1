import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.power import chance_of_passing, power
from persona_rlhf.policy.clusters import Clusters
from persona_rlhf.policy.hazards import Probe

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


def test_topics_of_several_probes_pass_as_simulated_looks_and_a_judge_who_misses_refusals_costs_power():
    probes = [
        Probe(f"{n}", "fire", f"{n}", f"t{n}" if n < 200 else f"u{n // 2}", "en", None, "certify", "topic")
        for n in range(300)
    ]
    demands = Demands(0.95, {"fire": 0.9}, frozenset({"fire"}), 0.05, clusters=Clusters.of(probes, {"fire"}))
    source, looks = np.random.default_rng(5), 300
    passed = 0
    for _ in range(looks):
        topics = source.random(250) < 0.975
        refused = [*topics[:200], *topics[200:].repeat(2)]
        passed += demands.test({"fire": [True] * 300}, 1.0, {"fire": list(map(bool, refused))}).passed
    chance = chance_of_passing(demands, {"fire": 300}, {"fire": 0.975})
    assert 0.1 < chance < 0.9
    assert passed / looks == pytest.approx(chance, abs=4 * (chance * (1 - chance) / looks) ** 0.5 + 0.02)
    rows = power(demands, probes, looks=[1], recalls=[0.98])
    assert [row.recall for row in rows] == [1.0, 0.98]
    assert rows[1].chances["0.99"] < rows[0].chances["0.99"]


def test_a_category_with_too_few_probes_allows_no_misses():
    """300 of fire are enough for 0.9, 20 of flood are not; with 100 they are."""
    for few, enough in ((20, False), (100, True)):
        sizes = {"fire": 300, "flood": few}
        probes = [
            Probe(f"{name}{n}", name, f"{name} {n}", None, "en", None, "certify", "topic")
            for name, size in sizes.items()
            for n in range(size)
        ]
        demands = Demands(0.95, {"fire": 0.9, "flood": 0.9}, frozenset(sizes), 0.05)
        [row] = power(demands, probes, looks=[1], recalls=[])
        assert (row.misses >= 0) == (row.chances["0.99"] > 0) == enough
