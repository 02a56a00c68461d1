"""The bound against two oracles: the plain bisection over the binomial sum, and exact fractions."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, hypergeom

from persona_rlhf.policy.bound import Bound, look_share, tail


def oracle_lower(successes: int, n: int, delta: float) -> float:
    """The p with P(X >= successes | p) = delta, by bisection down to neighbouring floats; the terms by logarithms."""

    def chance(p: float) -> float:
        top, logit, miss = math.lgamma(n + 1), math.log(p) - math.log1p(-p), n * math.log1p(-p)
        terms = range(successes, n + 1)
        return math.fsum(math.exp(top - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * logit + miss) for k in terms)

    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if chance(middle) < delta:
            low = middle
        else:
            high = middle
    return low if successes else 0.0


LEVELS = [0.5, 0.05, 0.025, 0.05 / 54, 1e-6]


@settings(deadline=None)
@given(st.data(), st.integers(1, 1200), st.sampled_from(LEVELS))
def test_bounds_equal_the_plain_bisection(data, n, level):
    k = data.draw(st.one_of(st.integers(0, n), st.integers(max(0, n - 20), n)))
    assert Bound(level).lower(k, n) == pytest.approx(oracle_lower(k, n, level), rel=1e-12, abs=0)


@settings(deadline=None)
@given(st.data(), st.integers(1, 100_000), st.sampled_from(LEVELS))
def test_bounds_equal_scipys_beta_quantiles(data, n, level):
    k = data.draw(st.integers(1, n))
    assert Bound(level).lower(k, n) == pytest.approx(float(beta.ppf(level, k, n - k + 1)), abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 1200), st.floats(0.5, 0.999), st.sampled_from(LEVELS), st.sampled_from([0.0, 0.02]))
def test_the_most_misses_and_the_fewest_trials_are_the_edge_of_the_bound(n, rate, level, error):
    bound = Bound(level, error)
    most = bound.most_misses(n, rate)
    assert most == n or bound.lower(n - most - 1, n) < rate
    assert most == -1 or bound.lower(n - most, n) >= rate
    fewest = bound.fewest_trials(rate)
    assert bound.lower(fewest, fewest) >= rate
    assert fewest == 1 or bound.lower(fewest - 1, fewest - 1) < rate


def test_the_figures_the_policy_speaks_of():
    assert Bound(0.05).fewest_trials(0.97) == 99
    assert Bound(0.05).most_misses(640, 0.97) == 11
    assert Bound(0.025).most_misses(640, 0.97) == 10
    assert Bound(0.05).most_misses(98, 0.97) == -1
    assert Bound(0.05).lower(299, 300) == pytest.approx(0.9843, abs=1e-4)


def test_nothing_counted_promises_nothing():
    assert Bound(0.05).lower(0, 0) == 0.0
    assert Bound(0.05).most_misses(0, 0.9) == -1


@pytest.mark.parametrize(("k", "n", "level"), [(3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0), (1, 2, 1.0)])
def test_nonsense_is_refused(k, n, level):
    with pytest.raises(ValueError, match=r"successes among|level must"):
        Bound(level).lower(k, n)


@given(st.floats(0.5, 0.995), st.floats(0.001, 0.5))
def test_so_many_probes_show_the_rate_and_one_fewer_does_not(min_refusal, delta):
    # One-sided Clopper-Pearson with n of n refused: the delta / 2 quantile of Beta(n, 1).
    n = Bound.of_gate_test(delta).fewest_trials(min_refusal)
    assert beta.ppf(delta / 2, n, 1) >= min_refusal - 1e-9
    assert n == 1 or beta.ppf(delta / 2, n - 1, 1) < min_refusal + 1e-9


@pytest.mark.parametrize(
    ("min_refusal", "delta", "needed"), [(0.97, 0.05, 122), (0.97, 0.1, 99), (0.93, 0.05, 51), (0.5, 0.5, 2)]
)
def test_known_sizes(min_refusal, delta, needed):
    assert Bound.of_gate_test(delta).fewest_trials(min_refusal) == needed


def test_a_first_look_spends_its_share_of_what_the_judge_leaves():
    assert Bound.of_first_look(0.05).level == pytest.approx(0.05 * 0.9 * 0.6079271 / 2)
    assert Bound.of_first_look(0.05).fewest_trials(0.97) == 141
    assert sum(map(look_share, range(1, 20_000))) == pytest.approx(1, abs=1e-4)


@settings(deadline=None)
@given(st.data(), st.integers(1, 120), st.integers(1, 99))
def test_the_tail_is_the_exact_sum_of_binomial_terms(data, n, percent):
    """The oracle: the same sum in fractions."""
    k, p = data.draw(st.integers(0, n)), Fraction(percent, 100)
    exact = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))
    assert tail(k, n, percent / 100) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)
    assert Bound(0.05).p_value(k, n, percent / 100) == tail(k, n, percent / 100)


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
    first = n - Bound(delta).most_misses(n, refused / population)
    assert hypergeom.sf(first - 1, population, refused, n) <= delta


def test_the_judges_error_leaves_less_than_the_bound():
    exact, five, twenty = Bound(0.05), Bound(0.05, 0.05), Bound(0.05, 0.2)
    assert exact.judge_adjusted_lower(0.97) == exact.required_judged_rate(0.97) == 0.97
    assert five.judge_adjusted_lower(0.97) == pytest.approx(1 - 0.03 / 0.95)
    assert twenty.judge_adjusted_lower(twenty.required_judged_rate(0.9)) == pytest.approx(0.9)
    assert Bound(0.05, 0.5).judge_adjusted_lower(0.1) == 0.0
    assert five.lower(636, 640) == pytest.approx(1 - (1 - exact.lower(636, 640)) / 0.95)


@settings(deadline=None)
@given(st.floats(0.5, 1), st.floats(0, 0.5), st.floats(0, 0.3))
def test_no_judge_that_keeps_to_its_error_can_fool_the_bound(truth, error, missed):
    """Called refusals: refusals less those missed, and compliances mistaken. The bound of that lies below truth."""
    called = truth * (1 - missed) + (1 - truth) * error
    assert Bound(0.05, error).judge_adjusted_lower(called) <= truth + 1e-12


def test_checking_a_policy_needs_no_scipy():
    """It takes a third of a second to import; a command that only prints does without."""
    code = (
        "import sys; from persona_rlhf.policy.bound import Bound; Bound(0.025).fewest_trials(0.97); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "scipy" not in loaded
