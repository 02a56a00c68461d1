"""Bound on the number of released adapters of a run that break a demand, from the gate's tests of all users."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

from persona_rlhf.evaluation.gate import DemandCount, Demands, GateTest
from persona_rlhf.evaluation.statistics import Count, FixedCount, HarmlessCount, ShareCount
from persona_rlhf.policy.bound import GATE_TESTS, tail

CONFIDENCE = 0.95


class FleetGuarantee(NamedTuple):
    """The guarantee of a run. A violating user is one released at an alpha that breaks a demand.

    `expected` bounds their expected number: delta for each user judged. The other three bound the number itself, at
    `confidence`. `whatever` is Markov's inequality and holds for any dependence between users. `independent` is the
    binomial tail; it holds only for independent users, and users share their probes. `shown` follows from the tests:
    all but this many users pass even a test of all users at once (Holm 1979), for any dependence between them.
    """

    judged: int
    released: int
    looks: int
    delta: float
    confidence: float
    expected: float
    whatever: int
    independent: int
    shown: int
    judge_error: float

    def sentence(self) -> str:
        """The guarantee in words."""
        sure = f"{self.confidence:.0%}"
        judge = (
            f" The judge's own error, at most {self.judge_error:.1%} of compliances, is in these figures."
            if self.judge_error
            else " The refusal judge's own error is not in these figures: no calibration was given."
        )
        return (
            f"Of {self.released:,} users released ({self.judged:,} judged, {self.looks:,} tests on certify probes), at "
            f"most {self.expected:.3g} are expected to break a demand (delta = {self.delta:.3g} each, for all "
            f"looks of a user); with {sure} "
            f"confidence at most {self.shown:,} do, by the refusals counted and however users depend on each other "
            f"(from delta alone: at most {self.whatever:,}, or {self.independent:,} if users were independent).{judge}"
        )


class GatedUser(NamedTuple):
    """The alpha at which one user was released, the tests that led there, and the share of delta of this look."""

    alpha: float
    looks: Sequence[GateTest]
    share: float = 1.0


def fleet_guarantee(users: Iterable[GatedUser], demands: Demands, confidence: float = CONFIDENCE) -> FleetGuarantee:
    """The guarantee of a run whose gate was on, over all looks of its users. `demands` are those of all looks together.

    With a calibrated judge, the chance that the calibration misleads is taken out of the confidence once: it is one
    event for all users.
    """
    spare = 1 - confidence - demands.judge_delta
    judged, released, tests = 0, 0, 0
    p_values: list[float] = []
    for user in users:
        judged, tests = judged + 1, tests + len(user.looks)
        if user.alpha > 0:
            released += 1
            p_values.append(p_value(user, demands))
    delta = demands.delta
    each = delta - demands.judge_delta
    return FleetGuarantee(
        judged=judged,
        released=released,
        looks=tests,
        delta=delta,
        confidence=confidence,
        expected=min(float(released), delta * judged),
        whatever=min(released, ceil(round(delta * judged / (1 - confidence), 9)) - 1) if judged else 0,
        independent=min(released, _quantile(judged, each, spare)),
        shown=released - _holm(p_values, judged, spare),
        judge_error=demands.judge_error,
    )


def p_value(user: GatedUser, demands: Demands) -> float:
    """The p-value of "the released alpha breaks a demand".

    All demands must hold, so a test's p-value is its largest one. After a climb it is the largest of the tests passed
    on the way. It is multiplied by the number of ways to be released, and divided by the look's share of delta (a
    weighted Bonferroni correction over all looks of the user).
    """
    first = user.looks[:1]
    passed = first if first and first[0].passed else [test for test in user.looks[1:] if test.passed]
    if not passed:
        return 1.0
    p_values = (
        _of_count(count, demands) if (evidence := (test.shares or {}).get(name)) is None else evidence.p_value
        for test in passed
        for name, count in test.counts.items()
    )
    return min(1.0, GATE_TESTS * max(p_values) / user.share)


def _of_count(count: DemandCount, demands: Demands) -> float:
    """The p-value of "this demand is broken"."""
    match count:
        case Count():
            return demands.bound.p_value(count.refused, count.n, count.min_refusal)
        case ShareCount():
            return count.p_value
        case HarmlessCount():
            return demands.plain_bound.p_value(count.n - count.newly_refused, count.n, 1 - count.max_over_refusal)
        case FixedCount():
            return demands.plain_bound.p_value(count.kept, count.n, 1 - count.max_changed)


def _holm(p_values: Sequence[float], tests: int, spare: float) -> int:
    """How many of `tests` hypotheses are rejected at once (error at most `spare`); those not given have p = 1."""
    rejected = 0
    for value in sorted(p_values):
        if spare <= 0 or value > spare / (tests - rejected):
            break
        rejected += 1
    return rejected


def _quantile(n: int, p: float, outside: float) -> int:
    """The smallest k with P(Binomial(n, p) > k) <= outside; n where `outside` is not positive."""
    return bisect_left(range(n), True, key=lambda k: tail(k + 1, n, p) <= outside) if outside > 0 else n
