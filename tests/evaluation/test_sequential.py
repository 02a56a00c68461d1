"""The sequential gate: its bound by brute force, its level by simulation, and its early stops."""

import math
from bisect import bisect_left
from itertools import product
from math import exp, prod
from random import Random

import numpy as np
import pytest
from scipy.stats import binom, hypergeom

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.gate import Demands, SideEffects
from persona_rlhf.evaluation.sequential import BATCH, certify_sequentially, check_units, units_drawn
from persona_rlhf.evaluation.statistics import SEQUENTIAL_BETS, SequentialBound, bettors_log_wealth, upper_bound
from persona_rlhf.policy.clusters import Clusters, ProbePlace

LEVEL = 0.02
DEMANDS = Demands(0.97, {"fire": 0.93}, frozenset({"fire"}), 2 * LEVEL, sequential=True)
BANK = {"fire": [True] * 900}


def no_effects(_alpha):
    return SideEffects([], None)


@pytest.mark.parametrize("n", [1, 6, 11])
def test_the_mean_wealth_over_all_outcomes_is_one(n):
    """The oracle, by brute force: every sequence of n units, each with its chance under the hypothesis."""
    rate, mean = 0.8, 0.0
    for outcomes in product((0, 1), repeat=n):
        chance = prod(rate if refused else 1 - rate for refused in outcomes)
        paths = [prod(1 - bet + bet * refused / rate for refused in outcomes) for bet in SEQUENTIAL_BETS]
        wealth = sum(paths) / len(paths)
        if wealth > 0:
            assert exp(bettors_log_wealth(sum(outcomes), n, rate)) == pytest.approx(wealth)
        mean += chance * wealth
    assert mean == pytest.approx(1.0)


def test_the_bound_is_where_the_wealth_reaches_one_over_the_level():
    bound = SequentialBound(LEVEL, 0.01)
    shown = bound.lower(995, 1000)
    assert exp(bettors_log_wealth(995, 1000, bound.required_judged_rate(shown))) == pytest.approx(1 / LEVEL, rel=1e-6)
    assert bound.p_value(995, 1000, shown) == pytest.approx(LEVEL, rel=1e-6)
    assert bound.lower(0, 10) == 0.0
    assert bound.lower(fewest := bound.fewest_trials(0.97), fewest) >= 0.97
    assert bound.most_misses(1000, 0.97) >= 4
    with pytest.raises(ValueError, match="successes among"):
        bound.lower(3, 2)


def test_whoever_looks_after_every_unit_passes_an_adapter_in_breach_at_most_at_the_level():
    source, users, most = np.random.default_rng(9), 4000, 1500
    refused = (source.random((users, most)) < 0.9699).cumsum(axis=1)
    n = np.arange(1, most + 1)
    logs = np.stack([
        refused * np.log(1 - bet + bet / 0.97) + (n - refused) * np.log(np.clip(1 - bet, 1e-300, None))
        for bet in SEQUENTIAL_BETS
    ])  # fmt: skip
    wealth = np.exp(np.logaddexp.reduce(logs, axis=0)) / len(SEQUENTIAL_BETS)
    ever = int((wealth >= 1 / 0.1).any(axis=1).sum())
    assert 1 - upper_bound(users - ever, users, 0.001) <= 0.1
    assert ever / users > 0.03, "too far from the level to show anything"


UNITS = DEMANDS.clusters.units_of(BANK)


def order(seed: int, units=UNITS):
    return Random(seed).sample(units, len(units))


def look(rates, seed: int, demands: Demands = DEMANDS, alphas=(0.5, 1.0)):
    """A look of an adapter that refuses each unit of the bank with a fixed outcome; returns the asked units, too."""
    source, asked = np.random.default_rng(seed), []
    tables = {alpha: (source.random(900) < rate).tolist() for alpha, rate in rates.items()}

    def refused(alpha, units):
        asked.append((alpha, len(units)))
        return [tables[alpha][unit.places[0]] for unit in units]

    verdict = certify_sequentially(demands, BANK, alphas, order(seed), refused, no_effects)
    return verdict, asked


def test_a_good_adapter_passes_early_and_a_bad_one_is_given_up_early():
    verdict, asked = look({1.0: 1.0}, 1)
    assert verdict.alpha == 1.0
    assert verdict.looks[0].pooled.n == 200  # a clean sheet of two batches
    assert sum(units for _, units in asked) == units_drawn(verdict) == 200
    verdict, asked = look({1.0: 0.5, 0.5: 0.999}, 2)
    assert verdict.alpha == 0.5
    assert not verdict.looks[0].passed
    given_up = sum(units for alpha, units in asked if alpha == 1.0)
    assert given_up < 300  # 900 units cannot show 0.97 any more
    assert units_drawn(verdict) == sum(units for alpha, units in asked if alpha == 0.5)
    verdict, _ = look({1.0: 0.9, 0.5: 0.9}, 3)
    assert not verdict.admitted
    assert units_drawn(verdict) < 900


def test_the_tests_of_a_look_ask_the_same_units_and_none_twice():
    asked: dict[float, list[int]] = {}

    def refused(alpha, units):
        asked.setdefault(alpha, []).extend(unit.places[0] for unit in units)
        return [alpha == 0.5] * len(units)

    certify_sequentially(DEMANDS, BANK, (0.5, 1.0), order(4), refused, no_effects)
    drawn = [unit.places[0] for unit in order(4)]
    assert asked[1.0] == drawn[: len(asked[1.0])]
    assert asked[0.5] == drawn[: len(asked[0.5])]


def chance_of_release(size: int, bound: SequentialBound, demand: float) -> tuple[float, float]:
    """The exact chance that an adapter just in breach over a finite pool is shown, and that with independent draws.

    By dynamic programming over the misses so far, batch by batch. `size`: the units of the pool.
    """
    misses = size - math.ceil(demand * size) + 1  # the fewest that are a breach
    counts = np.arange(misses + 1)
    before, after = counts[:, None], counts[None, :]
    chances = []
    for finite in (True, False):
        state, released = np.eye(1, misses + 1)[0], 0.0
        for drawn in range(0, size, BATCH):
            batch = min(BATCH, size - drawn)
            n = drawn + batch
            if finite:
                steps = hypergeom.pmf(after - before, size - drawn, misses - before, batch)
            else:
                steps = binom.pmf(after - before, batch, misses / size)
            state = state @ np.nan_to_num(steps)
            hidden = lambda missed: bound.p_value(n - missed, n, demand) > bound.level  # noqa: B023, E731
            shown = bisect_left(range(min(n, misses) + 1), True, key=hidden)
            released += state[:shown].sum()
            state[:shown] = 0.0
        chances.append(released)
    return chances[0], chances[1]


@pytest.mark.parametrize("level", [0.2, 0.05, 0.0137])
@pytest.mark.parametrize(("size", "demand"), [(150, 0.97), (300, 0.97), (700, 0.97), (1500, 0.97), (300, 0.8)])
def test_drawn_without_replacement_from_a_finite_pool_the_level_holds(size, demand, level):
    """Exactly, in every case. The proof is for independent draws, whose chance is the larger one."""
    finite, independent = chance_of_release(size, SequentialBound(level), demand)
    assert finite <= independent <= level


def test_the_exact_chance_is_large_enough_to_fail():
    assert chance_of_release(1500, SequentialBound(0.2), 0.97)[0] > 0.05


def test_adapters_in_breach_are_released_at_most_at_the_level():
    loose = Demands(0.97, {"fire": 0.1}, frozenset({"fire"}), 0.2, sequential=True)
    table = [n >= 28 for n in range(900)]  # 0.9689 of the bank: in breach, and the same at every look
    released, looks = 0, 150
    for number in range(looks):
        verdict = certify_sequentially(
            loose, BANK, (1.0,), order(number), lambda _, units: [table[unit.places[0]] for unit in units], no_effects
        )
        released += verdict.admitted
    assert 1 - upper_bound(looks - released, looks, 0.001) <= 0.1


def test_over_refusal_joins_each_test():
    demands = Demands(0.97, {"fire": 0.93}, frozenset({"fire"}), 0.04, max_over_refusal=0.05, sequential=True)
    refusing = SideEffects([True] * 100 + [False] * 200, None)
    verdict = certify_sequentially(
        demands, BANK, (1.0,), order(1), lambda _, units: [True] * len(units), lambda _: refusing
    )
    assert not verdict.admitted
    assert "harmless refused 100 of 300" in verdict.reason


def test_a_pool_that_is_too_small_or_used_up_is_named_and_nothing_is_asked():
    needed = DEMANDS.bound.fewest_trials(0.97)
    with pytest.raises(InputError) as fault:
        check_units(DEMANDS, {"fire": [True] * (needed - 1)})
    [problem] = fault.value.problems
    assert problem.key == "policy.private_banks"
    assert f"{needed - 1} fresh units of `pooled` are in the pool, and a look needs at least {needed}" in str(problem)
    check_units(DEMANDS, {"fire": [True] * needed})
    asked = []
    verdict = certify_sequentially(DEMANDS, BANK, (0.5, 1.0), UNITS[: needed - 1], asked.append, no_effects)
    assert (verdict.alpha, verdict.admitted, verdict.certified, verdict.looks) == (0, False, False, [])
    assert units_drawn(verdict) == 0
    assert f"the private pool is used up for this user: {needed - 1} fresh units" in verdict.reason
    assert asked == []


def test_what_cannot_be_drawn_or_shown_is_said():
    phrasings = Clusters({}, [[ProbePlace("fire", 0)]])
    with pytest.raises(InputError, match="split the banks by topic"):
        check_units(Demands(0.97, {"fire": 0.9}, frozenset({"fire"}), 0.05, clusters=phrasings, sequential=True), BANK)
    with pytest.raises(InputError, match=r"name its folder in policy\.private_banks"):
        check_units(DEMANDS, BANK, private=False)
    poor = {"fire": [n >= 25 for n in range(900)]}
    with pytest.raises(
        InputError, match=r"refuses 875 of the 900 units of the pool, and these do not show 0\.97"
    ) as caught:
        check_units(DEMANDS, poor)
    assert [problem.key for problem in caught.value.problems] == ["pooled"]
    check_units(DEMANDS, BANK)
