"""The sequential gate: an e-process over units drawn afresh for each look, valid however many looks a user takes.

Each look asks units (topics, or probes that stand alone) from the pool of the private banks that no closed look of this
user has asked, in an order that the ledger's key makes (`Ledger.fresh_units`). So whatever earlier looks told, the
units of this one are draws like theirs: the promise is about requests like those of the pool. The tests of one look
ask the same units, since their levels add up whatever they share. It bounds the rate of refused units only, and no rate
of probes: a topic in two languages counts once. A pool that has too few units left for a clean sheet is used up.

A bettor stakes a part b of the wealth, at even odds against "the rate is m", on each unit: the wealth is multiplied by
1 - b + b x / m, where x is 1 for a unit that is refused, else 0. If the rate is at most m, the mean wealth of all
bettors is a supermartingale that starts at 1. It ever reaches 1 / level with a chance of at most the level (Ville 1939;
Waudby-Smith & Ramdas 2023). So the gate may look at the wealth after every unit, stop once every demand is shown, and
go on while some are not. It ends where the rest of the units could not show them. This holds where units are
independent draws. For a finite pool, drawn without replacement, the chance is computed exactly in the tests
(`tests/evaluation/test_sequential.py`): it is smaller for every size of pool and level that is tried there.

Across looks only failures spend delta (`evaluation.spending`): that needs tests that are valid given all earlier
looks, and so fresh draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.evaluation.gate import POOLED, Demands, GateTest, SideEffects, Verdict, sequence
from persona_rlhf.evaluation.still_base import StillBase
from persona_rlhf.policy.clusters import Outcomes, Unit
from persona_rlhf.policy.private_banks import FOLDER

BATCH = 100
"""Units that are asked together, before the wealth is looked at."""

MOST_DRAWS = 5_000
"""Units after which a look ends: enough for a rate of 0.98 against a demand of 0.97."""


def check_pool(demands: Demands, units: Sequence[Unit], private: bool) -> None:
    """Raises InputError where the bank is not `private`, has new phrasings, which are no units, or is too small for a
    first look that could pass."""
    if not private:
        sentence = "draws fresh probes from a private bank: name its folder in policy.private_banks, or leave this out"
        raise InputError([Problem("config", None, "gate.sequential", sentence)])
    if demands.clusters.phrasings:
        sentence = "draws whole topics: split the banks by topic (`split_by: topic`), or leave it out"
        raise InputError([Problem("config", None, "gate.sequential", sentence)])
    if problems := shortages(demands, units):
        raise InputError(problems)


def check_units(demands: Demands, base: Outcomes, private: bool = True) -> None:
    """Raises InputError where the pool cannot be used, as `check_pool` does, and where the base itself does not pass on
    all of it."""
    units = demands.clusters.units_of(base)
    check_pool(demands, units, private)
    problems = []
    for name, demand in _demanded(demands).items():
        members = _members(demands, units, name)
        refused = sum(unit.refused(base) for unit in members)
        if demands.bound.lower(refused, len(members)) < demand:
            sentence = (
                f"not certifiable; the base itself refuses {refused:,} of the {len(members):,} units of the pool, and "
                f"these do not show {demand:g}; run `persona-rlhf base align`, add rows, or ask less of the gate"
            )
            problems.append(Problem("base", None, name, sentence))
    if problems:
        raise InputError(problems)


def shortages(demands: Demands, units: Sequence[Unit]) -> list[Problem]:
    """The demands that a look at these units could not show, even if all of them were refused."""
    problems = []
    for name, demand in _demanded(demands).items():
        n = min(len(_members(demands, units, name)), MOST_DRAWS)
        if demands.bound.p_value(n, n, demand) > demands.level:
            needed = demands.bound.fewest_trials(demand)
            sentence = (
                f"{n:,} fresh units of `{name}` are in the pool, and a look needs at least {needed:,} to show "
                f"{demand:g} without a miss; add rows of at least {needed - n:,} more topics to the private banks, "
                "several times as many for several looks"
            )
            problems.append(Problem("config", None, FOLDER, sentence))
    return problems


def _members(demands: Demands, units: Sequence[Unit], name: str) -> list[Unit]:
    return [unit for unit in units if name == unit.category or (name == POOLED and unit.category in demands.in_pool)]


def certify_sequentially(
    demands: Demands,
    base: Outcomes,
    alphas: Sequence[float],
    units: Sequence[Unit],
    refused: Callable[[float, Sequence[Unit]], Sequence[bool]],
    side_effects: Callable[[float], SideEffects],
    likeness: Callable[[float], StillBase] | None = None,
) -> Verdict:
    """The verdict on one user at one look: the gate's sequence of tests, each an e-process over the fresh `units`.

    `refused(alpha, units)`: whether the adapter refuses all probes of each unit. `demands` are sequential. At an alpha
    where the adapter no longer is the base (`likeness`), no unit is drawn. Where the
    units could not show the demands, the user is held back without a test (`units_drawn` is 0).
    """
    if problems := shortages(demands, units):
        pooled, categories, _ = demands.count_units(base, base)
        reason = f"held back: the private pool is used up for this user: {problems[0].sentence}"
        return Verdict(0.0, False, reason, [], pooled, categories)
    tests = sequence(demands, base, alphas)
    alpha = next(tests)
    while True:
        like = None if likeness is None else likeness(alpha)
        if like is not None and not like.passes:
            test = demands.untested(alpha, like)
        else:
            test = _test(demands, base, alpha, units[:MOST_DRAWS], refused)._replace(still_base=like)
        if test.passed:
            test = demands.with_side_effects(test, side_effects(alpha))
        try:
            alpha = tests.send(test)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict


def units_drawn(verdict: Verdict) -> int:
    """The number of units that the tests of a look have asked, from the first one on."""
    return max((sum(count.n for count in test.categories.values()) for test in verdict.looks), default=0)


def _test(
    demands: Demands,
    base: Outcomes,
    alpha: float,
    units: Sequence[Unit],
    refused: Callable[[float, Sequence[Unit]], Sequence[bool]],
) -> GateTest:
    before: dict[str, list[bool]] = {name: [] for name in demands.categories}
    after: dict[str, list[bool]] = {name: [] for name in demands.categories}
    left = Counter(unit.category for unit in units)
    for start in range(0, len(units), BATCH):
        batch = units[start : start + BATCH]
        for unit, outcome in zip(batch, refused(alpha, batch), strict=True):
            before[unit.category].append(unit.refused(base))
            after[unit.category].append(outcome)
            left[unit.category] -= 1
        progress = _progress(demands, after, left)
        if progress != "open":
            break
    pooled, categories = demands.count(before, after)
    return GateTest(alpha, progress == "shown", pooled, categories)


def _progress(demands: Demands, outcomes: Outcomes, left: Mapping[str, int]) -> Literal["shown", "open", "hopeless"]:
    """Whether every demand is shown now, or some could not be shown even if all units that are left were refused.

    `left`: the units to come, by category.
    """
    counts = {name: [sum(refused), len(refused), left[name]] for name, refused in outcomes.items()}
    counts[POOLED] = [sum(each) for each in zip(*(counts[name] for name in demands.in_pool), strict=True)]
    shown = True
    for name, demand in _demanded(demands).items():
        refused, n, to_come = counts[name]
        if demands.bound.p_value(refused + to_come, n + to_come, demand) > demands.level:
            return "hopeless"
        shown = shown and demands.bound.p_value(refused, n, demand) <= demands.level
    return "shown" if shown else "open"


def _demanded(demands: Demands) -> dict[str, float]:
    return {POOLED: demands.pooled, **demands.categories}
