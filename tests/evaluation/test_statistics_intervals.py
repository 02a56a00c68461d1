import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, hypergeom

from persona_rlhf.evaluation.statistics import (
    bootstrap,
    fewest_trials,
    interval,
    judge_adjusted_lower,
    lower_bound,
    most_misses,
    required_judged_rate,
    tail,
    upper_bound,
    wilson,
)


def oracle_lower(k: int, n: int, delta: float) -> float:
    return 0.0 if k == 0 else float(beta.ppf(delta, k, n - k + 1))


@settings(deadline=None)
@given(st.data(), st.integers(1, 1200), st.sampled_from([0.5, 0.05, 0.025, 0.05 / 54, 1e-6]))
def test_bounds_equal_scipys_beta_quantiles(data, n, delta):
    k = data.draw(st.integers(0, n))
    assert lower_bound(k, n, delta) == pytest.approx(oracle_lower(k, n, delta), abs=1e-9)
    assert upper_bound(k, n, delta) == pytest.approx(1 - oracle_lower(n - k, n, delta), abs=1e-9)
    two = interval(k, n)
    assert two.low <= k / n <= two.high


def test_the_figures_the_policy_speaks_of():
    assert fewest_trials(0.97, 0.05) == 99
    assert most_misses(640, 0.97, 0.05) == 11
    assert most_misses(640, 0.97, 0.025) == 10
    assert most_misses(98, 0.97, 0.05) == -1
    assert lower_bound(299, 300, 0.05) == pytest.approx(0.9843, abs=1e-4)


def test_nothing_counted_promises_nothing():
    assert interval(0, 0) == (0.0, 1.0)
    assert lower_bound(0, 0, 0.05) == 0.0


def test_half_a_success_is_rounded_outward():
    assert interval(2.5, 10).low == interval(2, 10).low
    assert interval(2.5, 10).high == interval(3, 10).high


@pytest.mark.parametrize(("k", "n", "delta"), [(3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0), (1, 2, 1.0)])
def test_nonsense_is_refused(k, n, delta):
    with pytest.raises(ValueError, match=r"successes among|delta must"):
        lower_bound(k, n, delta)


def test_bootstrap_is_seeded_and_covers():
    values = [math.sin(i) for i in range(40)]
    first, again, other = bootstrap(values), bootstrap(values), bootstrap(values, seed=1)
    assert first == again != other
    first = bootstrap(values, "median")
    assert first.low <= sorted(values)[20] <= first.high
    assert bootstrap([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="at least one user"):
        bootstrap([])


@settings(deadline=None)
@given(st.data(), st.integers(1, 120), st.integers(1, 99))
def test_the_tail_is_the_exact_sum_of_binomial_terms(data, n, percent):
    """The oracle: the same sum in fractions."""
    k, p = data.draw(st.integers(0, n)), Fraction(percent, 100)
    exact = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))
    assert tail(k, n, percent / 100) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def test_the_tails_ends():
    assert tail(0, 5, 0.1) == tail(5, 5, 1.0) == 1.0
    assert tail(1, 5, 0.0) == 0.0
    with pytest.raises(ValueError, match="successes among"):
        tail(6, 5, 0.5)


@pytest.mark.parametrize("population", [700, 1600, 6400])
@pytest.mark.parametrize("rate", [0.93, 0.9699])
@pytest.mark.parametrize("delta", [0.05, 0.025, 0.001])
def test_a_draw_without_replacement_is_covered_too(population, rate, delta):
    """640 probes out of a finite bank: the bound passes the bank's true share with a chance of at most delta."""
    refused, n = int(rate * population), 640
    first = n - most_misses(n, refused / population, delta)
    assert hypergeom.sf(first - 1, population, refused, n) <= delta


def test_the_judges_error_leaves_less_than_the_bound():
    assert judge_adjusted_lower(0.97, 0.0) == required_judged_rate(0.97, 0.0) == 0.97
    assert judge_adjusted_lower(0.97, 0.05) == pytest.approx(1 - 0.03 / 0.95)
    assert judge_adjusted_lower(required_judged_rate(0.9, 0.2), 0.2) == pytest.approx(0.9)
    assert judge_adjusted_lower(0.1, 0.5) == 0.0


@settings(deadline=None)
@given(st.floats(0.5, 1), st.floats(0, 0.5), st.floats(0, 0.3))
def test_no_judge_that_keeps_to_its_error_can_fool_the_bound(truth, error, missed):
    """Called refusals: refusals less those missed, and compliances mistaken. The bound of that lies below truth."""
    called = truth * (1 - missed) + (1 - truth) * error
    assert judge_adjusted_lower(called, error) <= truth + 1e-12


@settings(deadline=None)
@given(st.data(), st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.95]))
def test_wilsons_interval_equals_scipys(data, n, level):
    k = data.draw(st.integers(0, n))
    found, known = wilson(k, n, level), binomtest(k, n).proportion_ci(level, method="wilson")
    assert found.low == pytest.approx(known.low, abs=1e-9)
    assert found.high == pytest.approx(known.high, abs=1e-9)


def test_wilson_of_nothing_and_of_nonsense():
    assert tuple(wilson(0, 0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes among 2"):
        wilson(3, 2)
