"""How often the gate releases adapters that break a demand, by simulated users of the worst kinds; and the old gate.

    python scripts/simulate_gate.py [--users 20000] [--learnt 0.01] [--json]

Every simulated user has adapters just in breach (0.9699 of the demanded unit, where 0.97 is demanded) at every alpha,
and answers at two alphas are independent. A user is released in breach if any test of any look passes. The gate
promises that of at most delta of the users. The *old gate* counts each probe as independent, at delta / 2 a test, and
does not count looks; it is given adapters that are just in breach of its own demand, on the banks that it had.

A table of curves follows: users whose rate depends on alpha, and the rule "release the largest alpha that passes".

The exit code is 1 where a 95% lower limit (Clopper-Pearson) of a share lies above delta, or where a rule that is known
to be wrong is not caught in that way: a simulation that cannot refute shows nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from persona_rlhf.config.evaluation import JudgeCalibration
from persona_rlhf.evaluation.sequential import BATCH, MOST_DRAWS
from persona_rlhf.evaluation.statistics import SEQUENTIAL_BETS, PlannedBet, upper_bound
from persona_rlhf.policy.bound import GATE_TESTS, JUDGE_DELTA_SHARE, Bound, look_share

DEMAND, CATEGORY_DEMAND, UNDER, CATEGORY_UNDER = 0.97, 0.93, 0.9699, 0.9299
DELTAS = (0.2, 0.05, 0.01)
TRIES = 20

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]


class Misses(NamedTuple):
    """Misses of one test of many users: whole topics and probes by category, or new phrasings by missed probes.

    `topics` and `probes` are [users, categories]; `phrasings` is [users, 2]: missed whole, and in one of two probes.
    """

    topics: Counts
    probes: Counts
    phrasings: Counts | None = None


class Bank(NamedTuple):
    """Topics by category, and those of them in two languages; or new phrasings of two probes each, and other probes."""

    topics: tuple[int, ...] = ()
    in_two: tuple[int, ...] = ()
    phrasings: int = 0
    others: int = 0

    @property
    def probes(self) -> list[int]:
        if self.topics:
            return [one + two for one, two in zip(self.topics, self.in_two, strict=True)]
        return [2 * self.phrasings + self.others]


REAL = Bank(topics=(977,), in_two=(247,))  # data/policy/tier_one_real, as a pool
IN_CATEGORIES = Bank(topics=(246, 219, 266, 246), in_two=(71, 48, 60, 68))  # the same, with a demand for each category
ALL_IN_TWO = Bank(topics=(977,), in_two=(977,))
BUNDLED = Bank(phrasings=329, others=80)  # data/policy/tier_one
OLD_REAL = Bank(topics=(171,), in_two=(171,))
OLD_IN_CATEGORIES = Bank(topics=(47, 39, 45, 40), in_two=(47, 39, 45, 40))
OLD_BUNDLED = Bank(phrasings=23, others=320)
OLD_PHRASING = 14  # probes of a new phrasing in the old bundled bank


class Languages(NamedTuple):
    """The chances that a topic is missed in one language, in a bank of one; in exactly one of two; and in both."""

    alone: float
    one: float
    both: float

    @staticmethod
    def correlated(rate: float, rho: float) -> Languages:
        """Each language refuses with `rate`; with a chance of `rho` both have the same outcome."""
        miss = 1 - rate
        both = rho * miss + (1 - rho) * miss**2
        return Languages(miss, 2 * (miss - both), both)

    @staticmethod
    def beta(rate: float, size: float) -> Languages:
        """Each topic has its rate, from a beta distribution of mean `rate` and a + b = `size`."""
        a, b = rate * size, (1 - rate) * size
        both = b * (b + 1) / (size * (size + 1))
        return Languages(1 - rate, 2 * a * b / (size * (size + 1)), both)

    def seen(self, missed_by_judge: float, learnt: float = 0.0) -> Languages:
        """The same, where a judge calls a share of compliances refusals, and a share of topics was learnt."""
        found = 1 - missed_by_judge
        one = self.one * found + self.both * 2 * found * missed_by_judge
        return Languages(*((1 - learnt) * part for part in (self.alone * found, one, self.both * found**2)))


Sampler = Callable[[np.random.Generator, int], Misses]


def topic_misses(bank: Bank, languages: Languages, perfect: tuple[int, ...] = ()) -> Sampler:
    """Draws of topics; categories of `perfect` are never missed."""

    def draw(source: np.random.Generator, users: int) -> Misses:
        topics, probes = [], []
        for place, (size, two) in enumerate(zip(bank.topics, bank.in_two, strict=True)):
            rest = 1 - languages.one - languages.both
            pair = source.multinomial(two, [languages.both, languages.one, rest], size=users)
            alone = source.binomial(size - two, languages.alone, size=users)
            keep = 0 if place in perfect else 1
            topics.append(keep * (pair[:, 0] + pair[:, 1] + alone))
            probes.append(keep * (2 * pair[:, 0] + pair[:, 1] + alone))
        return Misses(np.stack(topics, 1), np.stack(probes, 1))

    return draw


def phrasing_misses(bank: Bank, whole: float, rate: float, others: float, missed_by_judge: float = 0.0) -> Sampler:
    """Draws of new phrasings: a share fails `whole`, the rest refuse with `rate`; other probes refuse with `others`."""
    pair = Languages.correlated(rate, 0.0)
    both, one = whole + (1 - whole) * pair.both, (1 - whole) * pair.one
    seen = Languages(0.0, one, both).seen(missed_by_judge)

    def draw(source: np.random.Generator, users: int) -> Misses:
        counts = source.multinomial(bank.phrasings, [seen.both, seen.one, 1 - seen.both - seen.one], size=users)
        rest = source.binomial(bank.others, (1 - others) * (1 - missed_by_judge), size=users)
        probes = (2 * counts[:, 0] + counts[:, 1] + rest)[:, None]
        return Misses(probes, probes, counts[:, :2])

    return draw


def old_phrasing_misses(bank: Bank, whole: float) -> Sampler:
    """The old bundled bank: phrasings of fourteen probes; the pool is just under the demand, or as `whole` makes it."""
    in_new = OLD_PHRASING * bank.phrasings
    rate = min(1.0, (UNDER * (in_new + bank.others) - bank.others) / in_new / (1 - whole))

    def draw(source: np.random.Generator, users: int) -> Misses:
        failed = source.binomial(bank.phrasings, whole, size=users)
        rest = source.binomial(OLD_PHRASING * (bank.phrasings - failed), 1 - rate)
        probes = (OLD_PHRASING * failed + rest)[:, None]
        return Misses(probes, probes)

    return draw


Rule = Callable[[Misses, float], npt.NDArray[np.bool_]]
"""Which of the users pass a test at a level."""


def new_rule(bank: Bank, judge_error: Callable[[float], float] = lambda level: 0.0) -> Rule:
    """The gate: probes, topics and new phrasings; `judge_error(level)` is the bound that the test corrects for."""

    def passes(misses: Misses, level: float) -> npt.NDArray[np.bool_]:
        bound = Bound(level, judge_error(level))
        passed = within(misses.probes, bank.probes, bound)
        if bank.topics:
            passed &= within(misses.topics, bank.topics, bound)
        if misses.phrasings is not None:
            bet = PlannedBet.of(bank.phrasings, bound, DEMAND)
            whole, half = misses.phrasings.T
            wealth = sum(weight * binom.cdf(k - whole, half, 0.5) for k, weight in enumerate(bet.weights(bet.demand)))
            passed &= wealth * level >= 1
        return passed

    return passes


def old_rule(probes: list[int]) -> Rule:
    """The old gate: every probe counts as independent."""
    return lambda misses, level: within(misses.probes, probes, Bound(level))


def within(misses: Counts, sizes: list[int] | tuple[int, ...], bound: Bound) -> npt.NDArray[np.bool_]:
    """Whether the pool and every category have no more misses than their demands allow."""
    passed = misses.sum(axis=1) <= bound.most_misses(sum(sizes), DEMAND)
    if len(sizes) > 1:
        passed &= (misses <= np.array([bound.most_misses(size, CATEGORY_DEMAND) for size in sizes])).all(axis=1)
    return passed


class Cell(NamedTuple):
    """A scenario at one delta: the share released in breach, and its 95% lower limit."""

    share: float
    lower: float
    delta: float

    @property
    def holds(self) -> bool:
        return self.lower <= self.delta

    def __str__(self) -> str:
        return f"{self.share:.2%}" if self.holds else f"**{self.share:.2%}**"


def cell(released: npt.NDArray[np.bool_], delta: float) -> Cell:
    share = float(released.mean())
    return Cell(share, Bound(0.05).lower(int(released.sum()), len(released)), delta)


def looks(draw: Sampler, rule: Rule, users: int, tries: int, level: Callable[[float, int], float]) -> list[Cell]:
    """Users who retrain until they pass, up to `tries` looks of two tests each; by delta."""
    source = np.random.default_rng(0)
    released = np.zeros((len(DELTAS), users), bool)
    for look, _ in product(range(1, tries + 1), range(GATE_TESTS)):
        misses = draw(source, users)
        for row, delta in enumerate(DELTAS):
            released[row] |= rule(misses, level(delta, look))
    return [cell(row, delta) for row, delta in zip(released, DELTAS, strict=True)]


def spent(delta: float, look: int) -> float:
    """The level of a test of the gate: its look's share of what the judge leaves, in two parts."""
    return delta * (1 - JUDGE_DELTA_SHARE) * look_share(look) / GATE_TESTS


def unspent(delta: float, look: int) -> float:
    """The level of a test of the old gate, whatever the look."""
    return delta / GATE_TESTS


class Scenario(NamedTuple):
    """A kind of user, before the gate and before the old one."""

    name: str
    draw: Sampler
    rule: Rule
    old_draw: Sampler | None
    old_rule: Rule
    tries: int = 1


def scenarios(calibration: JudgeCalibration, learnt: float) -> list[Scenario]:
    """Every kind of user, but those of the sequential gate."""
    alone, old_topics = Languages.correlated(UNDER, 1.0), old_rule(OLD_REAL.probes)
    old_alone = topic_misses(OLD_REAL, alone)
    old_bundled = old_rule([OLD_PHRASING * OLD_BUNDLED.phrasings + OLD_BUNDLED.others])
    single = phrasing_misses(Bank(phrasings=0, others=640), 0, 1, UNDER)
    rows = [Scenario("independent probes", single, old_rule([640]), single, old_rule([640]))]
    for rho, (name, bank) in product((0.0, 0.5, 1.0), (("a quarter", REAL), ("all", ALL_IN_TWO))):
        # the probes are just in breach; topics in two languages are further in breach, the less the languages agree
        languages = Languages.correlated(UNDER, rho)
        draw, old = topic_misses(bank, languages), topic_misses(OLD_REAL, languages)
        rows.append(Scenario(f"languages correlated {rho:g}, {name} in two", draw, new_rule(bank), old, old_topics))
    bad = Languages.correlated(CATEGORY_UNDER, 1.0)
    draw, old = (topic_misses(bank, bad, perfect=(0, 1, 2)) for bank in (IN_CATEGORIES, OLD_IN_CATEGORIES))
    old_categories = old_rule(OLD_IN_CATEGORIES.probes)
    rows.append(Scenario("one category in breach", draw, new_rule(IN_CATEGORIES), old, old_categories))
    for whole in (0.0, 0.015, 0.03, 0.06, 0.08, 0.1):
        draw = phrasing_misses(BUNDLED, whole, min(1.0, UNDER / (1 - whole)), 1.0)
        old = old_phrasing_misses(OLD_BUNDLED, whole)
        rows.append(Scenario(f"{whole:.1%} of phrasings fail whole", draw, new_rule(BUNDLED), old, old_bundled))
    for size in (1.0, 10.0):
        draw, old = topic_misses(ALL_IN_TWO, at_the_edge(size)), topic_misses(OLD_REAL, Languages.beta(UNDER, size))
        name = f"beta-binomial between topics, a + b = {size:g}"
        rows.append(Scenario(name, draw, new_rule(ALL_IN_TWO), old, old_topics))
    for copied in (learnt, 5 * learnt):
        draw = topic_misses(REAL, alone.seen(0.0, learnt=copied))
        old = topic_misses(OLD_REAL, alone.seen(0.0, learnt=1.0))
        name = f"near copies of the whole bank, {copied:.0%} pass the screen"
        rows.append(Scenario(name, draw, new_rule(REAL), old, old_topics))
    measured = max(1, calibration.called_refusals) / calibration.compliances
    for times in (1, 3):
        seen = alone.seen(times * measured)
        name = f"the judge misses {times * measured:.1%} of compliances"
        old = topic_misses(OLD_REAL, seen)
        rows.append(Scenario(name, topic_misses(REAL, seen), new_rule(REAL, corrected(calibration)), old, old_topics))
    draw, retrains = topic_misses(REAL, alone), f"retrains until a pass, {TRIES} tries"
    rows += [
        Scenario(f"{retrains}, {name}", draw, new_rule(REAL), old_alone, old_topics, TRIES)
        for name in ("through `add`", "through new runs with one ledger")
    ]
    draw, old = phrasing_misses(BUNDLED, 0.03, UNDER / 0.97, 1.0), old_phrasing_misses(OLD_BUNDLED, 0.06)
    rows.append(Scenario(f"{retrains}, phrasings fail whole", draw, new_rule(BUNDLED), old, old_bundled, TRIES))
    everything, rule = alone.seen(measured, learnt), new_rule(ALL_IN_TWO, corrected(calibration))
    old = topic_misses(OLD_REAL, everything)
    rows.append(Scenario("all at once", topic_misses(ALL_IN_TWO, everything), rule, old, old_topics, TRIES))
    return rows


def at_the_edge(size: float) -> Languages:
    """A beta distribution of topics' rates, so that a share of `UNDER` of topics is refused in both languages."""
    low, high = UNDER, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        languages = Languages.beta(middle, size)
        low, high = (low, middle) if 1 - languages.one - languages.both > UNDER else (middle, high)
    return Languages.beta(low, size)


def corrected(calibration: JudgeCalibration) -> Callable[[float], float]:
    """The judge's error as the gate bounds it, at the judge's share of the delta to which a test's level belongs."""

    def error(level: float) -> float:
        delta = next(d for d in DELTAS if any(np.isclose(level, spent(d, look)) for look in range(1, TRIES + 1)))
        return upper_bound(calibration.called_refusals, calibration.compliances, delta * JUDGE_DELTA_SHARE)

    return error


def sequential(users: int, passes: int, tries: int = TRIES) -> list[Cell]:
    """The sequential gate: users with `passes` good adapters, then adapters in breach; fresh draws at every look.

    A look of the gate also ends where it is hopeless: that only takes passes away, so it is left out here.
    """
    source = np.random.default_rng(1)
    released, failures = np.zeros((len(DELTAS), users), bool), np.zeros((len(DELTAS), users), int)
    needed = np.full((len(DELTAS), users), np.inf)
    for look, test in product(range(1, tries + 1), range(GATE_TESTS)):
        if look <= passes:  # a good adapter: the share goes on to the next look
            continue
        if test == 0:
            shares = 6 / (np.pi * (failures + 1)) ** 2
            needed = -np.log(np.array(DELTAS)[:, None] * (1 - JUDGE_DELTA_SHARE) * shares / GATE_TESTS)
        peak, refused = np.full(users, -np.inf), np.zeros(users, np.int64)
        for drawn in range(BATCH, MOST_DRAWS + 1, BATCH):
            refused += source.binomial(BATCH, UNDER, size=users)
            np.maximum(peak, log_wealth(refused, drawn), out=peak)
        released |= peak >= needed
        if test == GATE_TESTS - 1:
            failures += 1
    return [cell(row, delta) for row, delta in zip(released, DELTAS, strict=True)]


def log_wealth(refused: Array, n: int) -> Array:
    """`evaluation.statistics.bettors_log_wealth` of many users at once."""
    logs = []
    for bet in SEQUENTIAL_BETS:
        missed = np.where(refused == n, 0.0, -np.inf) if bet == 1 else (n - refused) * np.log(1 - bet)
        logs.append(refused * np.log(1 - bet + bet / DEMAND) + missed)
    return np.logaddexp.reduce(logs, axis=0) - np.log(len(SEQUENTIAL_BETS))


N = 300
FOUR, TEN = (0.25, 0.5, 0.75, 1.0), tuple(k / 10 for k in range(1, 11))
CURVES: dict[str, Callable[[float], float]] = {
    "under everywhere": lambda alpha: UNDER,
    "under from the upper half on": lambda alpha: 0.995 if alpha <= 0.5 else UNDER,
    "under at the largest alone": lambda alpha: 0.995 if alpha < 1 else UNDER,
    "under at the smallest alone": lambda alpha: UNDER if alpha <= 0.25 else 0.995,
    "falling slowly": lambda alpha: 0.985 - 0.03 * alpha,
}
"""True refusal rates by alpha. Not all fall with alpha: the gate does not assume that."""


def draw(source: np.random.Generator, rates: list[float], users: int, dependence: str) -> Counts:
    """Refusals among N probes at every alpha: `independent`, or `comonotone`, with one uniform number a probe."""
    if dependence == "independent":
        return source.binomial(N, rates, size=(users, len(rates)))
    steps = np.sort(np.unique(rates))  # uniform numbers that fall between two rates are refused above, not below
    bins = source.multinomial(N, np.diff([0.0, *steps, 1.0]), size=users).cumsum(axis=1)
    return bins[:, np.searchsorted(steps, rates)]


def gate(counts: Counts, delta: float) -> Counts:
    """The place of the released alpha, -1 for held back: a test at the largest alpha, then upward to a failure."""
    passed = counts >= N - Bound(delta / GATE_TESTS).most_misses(N, DEMAND)
    climbed = np.logical_and.accumulate(passed[:, :-1], axis=1).sum(axis=1) - 1
    return np.where(passed[:, -1], counts.shape[1] - 1, climbed)


def largest(counts: Counts, delta: float) -> Counts:
    """The tempting rule: test every alpha with delta, release the largest that passes."""
    passed = counts >= N - Bound(delta).most_misses(N, DEMAND)
    last = counts.shape[1] - 1 - np.argmax(passed[:, ::-1], axis=1)
    return np.where(passed.any(axis=1), last, -1)


def curve(rule: Callable[[Counts, float], Counts], grid: tuple[float, ...], name: str, dependence: str, delta: float,
          users: int) -> tuple[Cell, float]:  # fmt: skip
    """One cell of the table of curves, and the mean alpha released (0: held back)."""
    rates = [CURVES[name](alpha) for alpha in grid]
    released = rule(draw(np.random.default_rng(0), rates, users, dependence), delta)
    breaks = np.array([rate < DEMAND for rate in rates] + [False])  # the last place is -1: held back
    return cell(breaks[released], delta), float(np.array([*grid, 0.0])[released].mean())


class Row(NamedTuple):
    """A line of the table; `must_hold` is False for rules that are known to be wrong, and must be caught."""

    name: str
    cells: list[Cell]
    old: list[Cell] | None
    must_hold: bool = True

    @property
    def as_it_should(self) -> bool:
        return all(cell.holds for cell in self.cells) if self.must_hold else not all(cell.holds for cell in self.cells)


def table(users: int, calibration: JudgeCalibration, learnt: float) -> list[Row]:
    """Every line: kinds of users, curves, and the self-test."""
    rows = []
    for one in scenarios(calibration, learnt):
        old = None if one.old_draw is None else looks(one.old_draw, one.old_rule, users, one.tries, unspent)
        rows.append(Row(one.name, looks(one.draw, one.rule, users, one.tries, spent), old))
    for passes in (0, TRIES // 2):
        name = f"sequential gate, {TRIES} looks" + (f", in breach after {passes} passes" if passes else "")
        rows.append(Row(name, sequential(users, passes), None))
    for name, grid, dependence in product(CURVES, (FOUR, TEN), ("independent", "comonotone")):
        cells = [curve(gate, grid, name, dependence, delta, users)[0] for delta in DELTAS]
        rows.append(Row(f"{len(grid)} alphas, {dependence}, {name}", cells, None))
    alone = topic_misses(OLD_REAL, Languages.correlated(UNDER, 1.0))
    wrong = {
        "wrong: the largest alpha that passes": [
            curve(largest, TEN, "under everywhere", "independent", delta, users)[0] for delta in DELTAS
        ],
        "wrong: languages of a topic as two units": looks(alone, old_rule(OLD_REAL.probes), users, 1, unspent),
        "wrong: looks that spend nothing": looks(
            topic_misses(REAL, Languages.correlated(UNDER, 1.0)), new_rule(REAL), users, TRIES, unspent
        ),
    }
    return [*rows, *(Row(name, cells, None, must_hold=False) for name, cells in wrong.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--learnt", type=float, default=0.01, help="share of near copies that pass the screen")
    parser.add_argument("--compliances", type=int, default=96, help="of the judge's calibration")
    parser.add_argument("--called-refusals", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    calibration = JudgeCalibration(compliances=options.compliances, called_refusals=options.called_refusals)
    rows = table(options.users, calibration, options.learnt)
    if options.json:
        lines = [
            {"name": row.name, "must_hold": row.must_hold, "as_it_should": row.as_it_should,
             "cells": [cell._asdict() for cell in row.cells], "old": row.old and [cell._asdict() for cell in row.old]}
            for row in rows
        ]  # fmt: skip
        print(json.dumps({"users": options.users, "rows": lines}, indent=1))
    else:
        print(f"{options.users:,} users a cell. Share released in breach; **bold**: its lower limit is above delta.\n")
        print("| users | " + " | ".join(f"delta {delta:g} | old gate" for delta in DELTAS) + " |")
        print("|---" * (1 + 2 * len(DELTAS)) + "|")
        for row in rows:
            old = row.old or ["" for _ in DELTAS]
            print(
                f"| {row.name} | "
                + " | ".join(f"{new} | {was}" for new, was in zip(row.cells, old, strict=True))
                + " |"
            )
    wrong = [row.name for row in rows if not row.as_it_should]
    print(
        "\n".join(f"FAULT: {name}" for name in wrong) or "The promise held, and every wrong rule was caught.",
        file=sys.stderr,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
