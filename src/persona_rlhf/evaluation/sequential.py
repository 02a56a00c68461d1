"""The sequential gate: an e-process over units drawn afresh for each look, valid however many looks a user takes.

Each look draws units (topics, or probes that stand alone) from a private bank, with replacement, by a secret key: fresh
draws, whatever the looks before it told. So the promise is about the rate over the bank. Asking a unit again is free.
It bounds the rate of refused units only, and no rate of probes: a topic in two languages counts once.

A bettor stakes a part b of the wealth, at even odds against "the rate is m", on each unit: the wealth is multiplied by
1 - b + b x / m, where x is 1 for a unit that is refused, else 0. If the rate is at most m, the mean wealth of all
bettors is a supermartingale that starts at 1. It ever reaches 1 / level with a chance of at most the level (Ville 1939;
Waudby-Smith & Ramdas 2023). So the gate may look at the wealth after every unit, stop once every demand is shown, and
go on while some are not. It ends where the rest of the draws could not show them.

Across looks only failures spend delta (`evaluation.spending`): that needs tests that are valid given all earlier
looks, and so fresh draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.evaluation.gate import POOLED, Demands, GateTest, SideEffects, Verdict, sequence
from persona_rlhf.policy.clusters import Outcomes, Unit

BATCH = 100
"""Units that are asked together, before the wealth is looked at."""

MOST_DRAWS = 5_000
"""Draws after which a look ends: enough for a rate of 0.98 against a demand of 0.97."""


def check_units(demands: Demands, base: Outcomes, private: bool = True) -> None:
    """Raises InputError where the bank is not `private`, has new phrasings, which are no units, or the base's rate over
    it is too low."""
    if not private:
        sentence = "draws fresh probes from a private bank: name its folder in policy.private_banks, or leave this out"
        raise InputError([Problem("config", None, "gate.sequential", sentence)])
    if demands.clusters.phrasings:
        sentence = "draws whole topics: split the banks by topic (`split_by: topic`), or leave it out"
        raise InputError([Problem("config", None, "gate.sequential", sentence)])
    problems = []
    units = demands.clusters.units_of(base)
    for name, demand in _demanded(demands).items():
        members = [
            unit for unit in units if name == unit.category or (name == POOLED and unit.category in demands.in_pool)
        ]
        rate = sum(unit.refused(base) for unit in members) / len(members)
        if demands.bound.lower(int(rate * MOST_DRAWS), MOST_DRAWS) < demand:
            sentence = (
                f"not certifiable; the base itself refuses {rate:.3f} of the units of the bank, too few to show "
                f"{demand:g} in {MOST_DRAWS:,} draws; run `persona-rlhf base align`, or ask less of the gate"
            )
            problems.append(Problem("base", None, name, sentence))
    if problems:
        raise InputError(problems)


def certify_sequentially(
    demands: Demands,
    base: Outcomes,
    alphas: Sequence[float],
    source: Random,
    refused: Callable[[float, Sequence[Unit]], Sequence[bool]],
    side_effects: Callable[[float], SideEffects],
) -> Verdict:
    """The verdict on one user at one look: the gate's sequence of tests, each an e-process over fresh draws.

    `refused(alpha, units)`: whether the adapter refuses all probes of each unit. `demands` are sequential.
    """
    tests = sequence(demands, base, alphas)
    alpha = next(tests)
    while True:
        test = _test(demands, base, alpha, source, refused)
        if test.passed:
            test = demands.with_side_effects(test, side_effects(alpha))
        try:
            alpha = tests.send(test)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict


def _test(
    demands: Demands,
    base: Outcomes,
    alpha: float,
    source: Random,
    refused: Callable[[float, Sequence[Unit]], Sequence[bool]],
) -> GateTest:
    units, answers = demands.clusters.units_of(base), dict[int, bool]()
    before: dict[str, list[bool]] = {name: [] for name in demands.categories}
    after: dict[str, list[bool]] = {name: [] for name in demands.categories}
    of_base = [unit.refused(base) for unit in units]
    for drawn in range(BATCH, MOST_DRAWS + 1, BATCH):
        batch = [source.randrange(len(units)) for _ in range(BATCH)]
        new = [place for place in dict.fromkeys(batch) if place not in answers]
        answers |= zip(new, refused(alpha, [units[place] for place in new]), strict=True)
        for place in batch:
            before[units[place].category].append(of_base[place])
            after[units[place].category].append(answers[place])
        progress = _progress(demands, after, MOST_DRAWS / drawn - 1)
        if progress != "open":
            break
    pooled, categories = demands.count(before, after)
    return GateTest(alpha, progress == "shown", pooled, categories)


def _progress(demands: Demands, outcomes: Outcomes, left: float) -> Literal["shown", "open", "hopeless"]:
    """Whether every demand is shown now, or some could not be shown even if all draws that are left were refused.

    `left`: the draws to come, as a multiple of those so far.
    """
    counts = {name: (sum(refused), len(refused)) for name, refused in outcomes.items()}
    pool = [counts[name] for name in demands.in_pool]
    counts[POOLED] = (sum(refused for refused, _ in pool), sum(n for _, n in pool))
    shown = True
    for name, demand in _demanded(demands).items():
        refused, n = counts[name]
        to_come = BATCH + int(left * n)
        if demands.bound.p_value(refused + to_come, n + to_come, demand) > demands.level:
            return "hopeless"
        shown = shown and demands.bound.p_value(refused, n, demand) <= demands.level
    return "shown" if shown else "open"


def _demanded(demands: Demands) -> dict[str, float]:
    return {POOLED: demands.pooled, **demands.categories}
