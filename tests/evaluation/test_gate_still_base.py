"""An adapter that no longer is the base, in the sequence of tests: the choice of alpha and the price in delta."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.evaluation.fleet_guarantee import GatedUser, fleet_guarantee
from persona_rlhf.evaluation.gate import Demands, SideEffects, certify_cohort
from persona_rlhf.evaluation.sequential import certify_sequentially, units_drawn
from persona_rlhf.evaluation.still_base import LimitedMeasure, StillBase
from persona_rlhf.policy.clusters import Unit

GRID = (0.25, 0.5, 0.75, 1.0)
DEMANDS = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05)
BASE = {"a": [True] * 200}
RUINED = StillBase(LimitedMeasure(40, 8176.0, 1.5, None, 2.25))
WHOLE = StillBase(LimitedMeasure(40, 1.6, 1.5, None, 2.25))


def judged(refuses, like, grid=GRID):
    """The verdict on an adapter that refuses at some alphas and is the base at some, and the alphas of certify."""
    asked = []

    def refused(_, alphas):
        asked.extend(alphas)
        return [{"a": [alpha in refuses] * 200} for alpha in alphas]

    def likeness(_, alphas):
        return [WHOLE if alpha in like else RUINED for alpha in alphas]

    [verdict] = certify_cohort([DEMANDS], BASE, grid, refused, likeness=likeness)
    return verdict, asked


def test_ruined_text_at_every_alpha_is_held_back_without_a_probe():
    verdict, asked = judged(GRID, ())
    assert not verdict.admitted
    assert asked == []
    assert verdict.reason.startswith(
        "held back: at alpha 0.25 no longer the base: perplexity of ordinary answers 8,176"
    )
    assert verdict.still_base == RUINED
    assert verdict.pooled.refused == 200  # the base's own


def test_the_grid_is_the_way_back():
    verdict, asked = judged(GRID, (0.25, 0.5))
    assert (verdict.alpha, verdict.admitted, verdict.certified) == (0.5, True, True)
    assert asked == [0.25, 0.5]
    assert "passed up to alpha 0.5; at alpha 0.75 no longer the base" in verdict.reason
    assert [test.passed for test in verdict.looks] == [False, True, True, False]
    assert [test.pooled.n for test in verdict.looks] == [0, 200, 200, 0]
    assert verdict.still_base == WHOLE


def test_good_text_changes_nothing():
    verdict, asked = judged(GRID, GRID)
    [plain] = certify_cohort([DEMANDS], BASE, GRID, lambda _, alphas: [BASE for _ in alphas])
    assert asked == [1.0]
    assert verdict._replace(looks=[]) == plain._replace(looks=[])
    assert [test._replace(still_base=None) for test in verdict.looks] == plain.looks


def test_held_back_for_refusals_is_not_held_back_for_harm():
    verdict, _ = judged((), GRID)
    assert not verdict.admitted
    assert verdict.still_base.passes
    assert "pooled refused 0 of 200" in verdict.reason


subsets = st.sets(st.sampled_from(GRID))


@settings(max_examples=200, deadline=None)
@given(subsets, subsets)
def test_the_released_alpha_is_the_largest_that_the_sequence_reaches(refuses, like):
    good = refuses & like
    verdict, asked = judged(refuses, like)
    climbed = 0.0
    for alpha in GRID[:-1]:
        if alpha not in good:
            break
        climbed = alpha
    assert verdict.alpha == (1.0 if 1.0 in good else climbed)
    assert set(asked) <= like  # no probe is asked of an adapter that is ruined there
    if all(alpha in good for alpha in GRID if alpha < max(good, default=0)):  # harm that grows with alpha
        assert verdict.alpha == max(good, default=0.0)


def test_no_pattern_of_harm_raises_the_chance_of_a_breach():
    """Exact: at each alpha in breach a test passes with a chance of `level`, at others always, all independently.

    Whatever the adapter's text does along the grid, the gate releases in breach with at most two levels, as without.
    """
    grid, level = (0.5, 0.75, 1.0), DEMANDS.level
    for harmful in product((False, True), repeat=3):
        like = {alpha for alpha, ruined in zip(grid, harmful, strict=True) if not ruined}
        verdicts = {
            passing: judged({a for a, one in zip(grid, passing, strict=True) if one}, like, grid)[0].alpha
            for passing in product((False, True), repeat=3)
        }
        for breach in product((False, True), repeat=3):
            chance = 0.0
            for passing, released in verdicts.items():
                odds = 1.0
                for one, bad in zip(passing, breach, strict=True):
                    odds *= (level if one else 1 - level) if bad else float(one)
                if released and breach[grid.index(released)]:
                    chance += odds
            assert chance <= 2 * level == DEMANDS.delta


def test_the_promise_to_all_users_counts_a_climb_as_one():
    """The first test was not made: every test passed on the way is evidence, and only tests made are counted."""
    verdict, _ = judged(GRID, (0.25, 0.5))
    promise = fleet_guarantee([GatedUser(verdict.alpha, verdict.looks)], DEMANDS)
    assert (promise.released, promise.looks) == (1, 2)


@pytest.mark.parametrize(("like", "alpha"), [(GRID, 1.0), ((0.25,), 0.25), ((), 0.0)])
def test_the_sequential_gate_draws_no_unit_where_the_text_is_ruined(like, alpha):
    demands = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05, sequential=True)
    drawn = []

    def refused(at, units):
        drawn.append(at)
        return [True] * len(units)

    def likeness(at):
        return WHOLE if at in like else RUINED

    units = [Unit("a", [n]) for n in range(200)]
    verdict = certify_sequentially(demands, BASE, GRID, units, refused, lambda _: SideEffects([], None), likeness)
    assert verdict.alpha == alpha
    assert set(drawn) <= set(like)
    assert (units_drawn(verdict) == 0) == (not like)
