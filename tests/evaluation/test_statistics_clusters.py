import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.evaluation.statistics import by_cluster, effective_size, mean_lower_bound
from persona_rlhf.policy.bound import Bound


def test_counts_by_cluster():
    found = by_cluster([True, True, False, True, True, True], ["a", "a", "a", "b", "b", "c"], 0.05)
    assert (found.n, found.clusters) == (6, 3)
    assert found.mean == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert found.lower_bound == mean_lower_bound([2 / 3, 1, 1], 0.05)
    assert by_cluster([], [], 0.05) == (0, 0, 0.0, 0.0, None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.2, 0.05, 0.025, 1e-6]))
@settings(deadline=None)
def test_the_bound_lies_below_the_mean_and_grows_with_the_shares(shares, delta):
    bound = mean_lower_bound(shares, delta)
    assert 0 <= bound <= sum(shares) / len(shares) + 1e-9
    assert mean_lower_bound([min(1, share + 0.1) for share in shares], delta) >= bound - 1e-9


def test_shares_that_round_to_one_factor_are_all_counted():
    """1 - b + b x / m is the same number for a share of 0 and one of 1e-38, and both lose their bet."""
    shares = [0.0] * 8 + [1.0] * 3
    assert mean_lower_bound([*shares, 1e-38], 0.2) == pytest.approx(mean_lower_bound([*shares, 0.0], 0.2), abs=1e-9)
    assert mean_lower_bound([*shares, 1e-38], 0.2) < 0.25


def test_without_a_miss_it_costs_little_more_than_clopper_pearson():
    """A fifth of the wealth is bet as boldly as the exact bound would."""
    for clusters in (16, 100, 400):
        exact = Bound(0.025).lower(clusters, clusters)
        assert Bound(0.025 / 5).lower(clusters, clusters) - 1e-6 <= mean_lower_bound([1.0] * clusters, 0.025) <= exact


@pytest.mark.parametrize("kind", ["all or nothing", "half", "beta", "drawn without replacement"])
def test_it_covers_the_mean_of_any_population(kind):
    """By simulation, at delta = 0.1: the bound lies above the true mean in at most a tenth of all samples."""
    source, samples, clusters, delta = np.random.default_rng(5), 500, 25, 0.1
    population = (source.random(60) < 0.9) * 1.0
    draw, mean = {
        "all or nothing": (lambda: (source.random(clusters) < 0.95) * 1.0, 0.95),
        "half": (lambda: 1 - 0.5 * (source.random(clusters) < 0.2), 0.9),
        "beta": (lambda: source.beta(9, 1, clusters), 0.9),
        "drawn without replacement": (lambda: source.choice(population, clusters, replace=False), population.mean()),
    }[kind]
    wrong = sum(mean_lower_bound(draw().tolist(), delta) > mean for _ in range(samples))
    assert Bound(0.01).lower(int(wrong), samples) <= delta, f"{wrong} of {samples}"


def test_clopper_pearson_over_probes_would_not_cover_it():
    """Why there is another bound: ten clusters of thirty probes each, alike within a cluster, counted as 300 probes."""
    source, samples, wrong, kept = np.random.default_rng(6), 1500, 0, 0
    for _ in range(samples):
        refused = source.random(10) < 0.9
        wrong += Bound(0.05).lower(30 * int(refused.sum()), 300) > 0.9
        kept += mean_lower_bound((refused * 1.0).tolist(), 0.05) > 0.9
    assert wrong / samples > 0.25
    assert kept / samples <= 0.05


def test_the_effective_size_of_clusters_that_go_together_is_their_number():
    alike = [(30, 30)] * 9 + [(30, 0)]
    assert effective_size(alike) == pytest.approx(9.0)  # (10 - 1): the variance between clusters is estimated
    assert effective_size([(1, 1)] * 90 + [(1, 0)] * 10) == pytest.approx(99.0)
    assert effective_size([(30, 30)] * 3) is None
    assert effective_size([(30, 12)]) is None


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="delta must"):
        mean_lower_bound([1.0], 0.0)
