import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, norm

from persona_rlhf.evaluation.statistics import bootstrap, interval, interval_over_users, upper_bound, wilson


def oracle_lower(k: int, n: int, delta: float) -> float:
    return 0.0 if k == 0 else float(beta.ppf(delta, k, n - k + 1))


@settings(deadline=None)
@given(st.data(), st.integers(1, 1200), st.sampled_from([0.5, 0.05, 0.025, 0.05 / 54, 1e-6]))
def test_bounds_equal_scipys_beta_quantiles(data, n, delta):
    k = data.draw(st.integers(0, n))
    assert upper_bound(k, n, delta) == pytest.approx(1 - oracle_lower(n - k, n, delta), abs=1e-9)
    two = interval(k, n)
    assert two.low == pytest.approx(oracle_lower(k, n, 0.025), abs=1e-9)
    assert two.low <= k / n <= two.high


def test_nothing_counted_promises_nothing():
    assert interval(0, 0) == (0.0, 1.0)


def test_half_a_success_is_rounded_outward():
    assert interval(2.5, 10).low == interval(2, 10).low
    assert interval(2.5, 10).high == interval(3, 10).high


def test_bootstrap_is_seeded_and_covers():
    values = [math.sin(i) for i in range(40)]
    first, again, other = bootstrap(values), bootstrap(values), bootstrap(values, seed=1)
    assert first == again != other
    first = bootstrap(values, "median")
    assert first.low <= sorted(values)[20] <= first.high
    assert bootstrap([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="at least one user"):
        bootstrap([])


def test_fewer_than_eight_users_have_no_interval():
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert interval_over_users(values) == bootstrap(values)
    assert interval_over_users(values[:7]) is None
    assert interval_over_users([]) is None


@settings(deadline=None)
@given(st.data(), st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.95]))
def test_wilsons_interval_equals_its_formula(data, n, level):
    """Wilson 1927: the shares p whose score |k / n - p| / sqrt(p (1 - p) / n) is at most z."""
    k, z = data.draw(st.integers(0, n)), norm.ppf((1 + level) / 2)
    share, weight = k / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    low, high = wilson(k, n, level)
    assert low == pytest.approx(max(0, middle - half), rel=1e-12, abs=1e-15)
    assert high == pytest.approx(min(1, middle + half), rel=1e-12)


def test_wilson_of_nothing_and_of_nonsense():
    assert tuple(wilson(0, 0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes among 2"):
        wilson(3, 2)
