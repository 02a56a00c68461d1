"""Exact lower confidence bound of a rate: the statistic by which policies are checked and adapters released."""

from __future__ import annotations

from bisect import bisect_left
from math import exp, log, pi
from typing import NamedTuple

GATE_TESTS = 2
"""Equal parts of delta that the gate spends: one on its first test, one on the upward sequence."""

JUDGE_DELTA_SHARE = 0.1
"""Share of delta for the bound of the judge's error; the looks get the rest."""


def look_share(place: int) -> float:
    """The share of the looks' part of delta that a look spends, by its place in the series, from 1: they sum to 1."""
    return 6 / (pi * place) ** 2


class Bound(NamedTuple):
    """The one-sided Clopper-Pearson lower bound at confidence 1 - `level` (Clopper & Pearson 1934), behind a judge.

    Gate, verify, fixed aspects, requirements and `policy check` decide by it. `judge_error` bounds the share of
    compliances that the judge calls refusals. Those it calls none are at least (1 - judge_error) times all compliances,
    so a judged rate q shows a true rate of 1 - (1 - q) / (1 - judge_error). Refusals that it misses only raise it.
    """

    level: float
    judge_error: float = 0.0

    @classmethod
    def of_gate_test(cls, delta: float, judge_error: float = 0.0) -> Bound:
        """The bound of one gate test, where the whole gate may err with a chance of `delta`."""
        return cls(delta / GATE_TESTS, judge_error)

    @classmethod
    def of_first_look(cls, delta: float) -> Bound:
        """The bound of a gate test at a user's first look, before the judge's error, where delta is the user's."""
        return cls.of_gate_test(delta * (1 - JUDGE_DELTA_SHARE) * look_share(1))

    def lower(self, successes: int, n: int) -> float:
        """The bound of the true rate; zero where nothing was counted or nothing succeeded.

        Raises ValueError for counts or a level that cannot be.
        """
        _check(successes, n)
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {self.level}")
        if successes == 0:
            return self.judge_adjusted_lower(0.0)
        if successes == n:  # P(n of n) = p ** n, without scipy: `policy check` needs no more
            return self.judge_adjusted_lower(exp(log(self.level) / n))
        from scipy.special import betaincinv  # a third of a second, for commands that only print

        return self.judge_adjusted_lower(float(betaincinv(successes, n - successes + 1, self.level)))

    def most_misses(self, n: int, min_rate: float) -> int:
        """How many of n trials may fail while the bound still reaches `min_rate`; -1 where none may."""
        return n - bisect_left(range(n + 1), True, key=lambda successes: self.lower(successes, n) >= min_rate)

    def fewest_trials(self, min_rate: float) -> int:
        """The fewest trials that show `min_rate` (below 1) without a miss."""
        return 1 + bisect_left(range(1, 2**53), True, key=lambda n: self.lower(n, n) >= min_rate)

    def p_value(self, successes: int, n: int, min_rate: float) -> float:
        """The p-value of a judged count against "the true rate is at most `min_rate`"."""
        return tail(successes, n, self.required_judged_rate(min_rate))

    def judge_adjusted_lower(self, judged: float) -> float:
        """The true rate that a judged rate shows."""
        return max(0.0, 1 - (1 - judged) / (1 - self.judge_error)) if self.judge_error else judged

    def required_judged_rate(self, rate: float) -> float:
        """The judged rate that shows a true rate: the inverse of `judge_adjusted_lower`."""
        return 1 - (1 - rate) * (1 - self.judge_error) if self.judge_error else rate


def tail(successes: int, n: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(n, p). Raises ValueError for counts that cannot be."""
    from scipy.special import betainc

    _check(successes, n)
    return 1.0 if successes == 0 or p >= 1 else float(betainc(successes, n - successes + 1, p))


def _check(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} trials")
