"""The planned bet: by hand, against the binomial test, against a brute-force sum, and by simulation."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.evaluation.statistics import (
    MissedUnits,
    PlannedBet,
    count_units,
    mean_lower_bound,
    share_bound,
    upper_bound,
)
from persona_rlhf.policy.bound import Bound

LEVEL = 0.025


def lower(shares, bound=Bound(LEVEL), demand=0.97, whole=False) -> float:  # noqa: B008 (a tuple)
    bet = PlannedBet.of(len(shares), bound, demand, whole)
    return bound.judge_adjusted_lower(bet.lower(bet.chance(shares)))


def passes(shares, level=LEVEL, error=0.0, demand=0.97, whole=False) -> bool:
    return lower(shares, Bound(level, error), demand, whole) >= demand


@pytest.mark.parametrize("whole", [True, False])
def test_a_clean_sheet_needs_as_many_clusters_as_the_binomial_test(whole):
    assert passes([1.0] * 122, whole=whole)
    assert not passes([1.0] * 121, whole=whole)
    assert mean_lower_bound([1.0] * 122, LEVEL) < 0.97  # five bets at once need 142


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(0, 20), st.sampled_from([0.05, LEVEL, 0.0137, 0.001]), st.floats(0.8, 0.99),
       st.sampled_from([0.0, 0.02]))  # fmt: skip
def test_clusters_missed_whole_pass_as_in_the_binomial_test(n, misses, level, demand, error):
    shares = [1.0] * max(0, n - misses) + [0.0] * min(n, misses)
    bound = Bound(level, error)
    assert passes(shares, level, error, demand, whole=True) == (misses <= bound.most_misses(n, demand))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), min_size=1, max_size=9), st.integers(0, 8))
def test_the_chance_of_at_most_k_zeros_is_that_of_all_roundings(shares, most):
    bet, exact = PlannedBet(len(shares), LEVEL, 0.5, most), 0.0
    for rounded in product((0, 1), repeat=len(shares)):
        if rounded.count(0) <= most:
            exact += prod(share if kept else 1 - share for share, kept in zip(shares, rounded, strict=True))
    assert bet.chance(shares) == pytest.approx(exact)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(130, 500))
def test_the_bound_rises_with_every_share_and_agrees_with_the_p_value(data, n):
    shares = [1.0] * n
    for _ in range(data.draw(st.integers(0, 12))):
        shares[data.draw(st.integers(0, n - 1))] = data.draw(st.floats(0, 1))
    bet = PlannedBet.of(n, Bound(LEVEL), 0.97)
    p_value = bet.p_value(bet.chance(shares))
    assert (p_value <= LEVEL) == passes(shares) or p_value == pytest.approx(LEVEL)
    assert lower([min(1.0, share + 0.1) for share in shares]) >= lower(shares) - 1e-9


def test_misses_scattered_over_clusters_pass_where_five_bets_do():
    """320 phrasings of two probes each: eight of 640 probes may be missed; five bets at once allow seven."""
    scattered = [0.5] * 8 + [1.0] * 312
    assert passes(scattered)
    assert mean_lower_bound(scattered, LEVEL) < 0.97


CLUSTERS = {
    "missed whole": lambda source, users, n: source.random((users, n)) >= 0.03 + 1e-9,
    "half of each": lambda source, users, n: 1 - (source.random((users, n)) < 0.06 + 1e-9) / 2,
    "a fifth of each": lambda source, users, n: 1 - (source.random((users, n)) < 0.15 + 1e-9) / 5,
    "beta": lambda source, users, n: source.beta(0.97 * 3, 0.03 * 3, (users, n)),
    "two kinds": lambda source, users, n: np.where(np.arange(n) % 2, 1.0, source.random((users, n)) >= 0.06 + 1e-9),
}


@pytest.mark.parametrize("kind", CLUSTERS)
@pytest.mark.parametrize(("n", "whole"), [(150, False), (320, False), (320, True)])
def test_just_under_the_demand_clusters_of_any_kind_pass_at_most_at_the_level(kind, n, whole):
    users, bet = 3000, PlannedBet.of(n, Bound(0.1), 0.97, whole)
    shares = CLUSTERS[kind](np.random.default_rng(n), users, n).astype(float)
    passed = sum(bet.p_value(bet.chance(row)) <= bet.level for row in shares.tolist())
    assert 1 - upper_bound(users - passed, users, 0.0005) <= 0.1, f"{passed} of {users}"


def test_clusters_drawn_without_replacement_pass_at_most_at_the_level():
    """A finite bank of 400 clusters, of which 200 are drawn; its own mean is just under the demand."""
    source, users, bet = np.random.default_rng(5), 3000, PlannedBet.of(200, Bound(0.1), 0.97)
    bank = np.array([0.0] * 6 + [0.5] * 12 + [0.99] * 2 + [1.0] * 380)
    assert bank.mean() < 0.97
    passed = 0
    for _ in range(users):
        drawn = source.permutation(bank)[:200].tolist()
        passed += bet.p_value(bet.chance(drawn)) <= bet.level
    assert 1 - upper_bound(users - passed, users, 0.0005) <= 0.1, f"{passed} of {users}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(100, 400))
def test_the_count_of_units_is_the_bet_on_their_shares_and_its_evidence_says_as_much(some, clean):
    units, bound = [*some, *[[True, True]] * clean], Bound(LEVEL, 0.05)
    count = count_units(units, units, bound, 0.97)
    shares = [sum(unit) / len(unit) for unit in units]
    assert count.mean == pytest.approx(sum(shares) / len(shares))
    assert count.base_mean == pytest.approx(count.mean)
    assert count.lower_bound == pytest.approx(lower(shares, bound))
    assert share_bound(count.clusters, count.largest, count.missed, bound, 0.97) == count.lower_bound
    assert sum(kind.missed * kind.units for kind in count.missed) == sum(unit.count(False) for unit in units)


@pytest.mark.parametrize("kind", [MissedUnits(1, 2, 4), MissedUnits(3, 2, 1), MissedUnits(1, 3, 1)])
def test_evidence_of_units_that_cannot_be_is_refused(kind):
    with pytest.raises(ValueError, match="among 3 units of at most 2 probes"):
        share_bound(3, 2, (kind,), Bound(LEVEL), 0.97)


def test_a_mean_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="needs a unit"):
        count_units([], [], Bound(LEVEL), 0.97)
