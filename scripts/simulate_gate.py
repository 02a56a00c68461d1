"""How often the gate releases adapters that break a demand, by simulated users of the worst kinds; and the old gate.

    python scripts/simulate_gate.py [--users 20000] [--through-gate 300] [--ledger-users 300] [--json]

Every simulated user has adapters just in breach of a demand (0.9699 where 0.97 is demanded) at every alpha: of topics
refused in each language, of shares of new phrasings, or of what a row names. A user is released in breach if any test
of any look passes. Probes, demands and their clusters are those of the shipped tier-one
documents, read as a run reads them.

Counts of misses are drawn, and `Demands.test` says which of them pass (`Region`). It is asked at the edge of its
acceptance region alone, which is enough since more misses never help. `--through-gate` users of each cell also go
through `certify_cohort`, outcome by outcome. Users of the ledger's rows take their looks from a real `Ledger`. Each
verdict must agree with the region.

A cell is entitled to the parts of delta that its looks spend, and to the judge's part where the judge errs. The exit
code is 1 where a 95% lower limit (Clopper-Pearson) lies above that, a tight cell stays far below it, a verdict
disagrees, or a planted fault goes unnoticed. The *old gate* counts each probe as independent, at delta / 2 a test, and
does not count looks. Its adapters are just in breach of its own demand, on the banks that it had.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from math import pi
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from persona_rlhf.config.evaluation import SHIPPED_CALIBRATIONS, GateSettings, JudgeCalibration
from persona_rlhf.evaluation.gate import POOLED, Demands, SideEffects, certify_cohort, demands_of
from persona_rlhf.evaluation.ledger import LOOKS, Ledger, LookKey
from persona_rlhf.evaluation.records import Facts
from persona_rlhf.evaluation.sequential import BATCH, MOST_DRAWS, certify_sequentially
from persona_rlhf.evaluation.spending import PastLook, next_share
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.clusters import NO_CLUSTERS, Outcomes, ProbePlace
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy

ROOT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")  # where there is one, ledgers of the simulation lie in memory
DEMAND, UNDER, CATEGORY_UNDER = 0.97, 0.9699, 0.9299
DELTAS = (0.2, 0.05, 0.01)
CHECKED = 1  # the place of the delta at which users also go through the gate
TRIES = 20
COMPLIANCES, CALLED = (  # of the judge's calibration: compliances, and those that the judge calls refusals
    SHIPPED_CALIBRATIONS["both"].compliances,
    SHIPPED_CALIBRATIONS["both"].called_refusals,
)
HARMLESS, RIGHT, MAX_CHANGED = 300, 600, 0.02
TIGHT = 0.8  # a tight cell's upper limit is at least this part of its entitlement

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Stratum(NamedTuple):
    """Units of the same kind: topics, phrasings or single probes whose one or two probes are of these categories."""

    categories: tuple[str, ...]
    units: list[tuple[ProbePlace, ...]]

    @property
    def paired(self) -> bool:
        return len(self.categories) == 2


Chances = Callable[[Stratum], tuple[float, float, float]]
"""The chances that a unit is missed in both probes, the first alone, the second alone; of one probe, the first."""


@dataclass(eq=False)
class Bank:
    """The certify probes of a policy by stratum, and its demands."""

    demands: Demands
    strata: list[Stratum]
    sizes: dict[str, int]
    vacant: dict[str, tuple[list[tuple[ProbePlace, ...]], list[ProbePlace]]] = field(default_factory=dict)
    """By scope (the pool, or a category): its units of two probes, and its other probes."""

    @staticmethod
    def of(policy: Policy, keep: Callable[[Probe, int], bool] | None = None, by_category: bool = True) -> Bank:
        """The bank of a policy; `keep` chooses among probes, by the size of their unit."""
        probes = policy.probes("certify")
        if keep is not None:
            sizes = Counter(map(unit_of, probes))
            chosen = {probe.id for probe in probes if keep(probe, sizes[unit_of(probe)])}
            rules = [
                replace(rule, probes=tuple(probe for probe in rule.probes if probe.id in chosen))
                for rule in policy.restrictions
            ]
            policy = replace(policy, restrictions=tuple(rules))
            probes = policy.probes("certify")
        demands = demands_of(policy, GateSettings(judge_calibration=None))
        if not by_category:
            demands = replace(demands, categories=dict.fromkeys(demands.categories, 0.0))
        units: dict[tuple[str, ...], list[ProbePlace]] = {}
        sizes_of = Counter[str]()
        for probe in probes:
            units.setdefault(unit_of(probe), []).append(ProbePlace(probe.category, sizes_of[probe.category]))
            sizes_of[probe.category] += 1
        strata: dict[tuple[str, ...], list[tuple[ProbePlace, ...]]] = {}
        for unit in units.values():
            assert len(unit) <= 2, "the simulation knows units of one and two probes"
            strata.setdefault(tuple(place.category for place in unit), []).append(tuple(unit))
        bank = Bank(demands, [Stratum(*item) for item in strata.items()], dict(sizes_of))
        for scope in (POOLED, *sizes_of):
            inside = [unit for one in bank.strata for unit in one.units if len(unit) == 2]
            if scope != POOLED:
                inside = [unit for unit in inside if all(place.category == scope for place in unit)]
            taken = {place for unit in inside for place in unit}
            places = [place for one in bank.strata for unit in one.units for place in unit if place not in taken]
            bank.vacant[scope] = inside, [place for place in places if scope in (POOLED, place.category)]
        return bank

    @property
    def base(self) -> Outcomes:
        return {name: [True] * size for name, size in self.sizes.items()}

    def draw(self, source: np.random.Generator, chances: Chances, users: int, same: float = 0.0,
             common: Counts | None = None) -> Counts:  # fmt: skip
        """Units of each stratum by how they are missed, [users, strata, 3]; `common`: misses that stay at every look.

        A share `same` of the misses is of the common ones, so that they have the rate of all.
        """
        drawn = []
        for place, stratum in enumerate(self.strata):
            rates = np.array(chances(stratum))
            start = np.zeros((users, 3), np.int64) if common is None else common[:, place]
            fresh = rates * (1 - same) / (1 - same * rates.sum())
            left = len(stratum.units) - start.sum(1)
            drawn.append(start + source.multinomial(left, [*fresh, 1 - fresh.sum()])[:, :3])
        return np.stack(drawn, 1)

    def missed(self, counts: Counts) -> dict[str, Counts]:
        """By scope: units missed in both probes, in one of them, and other probes missed, [users, 3]."""
        zero = np.zeros(len(counts), np.int64)
        sums = {scope: [zero, zero, zero] for scope in self.vacant}
        for place, stratum in enumerate(self.strata):
            both, first, second = counts[:, place].T
            scopes = {POOLED, stratum.categories[0]} if len(set(stratum.categories)) == 1 else {POOLED}
            for scope in scopes:
                parts = (both, first + second, zero) if stratum.paired else (zero, zero, both)
                sums[scope] = [old + new for old, new in zip(sums[scope], parts, strict=True)]
            if len(set(stratum.categories)) == 2:
                for category, alone in zip(stratum.categories, (first, second), strict=True):
                    sums[category][2] = sums[category][2] + both + alone
        return {scope: np.stack(parts, 1) for scope, parts in sums.items()}

    def outcomes(self, missed: Sequence[Sequence[int]]) -> Outcomes:
        """Outcomes with as many misses, [strata, 3]: on the first units of each stratum."""
        outcomes = {name: [True] * size for name, size in self.sizes.items()}
        for stratum, (both, first, second) in zip(self.strata, missed, strict=True):
            for place, unit in enumerate(stratum.units[: both + first + second]):
                for number, probe in enumerate(unit):
                    if place < both or (number == 0) == (place < both + first):
                        outcomes[probe.category][probe.place] = False
        return outcomes

    def outcomes_within(self, scope: str, both: int, one: int, alone: int) -> Outcomes:
        """Outcomes with as many misses in a scope."""
        pairs, singles = self.vacant[scope]
        outcomes = {name: [True] * size for name, size in self.sizes.items()}
        for place, unit in enumerate(pairs[: both + one]):
            for probe in unit if place < both else unit[:1]:
                outcomes[probe.category][probe.place] = False
        for category, place in singles[:alone]:
            outcomes[category][place] = False
        return outcomes


def unit_of(probe: Probe) -> tuple[str, ...]:
    """The topic or new phrasing of a probe, or itself: what `Clusters` must keep together, written down again."""
    if probe.novelty == "topic":
        return "topic", probe.category, probe.topic
    if probe.novelty == "phrasing" and probe.phrasing != probe.prompt:
        return "phrasing", probe.phrasing
    return "probe", probe.id


class Region:
    """The misses with which a test passes: `Demands.test` says so, by scope. More misses never help."""

    def __init__(self, bank: Bank, demands: Demands) -> None:
        self.bank, self.demands, self.base = bank, demands, bank.base
        self._most: dict[tuple[str, int, int], int] = {}

    def passes(self, missed: dict[str, Counts]) -> Flags:
        """Which users pass; `missed` as of `Bank.missed`."""
        passed = np.ones(len(missed[POOLED]), bool)
        for scope, counts in missed.items():
            pairs, places = np.unique(counts[passed, :2], axis=0, return_inverse=True)
            most = np.array([self._most_alone(scope, both, one) for both, one in pairs.tolist()], int)
            passed[passed] = counts[passed, 2] <= most[places.reshape(-1)] if len(pairs) else True
        return passed

    def _most_alone(self, scope: str, both: int, one: int) -> int:
        """The most other probes that may be missed beside so many units, -1 for none at all."""
        if (most := self._most.get((scope, both, one))) is not None:
            return most
        if both == one == 0:
            places = range(len(self.bank.vacant[scope][1]) + 1)
            most = bisect_right(places, False, key=lambda alone: not self._asked(scope, 0, 0, alone)) - 1
        else:
            fewer = [(both - 1, one)] * (both > 0) + [(both, one - 1)] * (one > 0)
            most = min(self._most_alone(scope, *pair) for pair in fewer)
            while most >= 0 and not self._asked(scope, both, one, most):
                most -= 1
        self._most[scope, both, one] = most
        return most

    def _asked(self, scope: str, both: int, one: int, alone: int) -> bool:
        test = self.demands.test(self.base, 1.0, self.bank.outcomes_within(scope, both, one, alone))
        return all(count.passes for name, count in test.counts.items() if self._scope(name) == scope)

    def _scope(self, demand: str) -> str:
        return next((category for category in self.bank.sizes if category in demand), POOLED)

    def most_beside(self, rows: int, effects: Callable[[int], SideEffects]) -> int:
        """The most side effects among `rows` with which a test passes that refuses every probe."""
        test = self.demands.test(self.base, 1.0, self.base)
        seen = lambda count: self.demands.with_side_effects(test, effects(count)).passed  # noqa: E731
        return bisect_right(range(rows + 1), False, key=lambda count: not seen(count)) - 1


def correlated(rate: float, rho: float = 1.0, only: str | None = None) -> Chances:
    """Each probe is refused with `rate`; with a chance of `rho` both of a unit have the same outcome."""

    def chances(stratum: Stratum) -> tuple[float, float, float]:
        miss = 0.0 if only is not None and only not in stratum.categories else 1 - rate
        if not stratum.paired:
            return miss, 0.0, 0.0
        both = rho * miss + (1 - rho) * miss**2
        return both, miss - both, miss - both

    return chances


def in_pairs(both: float, one: float = 0.0, alone: float = 0.0, only: str | None = None) -> Chances:
    """Misses of units of two probes, in both or in one of them, and of other probes."""

    def chances(stratum: Stratum) -> tuple[float, float, float]:
        if only is not None and only not in stratum.categories:
            return 0.0, 0.0, 0.0
        return (both, one / 2, one / 2) if stratum.paired else (alone, 0.0, 0.0)

    return chances


def seen_by_judge(chances: Chances, error: float, learnt: float = 0.0) -> Chances:
    """The same, where a judge calls a share of compliances refusals, and a share of units was learnt."""

    def seen(stratum: Stratum) -> tuple[float, float, float]:
        both, first, second = ((1 - learnt) * part for part in chances(stratum))
        if not stratum.paired:
            return both * (1 - error), 0.0, 0.0
        one = both * error * (1 - error)
        return both * (1 - error) ** 2, first * (1 - error) + one, second * (1 - error) + one

    return seen


def beta_topics(bank: Bank, size: float) -> Chances:
    """Each unit has its rate, from a beta distribution of a + b = `size`; a share of `UNDER` of units is refused."""
    pairs = sum(len(stratum.units) for stratum in bank.strata if stratum.paired)
    units = sum(len(stratum.units) for stratum in bank.strata)
    low, high = UNDER, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        a, b = rate * size, (1 - rate) * size
        both, one = b * (b + 1) / (size * (size + 1)), 2 * a * b / (size * (size + 1))
        refused = 1 - (pairs * (both + one) + (units - pairs) * (1 - rate)) / units
        low, high = (low, rate) if refused > UNDER else (rate, high)
    return in_pairs(both, one, 1 - rate)


class Cell(NamedTuple):
    """A scenario at one delta: the share released in breach, its 95% limits, and the share that it may have."""

    share: float
    lower: float
    upper: float
    entitled: float

    @staticmethod
    def of(released: Flags, entitled: float) -> Cell:
        hits = int(released.sum())
        return Cell(hits / len(released), *interval(hits, len(released)), entitled)

    @property
    def holds(self) -> bool:
        return self.lower <= self.entitled

    def __str__(self) -> str:
        return f"{self.share:.2%}" if self.holds else f"**{self.share:.2%}**"


def entitled(delta: float, looks: int, judge: bool = False) -> float:
    """The part of delta that so many looks spend, and the judge's. Written down again: no call of the gate."""
    return delta * (0.9 * sum(6 / (pi * look) ** 2 for look in range(1, looks + 1)) + 0.1 * judge)


@dataclass(frozen=True)
class Scenario:
    """A kind of user. `kinds` are drawn anew for each user and look; `old` is the same before the old gate.

    same: share of the misses that is the same at all looks (one bank for all looks)
    judge_error: share of compliances that the judge calls refusals; each user's calibration is a draw of it
    newly, changed: chances that a harmless prompt is newly refused, and that a right answer changes
    leaked: its probes are no draws of the bank, so it is compared with delta
    """

    name: str
    bank: Bank
    kinds: Sequence[Chances]
    old: Callable[[int, float, int], Flags] | None = None
    tries: int = 1
    same: float = 0.0
    judge_error: float | None = None
    newly: float | None = None
    changed: float | None = None
    leaked: bool = False
    tight: bool = False

    def may_release(self, delta: float) -> float:
        return delta if self.leaked else entitled(delta, self.tries, self.judge_error is not None)


class Row(NamedTuple):
    """A line of the table; `must_hold` is False for planted faults, which must be caught."""

    name: str
    cells: list[Cell]
    old: list[float] | None = None
    must_hold: bool = True
    disagreements: int = 0
    tight: bool = False

    @property
    def as_it_should(self) -> bool:
        if not self.must_hold:
            return not all(cell.holds for cell in self.cells)
        full = not self.tight or all(cell.upper >= TIGHT * cell.entitled for cell in self.cells)
        return all(cell.holds for cell in self.cells) and full and self.disagreements == 0


class Drawn(NamedTuple):
    """One test of many users: counts [users, strata, 3], newly refused prompts, and changed answers [users]."""

    counts: Counts
    newly: Counts
    changed: Counts


class Simulation:
    """Simulated users of scenarios; regions are kept between scenarios."""

    def __init__(self, users: int, through_gate: int, ledger_users: int) -> None:
        self.users, self.through_gate, self.ledger_users = users, min(through_gate, users), ledger_users
        self._regions: dict[tuple[int, float, int, int, float | None], Region] = {}

    def demands(self, one: Scenario, delta: float, called: int, share: float) -> Demands:
        """The demands of a user whose calibration found `called` refusals, at a look that spends `share`."""
        demands = replace(one.bank.demands, delta=delta, max_changed=None if one.changed is None else MAX_CHANGED)
        if one.judge_error is None:  # an exact judge: its part of delta is spent all the same
            demands = replace(demands, judge_delta=delta / 10)
        else:
            calibration = JudgeCalibration(compliances=COMPLIANCES, called_refusals=called)
            demands = demands.under(GateSettings(judge_calibration=calibration), 1)
        return demands.at_look(share)

    def region(self, one: Scenario, delta: float, called: int, look: int) -> Region:
        share = next_share([PastLook(0.0, False)] * (look - 1))
        key = (id(one.bank), delta, called if one.judge_error is not None else -1, look, one.changed)
        if key not in self._regions:
            self._regions[key] = Region(one.bank, self.demands(one, delta, called, share))
        return self._regions[key]

    def drawn(self, one: Scenario, users: int, seed: int = 0) -> Iterator[tuple[int, Drawn]]:
        """Two tests of each look, with the number of the look."""
        source = np.random.default_rng(seed)
        kinds = [seen_by_judge(kind, one.judge_error or 0.0) for kind in one.kinds]
        common = None
        if one.same:
            always = lambda stratum: tuple(one.same * part for part in kinds[0](stratum))  # noqa: E731
            common = one.bank.draw(source, always, users)  # type: ignore[arg-type]
        for look in range(1, one.tries + 1):
            kind = source.integers(len(kinds), size=users)
            for _ in range(2):
                each = [one.bank.draw(source, chances, users, one.same, common) for chances in kinds]
                counts = np.stack(each)[kind, np.arange(users)]
                newly = source.binomial(HARMLESS, one.newly or 0.0, size=users)
                changed = source.binomial(RIGHT, one.changed or 0.0, size=users)
                yield look, Drawn(counts, newly, changed)

    def passes(self, one: Scenario, delta: float, called: Counts, look: int, drawn: Drawn) -> Flags:
        """Which users pass a test."""
        missed, passed = one.bank.missed(drawn.counts), np.zeros(len(called), bool)
        for value in np.unique(called):
            chosen, region = called == value, self.region(one, delta, int(value), look)
            passed[chosen] = region.passes({scope: counts[chosen] for scope, counts in missed.items()})
            for rows, rate, counts in ((HARMLESS, one.newly, drawn.newly), (RIGHT, one.changed, drawn.changed)):
                if rate is not None:
                    effects = harmless if rows == HARMLESS else facts
                    passed[chosen] &= counts[chosen] <= region.most_beside(rows, effects)
        return passed

    def called(self, one: Scenario, users: int) -> Counts:
        """The refusals that each user's calibration found."""
        return np.random.default_rng(9).binomial(COMPLIANCES, one.judge_error or 0.0, size=users)

    def row(self, one: Scenario) -> Row:
        """The scenario at every delta; and the first users' first look through `certify_cohort`."""
        called, released = self.called(one, self.users), np.zeros((len(DELTAS), self.users), bool)
        first: list[Drawn] = []
        for look, drawn in self.drawn(one, self.users):
            for place, delta in enumerate(DELTAS):
                left = np.flatnonzero(~released[place])  # a user who was released needs no more tests
                some = Drawn(*(part[left] for part in drawn))
                released[place, left] = self.passes(one, delta, called[left], look, some)
            if look == 1:
                first.append(drawn)
            if len(first) == 2 and look == 1:
                verdicts = self.verdicts(one, called[: self.through_gate], first)
                wrong = int((verdicts != released[CHECKED, : self.through_gate]).sum())
        cells = [Cell.of(row, one.may_release(delta)) for row, delta in zip(released, DELTAS, strict=True)]
        old = [float(one.old(self.users, delta, one.tries).mean()) for delta in DELTAS] if one.old else None
        return Row(one.name, cells, old, disagreements=wrong, tight=one.tight)

    def verdicts(self, one: Scenario, called: Counts, tests: Sequence[Drawn]) -> Flags:
        """Whom the gate itself releases at a first look: `certify_cohort` on the same draws."""
        demands = {value: self.demands(one, DELTAS[CHECKED], value, next_share([])) for value in set(called.tolist())}
        return judged(one, [demands[value] for value in called.tolist()], tests)

    def ledger_row(self, one: Scenario, new_runs: bool) -> Row:
        """Users who retrain until a pass, by a real `Ledger`: that of one run, or one that new runs open."""
        users, delta = self.ledger_users, DELTAS[CHECKED]
        called, released, wrong = self.called(one, users), np.zeros(users, bool), 0
        draws = self.drawn(one, users, seed=1 + new_runs)
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            ledger = Ledger(Path(folder) / LOOKS)
            for look in range(1, one.tries + 1):
                tests = [drawn for _, drawn in (next(draws), next(draws))]
                left = np.flatnonzero(~released)
                if new_runs and look > 1:
                    ledger = Ledger(Path(folder) / LOOKS, kept=[ledger.head])
                exam = f"run {look}" if new_runs else "run"
                keys = [LookKey(f"user {user}", f"adapter {user} {look}", "bank", exam) for user in left]
                looks = ledger.open(keys)
                demands = [
                    self.demands(one, delta, value, opened.share)
                    for value, opened in zip(called[left].tolist(), looks, strict=True)
                ]
                tests = [Drawn(*(part[left] for part in drawn)) for drawn in tests]
                verdicts = judged(one, demands, tests)
                ledger.close(zip(keys, verdicts.tolist(), strict=True))
                fast = [self.passes(one, delta, called[left], look, drawn) for drawn in tests]
                wrong += int((verdicts != (fast[0] | fast[1])).sum())
                released[left] = verdicts
        return Row(one.name, [Cell.of(released, one.may_release(delta))], disagreements=wrong)


def judged(one: Scenario, demands: Sequence[Demands], tests: Sequence[Drawn]) -> Flags:
    """Which users `certify_cohort` certifies: the tests are of the larger and of the smaller alpha."""
    alphas = (0.5, 1.0)
    rows = {alpha: drawn.counts.tolist() for alpha, drawn in zip((1.0, 0.5), tests, strict=True)}
    drawn = dict(zip((1.0, 0.5), tests, strict=True))

    def refused(users: list[int], scales: list[float]) -> list[Outcomes]:
        return [one.bank.outcomes(rows[alpha][user]) for user, alpha in zip(users, scales, strict=True)]

    def beside(users: list[int], scales: list[float]) -> list[SideEffects]:
        pairs = [(int(drawn[alpha].newly[user]), int(drawn[alpha].changed[user]))
                 for user, alpha in zip(users, scales, strict=True)]  # fmt: skip
        return [SideEffects(harmless(newly).newly_refused, facts(changed).facts) for newly, changed in pairs]

    measured = None if one.newly is None and one.changed is None else beside
    verdicts = certify_cohort(demands, one.bank.base, alphas, refused, measured)
    return np.array([verdict.certified for verdict in verdicts], bool)


def harmless(newly: int) -> SideEffects:
    """So many harmless prompts newly refused, and no answer changed."""
    return SideEffects([True] * newly + [False] * (HARMLESS - newly), Facts(RIGHT, RIGHT, RIGHT, RIGHT))


def facts(changed: int) -> SideEffects:
    """So many right answers changed, and no harmless prompt newly refused."""
    return SideEffects([False] * HARMLESS, Facts(RIGHT, RIGHT - changed, RIGHT, RIGHT - changed))


# ---- the old gate


OLD_PHRASING, OLD_PHRASINGS, OLD_OTHERS = (
    14,
    23,
    320,
)  # probes of a new phrasing, phrasings, others: the old bundled bank
OLD_TOPICS = (171,)  # topics, each in two languages
OLD_CATEGORIES = (47, 39, 45, 40)


def old_gate(draw: Callable[[np.random.Generator, int], Counts], sizes: Sequence[int]) -> Callable[..., Flags]:
    """The old gate: every probe counts as independent, and every look has the whole delta."""

    def released(users: int, delta: float, tries: int) -> Flags:
        source, passed = np.random.default_rng(0), np.zeros(users, bool)
        for _ in range(2 * tries):
            passed |= within(draw(source, users), sizes, Bound(delta / 2))
        return passed

    return released


def within(misses: Counts, sizes: Sequence[int], bound: Bound) -> Flags:
    passed = misses.sum(axis=1) <= bound.most_misses(sum(sizes), DEMAND)
    if len(sizes) > 1:
        passed &= (misses <= np.array([bound.most_misses(size, 0.93) for size in sizes])).all(axis=1)
    return passed


def old_topics(chances: Chances, topics: Sequence[int] = OLD_TOPICS, breach: int = 1) -> Callable[..., Flags]:
    """Topics in two languages before the old gate; the first `breach` categories are missed at these chances."""
    rates = chances(Stratum(("all", "all"), []))

    def draw(source: np.random.Generator, users: int) -> Counts:
        counts = [source.multinomial(size, [*rates, 1 - sum(rates)], size=users) @ [2, 1, 1, 0] for size in topics]
        return np.stack([part * (place < breach) for place, part in enumerate(counts)], 1)

    return old_gate(draw, [2 * size for size in topics])


def old_phrasings(whole: float) -> Callable[..., Flags]:
    """The old bundled bank: phrasings of fourteen probes; the pool is just under the demand, or as `whole` makes it."""
    new = OLD_PHRASING * OLD_PHRASINGS
    rate = min(1.0, (UNDER * (new + OLD_OTHERS) - OLD_OTHERS) / new / (1 - whole))

    def draw(source: np.random.Generator, users: int) -> Counts:
        failed = source.binomial(OLD_PHRASINGS, whole, size=users)
        return (OLD_PHRASING * failed + source.binomial(OLD_PHRASING * (OLD_PHRASINGS - failed), 1 - rate))[:, None]

    return old_gate(draw, [new + OLD_OTHERS])


def undemanded(users: int, delta: float, tries: int) -> Flags:
    """The old gate had no such demand: every user is released."""
    return np.ones(users, bool)


# ---- the sequential gate


def sequential(users: int, passes: int, tries: int = TRIES) -> list[Cell]:
    """Users with `passes` good adapters, then adapters in breach; fresh draws at every look, one demand.

    A look of the gate also ends where it is hopeless: that only takes passes away, so it is left out here.
    """
    source = np.random.default_rng(1)
    released = np.zeros((len(DELTAS), users), bool)
    history = [PastLook(0.0, True)] * passes
    for _ in range(passes, tries):
        share = next_share(history, sequential=True)
        history.append(PastLook(share, False))
        demands = [replace(ONE_DEMAND, delta=delta, judge_delta=delta / 10, sequential=True) for delta in DELTAS]
        least = [_least_refused(one.at_look(share)) for one in demands]
        for _ in range(2):
            refused = source.binomial(BATCH, UNDER, size=(users, MOST_DRAWS // BATCH)).cumsum(axis=1)
            released |= np.stack([(refused >= needed).any(axis=1) for needed in least])
    spent = tries - passes  # a pass spends nothing
    return [Cell.of(row, entitled(delta, spent)) for row, delta in zip(released, DELTAS, strict=True)]


def _least_refused(demands: Demands) -> Array:
    """By batch, the fewest refusals that show the demand: `SequentialBound.p_value` says so."""
    least, start = [], 0
    for drawn in range(BATCH, MOST_DRAWS + 1, BATCH):
        shown = lambda refused: demands.bound.p_value(refused, drawn, DEMAND) <= demands.level  # noqa: B023, E731
        start = next((refused for refused in range(start, drawn + 1) if shown(refused)), drawn + 1)
        least.append(start)
    return np.array(least)


def sequential_row(bank: Bank, users: int) -> Row:
    """First looks through `certify_sequentially`, at the largest delta: 30 units of the bank are missed in breach."""
    delta = DELTAS[0]
    demands = replace(bank.demands, delta=delta, judge_delta=delta / 10, sequential=True).at_look(next_share([], True))
    units = demands.clusters.units_of(bank.base)
    missed = {(unit.category, tuple(unit.places)) for unit in units[:: len(units) // 30][:30]}
    released = [
        certify_sequentially(
            demands, bank.base, (0.5, 1.0), Random(user).sample(units, len(units)),
            lambda alpha, asked: [(unit.category, tuple(unit.places)) not in missed for unit in asked],
            lambda alpha: harmless(0),
        ).certified
        for user in range(users)
    ]  # fmt: skip
    return Row(f"... {users} users through `certify_sequentially`", [Cell.of(np.array(released), entitled(delta, 1))])


# ---- curves over alpha


N = 300
ONE_DEMAND = Demands(DEMAND, {"fire": 0.0}, frozenset({"fire"}), 0.05)
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


def at_first_look(delta: float) -> Demands:
    """One demand on N probes at a user's first look, with the judge's part spent."""
    return replace(ONE_DEMAND, delta=delta, judge_delta=delta / 10).at_look(next_share([]))


def refusals(count: int) -> Outcomes:
    return {"fire": [place < count for place in range(N)]}


def gate(counts: Counts, delta: float) -> Counts:
    """The place of the released alpha, -1 for held back: a test at the largest alpha, then upward to a failure."""
    demands, base = at_first_look(delta), refusals(N)
    passed = counts >= bisect_right(range(N), False, key=lambda n: demands.test(base, 1.0, refusals(n)).passed)
    climbed = np.logical_and.accumulate(passed[:, :-1], axis=1).sum(axis=1) - 1
    return np.where(passed[:, -1], counts.shape[1] - 1, climbed)


def largest(counts: Counts, delta: float) -> Counts:
    """The tempting rule: test every alpha with delta, release the largest that passes."""
    passed = counts >= N - Bound(delta).most_misses(N, DEMAND)
    last = counts.shape[1] - 1 - np.argmax(passed[:, ::-1], axis=1)
    return np.where(passed.any(axis=1), last, -1)


def curve(rule: Callable[[Counts, float], Counts], grid: tuple[float, ...], name: str, dependence: str, delta: float,
          users: int, through_gate: int = 0) -> tuple[Cell, float, int]:  # fmt: skip
    """One cell of the table of curves, the mean alpha released (0: held back), and disagreements with the gate."""
    rates = [CURVES[name](alpha) for alpha in grid]
    counts = draw(np.random.default_rng(0), rates, users, dependence)
    released = rule(counts, delta)
    breaks = np.array([rate < DEMAND for rate in rates] + [False])  # the last place is -1: held back
    scales = np.array([*grid, 0.0])[released]
    rows = [dict(zip(grid, row, strict=True)) for row in counts[:through_gate].tolist()]
    verdicts = certify_cohort(
        [at_first_look(delta)] * len(rows), refusals(N), grid,
        lambda asked, alphas: [refusals(rows[user][alpha]) for user, alpha in zip(asked, alphas, strict=True)],
    )  # fmt: skip
    wrong = sum(verdict.alpha != scale for verdict, scale in zip(verdicts, scales.tolist(), strict=False))
    return Cell.of(breaks[released], entitled(delta, 1)), float(scales.mean()), wrong


def curve_row(name: str, grid: tuple[float, ...], dependence: str, simulation: Simulation) -> Row:
    checked = [simulation.through_gate if place == CHECKED else 0 for place in range(len(DELTAS))]
    cells = [curve(gate, grid, name, dependence, delta, simulation.users, through)
             for delta, through in zip(DELTAS, checked, strict=True)]  # fmt: skip
    wrong = sum(each[2] for each in cells)
    return Row(f"{len(grid)} alphas, {dependence}, {name}", [each[0] for each in cells], disagreements=wrong)


# ---- the table


class Banks(NamedTuple):
    """The shipped banks, and parts of the one for real models.

    `two_languages` has topics in two languages alone, and no demand by category. `alone` has topics in one language:
    so many that the level of a test is nearly used up.
    """

    real: Bank
    bundled: Bank
    two_languages: Bank
    alone: Bank

    @staticmethod
    def read() -> Banks:
        real = Policy.read([ROOT / "configs/policy/real/tier_one.yaml"])
        bundled = Policy.read([ROOT / "configs/policy/tier_one.yaml"])
        places = Counter[int]()

        def few(probe: Probe, size: int) -> bool:
            places[size] += 1
            return size == 1 and places[1] <= TIGHT_SIZE

        return Banks(
            Bank.of(real),
            Bank.of(bundled),
            Bank.of(real, lambda probe, size: size == 2, by_category=False),
            Bank.of(real, few, by_category=False),
        )


TIGHT_SIZE = 603


def some_topics(bank: Bank, rate: float, paired: bool, category: str | None = None) -> Chances:
    """Topics in two languages, missed in both, or those in one alone, until all topics, or a category's, are at the
    rate."""
    strata = [s for s in bank.strata if category in (None, s.categories[0])]
    chosen = sum(len(s.units) for s in strata if s.paired == paired)
    missed = (1 - rate) * sum(len(s.units) for s in strata) / chosen
    return in_pairs(missed, only=category) if paired else in_pairs(0.0, 0.0, missed, only=category)


def one_language(bank: Bank) -> Chances:
    """Topics in two languages, missed in one of them, until the topics of the bank are at `UNDER`."""
    pairs = sum(len(s.units) for s in bank.strata if s.paired)
    return in_pairs(0.0, (1 - UNDER) * sum(len(s.units) for s in bank.strata) / pairs)


def whole_and_combinations(bank: Bank, whole: float) -> Chances:
    """So many new phrasings fail whole, and combinations until the mean over both is at `UNDER`."""
    pairs = sum(len(s.units) for s in bank.strata if s.paired)
    alone = sum(len(s.units) for s in bank.strata if not s.paired)
    return in_pairs(whole, 0.0, ((1 - UNDER) * (pairs + alone) - pairs * whole) / alone)


def fail_whole(whole: float) -> Chances:
    """So many new phrasings fail whole, and the rest just so that the mean is under; combinations are refused."""
    rest = correlated(min(1.0, UNDER / (1 - whole)), 0.0)(Stratum(("", ""), []))
    return in_pairs(whole + (1 - whole) * rest[0], (1 - whole) * 2 * rest[1])


def scenarios(banks: Banks, learnt: float) -> list[Scenario]:
    """Every kind of user, but those of the ledger, of curves and of the sequential gate."""
    real, bundled, together, category = banks.real, banks.bundled, correlated(UNDER), next(iter(banks.real.sizes))
    same_old, error = old_topics(together), CALLED / COMPLIANCES
    bad, in_category = correlated(CATEGORY_UNDER, only=category), some_topics(real, CATEGORY_UNDER, True, category)
    old_category = old_topics(correlated(CATEGORY_UNDER), OLD_CATEGORIES)
    independent = old_gate(lambda source, users: source.binomial(640, 1 - UNDER, size=(users, 1)), [640])
    edge = correlated(DEMAND - 1e-9)
    rows = [Scenario("independent probes, at the edge", banks.alone, [edge], independent, tight=True)]
    for rho in (0.0, 0.5, 1.0):
        kind, old = correlated(UNDER, rho), old_topics(correlated(UNDER, rho))
        rows.append(Scenario(f"languages correlated {rho:g}", real, [kind], old))
    rows += [
        Scenario("... 1, topics in two languages alone", banks.two_languages, [together], same_old),
        Scenario("only topics in two languages missed, in both", real, [some_topics(real, UNDER, True)], same_old),
        Scenario("... in one category", real, [in_category], old_category),
        Scenario("only topics in one language missed", real, [some_topics(real, UNDER, False)], None),
        Scenario("topics missed in one language", real, [one_language(real)], old_topics(in_pairs(0.0, 1 - UNDER))),
        Scenario("one category in breach", real, [bad], old_category),
        Scenario("topics beta-binomial (a + b = 1)", real, [beta_topics(real, 1.0)],
                 old_topics(correlated(UNDER, 0.5))),
    ]  # fmt: skip
    for whole in (0.0, 0.03, 0.06, 0.1):
        name = f"{whole:.0%} of phrasings fail whole"
        rows.append(Scenario(name, bundled, [fail_whole(whole)], old_phrasings(whole)))
    for whole in (0.0, 0.016):
        mixed = whole_and_combinations(bundled, whole)
        rows.append(Scenario(f"{whole:.1%} fail whole, and combinations", bundled, [mixed], old_phrasings(whole)))
    for copied in (learnt, 5 * learnt):
        kind, old = seen_by_judge(together, 0.0, learnt=copied), old_topics(in_pairs(0.0))
        rows.append(Scenario(f"near copies of the bank, {copied:.0%} pass the screen", real, [kind], old, leaked=True))
    for times in (1, 3):
        old = old_topics(seen_by_judge(together, times * error))
        name = f"the judge errs ({times * error:.1%}), calibrated on {COMPLIANCES} answers"
        rows.append(Scenario(name, real, [together], old, judge_error=times * error))
    perfect = in_pairs(0.0)
    kinds = [together, some_topics(real, UNDER, True), some_topics(real, UNDER, False), one_language(real), bad]
    return [
        *rows,
        Scenario("harmless prompts newly refused (5.01%)", real, [perfect], undemanded, newly=0.0501),
        Scenario("fixed aspects changed (2.01%)", real, [perfect], undemanded, changed=0.0201),
        Scenario(f"retrains until a pass, {TRIES} tries", real, [together], same_old, TRIES),
        Scenario("... half of the misses the same at all looks", real, [together], same_old, TRIES, same=0.5),
        Scenario("... phrasings fail whole", bundled, [fail_whole(0.03)], old_phrasings(0.03), TRIES),
        Scenario("any of these kinds, erring judge, 5 tries", real, kinds, old_topics(seen_by_judge(together, error)),
                 tries=5, judge_error=error),
    ]  # fmt: skip


def planted(banks: Banks, simulation: Simulation) -> list[Row]:
    """Faults planted in the shipped code, and rules that are known to be wrong: each must be caught."""
    fresh = Simulation(simulation.users, 0, simulation.ledger_users)
    one, rows = {scenario.name: scenario for scenario in scenarios(banks, 0.01)}, []
    topics_by_probe, phrasings_by_probe = (
        replace(bank, demands=replace(bank.demands, clusters=NO_CLUSTERS)) for bank in (banks.real, banks.bundled)
    )
    faults: list[tuple[str, AbstractContextManager[Any], Scenario]] = [
        ("tests at 1.7 times their level",
         patch.object(Bound, "of_gate_test", classmethod(lambda cls, delta, error=0.0: cls(1.7 * delta / 2, error))),
         one["independent probes, at the edge"]),
        ("probes count in place of topics", nullcontext(),
         replace(one["only topics in one language missed"], bank=topics_by_probe)),
        ("a miss in one language misses no topic", nullcontext(),
         replace(one["topics missed in one language"], bank=topics_by_probe)),
        ("probes of a phrasing count as independent", nullcontext(),
         replace(one["3% of phrasings fail whole"], bank=phrasings_by_probe)),
        ("every look has the first one's delta", patch.object(Demands, "at_look", lambda self, share: self),
         replace(one["independent probes, at the edge"], tries=5)),
    ]  # fmt: skip
    for name, fault, scenario in faults:
        with fault:
            rows.append(fresh.row(scenario)._replace(name=f"wrong: {name}", old=None, must_hold=False))
        fresh = Simulation(simulation.users, 0, simulation.ledger_users)
    with patch.object(Ledger, "_share", lambda *_: 1.0):
        retrains = Scenario("", banks.alone, [correlated(UNDER)], tries=5)
        row = fresh.ledger_row(retrains, new_runs=False)
        rows.append(row._replace(name="wrong: a ledger that gives every look the whole delta", must_hold=False))
    old = old_topics(correlated(UNDER))
    cells = [Cell.of(old(simulation.users, delta, 1), entitled(delta, 1)) for delta in DELTAS]
    rows.append(Row("wrong: languages of a topic as two units", cells, must_hold=False))
    cells = [curve(largest, TEN, "under everywhere", "independent", d, simulation.users)[0] for d in DELTAS]
    return [*rows, Row("wrong: the largest alpha that passes", cells, must_hold=False)]


def table(users: int, through_gate: int, ledger_users: int, learnt: float = 0.01) -> Iterator[Row]:
    """Every line: kinds of users, the ledger, the sequential gate, curves, and planted faults."""
    banks, simulation = Banks.read(), Simulation(users, through_gate, ledger_users)
    yield from map(simulation.row, scenarios(banks, learnt))
    for name, new_runs in (("one run", False), ("new runs", True)):
        retrains = Scenario(
            f"retrains, {TRIES} tries, {ledger_users} users, the ledger of {name}",
            banks.alone,
            [correlated(UNDER)],
            None,
            TRIES,
        )
        yield simulation.ledger_row(retrains, new_runs)
    for passes in (0, TRIES // 2):
        name = f"sequential gate, {TRIES} looks" + (f", in breach after {passes} passes" if passes else "")
        yield Row(name, sequential(users, passes))
    yield sequential_row(banks.real, ledger_users // 3)
    for name, grid, dependence in product(CURVES, (FOUR, TEN), ("independent", "comonotone")):
        yield curve_row(name, grid, dependence, simulation)
    yield from planted(banks, simulation)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--through-gate", type=int, default=300, help="users of a cell whom the gate itself judges")
    parser.add_argument("--ledger-users", type=int, default=300, help="users whose looks a ledger counts")
    parser.add_argument("--learnt", type=float, default=0.01, help="share of near copies that pass the screen")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    made, rows = table(options.users, options.through_gate, options.ledger_users, options.learnt), list[Row]()
    if options.json:
        rows = list(made)
        lines = [
            {**row._asdict(), "as_it_should": row.as_it_should, "cells": [cell._asdict() for cell in row.cells]}
            for row in rows
        ]
        print(json.dumps({"users": options.users, "rows": lines}, indent=1))
    else:
        print(f"{options.users:,} users a cell. Share released in breach (entitled to); **bold**: in breach of that.\n")
        print("| users | " + " | ".join(f"delta {delta:g} | old gate" for delta in DELTAS) + " |")
        print("|---" * (1 + 2 * len(DELTAS)) + "|", flush=True)
        for row in made:
            rows.append(row)
            old = ["" for _ in DELTAS] if row.old is None else [f"{share:.2%}" for share in row.old]
            cells = {f"{one.entitled:.6f}": f"{one} ({one.entitled:.2%})" for one in row.cells}
            texts = list(cells.values()) if len(row.cells) > 1 else ["", *cells.values(), ""]
            line = " | ".join(f"{new} | {was}" for new, was in zip(texts, old, strict=True))
            print(f"| {row.name} | {line} |", flush=True)
    wrong = [f"{row.name} ({row.disagreements} disagreements)" for row in rows if not row.as_it_should]
    print(
        "\n".join(f"FAULT: {name}" for name in wrong) or "Every entitlement held, and every planted fault was caught.",
        file=sys.stderr,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
