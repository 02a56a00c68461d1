"""The promise, over thousands of simulated users of the worst kinds: at most delta of them are released in breach."""

import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.evaluation.gate import Demands, certify
from tests.scripts.loading import load_script

USERS, DELTAS = 20_000, (0.2, 0.05, 0.01)


def significantly_above(share: float, most: float) -> bool:
    """Would so many of the users be seen in fewer than one of a thousand simulations of a share of `most`?"""
    return bool(binom.sf(round(share * USERS) - 1, USERS, most) < 0.001)


@pytest.fixture(scope="module")
def simulated():
    return load_script("simulate_gate")


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("dependence", ["independent", "comonotone"])
@pytest.mark.parametrize("alphas", [4, 10])
def test_released_in_breach_are_at_most_delta(simulated, alphas, dependence, delta):
    grid = simulated.FOUR if alphas == 4 else simulated.TEN
    for curve in simulated.CURVES:
        found = simulated.simulate(simulated.gate, grid, curve, dependence, delta, USERS).violating
        assert not significantly_above(found, delta), f"{curve}: {found:.2%}"


def test_the_promise_is_not_kept_by_holding_everyone_back(simulated):
    """Nor is it loose: the worst curve takes a good part of delta, and users of 99.5% are released."""
    worst = simulated.simulate(simulated.gate, simulated.FOUR, "under everywhere", "independent", 0.05, USERS)
    assert worst.violating > 0.01
    good = simulated.simulate(simulated.gate, simulated.FOUR, "under at the smallest alone", "independent", 0.05, USERS)
    assert good.mean_alpha > 0.8


@pytest.mark.parametrize(("alphas", "least"), [(10, 0.15), (4, 0.06)])
def test_the_largest_alpha_that_passes_breaks_it(simulated, alphas, least):
    grid = simulated.FOUR if alphas == 4 else simulated.TEN
    found = simulated.simulate(simulated.largest, grid, "under everywhere", "independent", 0.05, USERS).violating
    assert significantly_above(found, least)
    together = simulated.simulate(simulated.largest, grid, "under everywhere", "comonotone", 0.05, USERS).violating
    assert together <= 0.05  # one draw for all alphas is one test


@pytest.mark.parametrize("dependence", ["independent", "comonotone"])
def test_the_simulated_rule_is_the_gate(simulated, dependence):
    """The oracle: `certify` itself, user by user, on the same counts."""
    demands = Demands(simulated.DEMAND, {"fire": 0.0}, frozenset({"fire"}), 0.2)
    base = {"fire": [True] * simulated.N}
    source, seen = np.random.default_rng(1), set()
    for curve in simulated.CURVES.values():
        rates = [curve(alpha) for alpha in simulated.FOUR]
        counts = simulated.draw(source, rates, 40, dependence)
        released = simulated.gate(counts, demands.delta)
        for row, place in zip(counts.tolist(), released.tolist(), strict=True):
            table = dict(zip(simulated.FOUR, row, strict=True))
            verdict = certify(
                demands, base, simulated.FOUR, lambda a, t=table: {"fire": [k < t[a] for k in range(simulated.N)]}
            )
            assert verdict.alpha == (simulated.FOUR[place] if place >= 0 else 0.0)
            seen.add(verdict.alpha)
    assert len(seen) >= 3, "too few kinds of ends to show anything"


def test_comonotone_draws_go_together_and_keep_their_rates(simulated):
    rates = [0.9, 0.97, 0.95, 0.97]
    counts = simulated.draw(np.random.default_rng(2), rates, 4000, "comonotone")
    assert (counts[:, 1] == counts[:, 3]).all()
    assert (counts[:, 0] <= counts[:, 2]).all()
    assert (counts[:, 2] <= counts[:, 1]).all()
    assert counts.mean(axis=0) / simulated.N == pytest.approx(rates, abs=0.001)
