"""Intervals of reported figures: Clopper-Pearson, Wilson, bootstrap over users, and bounds by cluster of probes."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from math import ceil, exp, floor, fsum, log
from typing import Literal, NamedTuple

from persona_rlhf.policy.bound import Bound

_BETS = (0.2, 0.4, 0.6, 0.8, 1.0)


class Count(NamedTuple):
    """Refusals among n probes; `lower_bound` holds at the test's confidence, `min_refusal` is the policy's demand."""

    n: int
    refused: int
    base_refused: int
    lower_bound: float
    min_refusal: float

    @property
    def passes(self) -> bool:
        return self.lower_bound >= self.min_refusal


class ClusterBound(NamedTuple):
    """Refusals by cluster: probes of one topic or phrasing depend on each other, so a cluster is the unit.

    `mean`: the refusal rate of a cluster, averaged over `clusters`, each counting once. `lower_bound` holds for the
    population of clusters, however alike the probes of one are. `effective_n`: the number of independent probes that
    would carry as much information as these n. It is None where no probe, or every probe, was missed: such counts do
    not show how alike probes are.
    """

    n: int
    clusters: int
    mean: float
    lower_bound: float
    effective_n: float | None


class Clustered(NamedTuple):
    """The same probes by topic and by phrasing."""

    topics: ClusterBound
    phrasings: ClusterBound


def by_cluster(refused: Sequence[bool], clusters: Sequence[Hashable], delta: float) -> ClusterBound:
    """Counts refusals by the cluster of each probe, with a lower bound at confidence 1 - delta."""
    members: dict[Hashable, list[bool]] = {}
    for cluster, outcome in zip(clusters, refused, strict=True):
        members.setdefault(cluster, []).append(outcome)
    shares = [sum(outcomes) / len(outcomes) for outcomes in members.values()]
    mean = fsum(shares) / len(shares) if shares else 0.0
    effective = effective_size([(len(outcomes), sum(outcomes)) for outcomes in members.values()])
    return ClusterBound(len(refused), len(shares), mean, mean_lower_bound(shares, delta), effective)


def mean_lower_bound(shares: Sequence[float], delta: float) -> float:
    """The lower bound, at confidence 1 - delta, of the mean of a population of shares in [0, 1], from a sample of it.

    A bettor who stakes a part b of a wealth of 1, at even odds against the mean m, holds prod(1 - b + b x / m) after
    the shares x. If m were the true mean, that would be 1 on average, and reach 1 / delta with a chance of at most
    delta (Markov; Waudby-Smith & Ramdas 2023). The bound is the largest m at which the mean wealth of five such bettors
    reaches 1 / delta. It is exact for independent clusters of any distribution. It also holds for clusters drawn
    without replacement: their shares are negatively associated, and the wealth increases in each. Zero where nothing
    was counted.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
    if not shares or max(shares) == 0:
        return 0.0
    low, high, times = 0.0, 1.0, Counter(shares)
    for _ in range(50):
        middle = (low + high) / 2
        if _log_wealth(times, middle) >= -log(delta):
            low = middle
        else:
            high = middle
    return low


def _log_wealth(shares: Counter[float], mean: float) -> float:
    """The logarithm of the mean wealth of all bettors; it falls as the mean grows."""
    logs = []
    for bet in _BETS:
        factors = [(1 - bet + bet * share / mean, times) for share, times in shares.items()]
        bankrupt = min(factors)[0] <= 0
        logs.append(float("-inf") if bankrupt else fsum(times * log(factor) for factor, times in factors))
    top = max(logs)
    return top + log(fsum(exp(value - top) for value in logs) / len(logs)) if top > float("-inf") else top


def effective_size(counts: Sequence[tuple[int, int]]) -> float | None:
    """The number of independent probes worth as much: n over the design effect, at most n.

    `counts`: (n, refused) of each cluster. The design effect is the variance of the rate between clusters (linearised
    ratio estimator, Kish 1965) over the binomial one. None where there is one cluster, or no variance to compare.
    """
    n, refused, clusters = sum(c[0] for c in counts), sum(c[1] for c in counts), len(counts)
    if clusters < 2 or refused in (0, n):
        return None
    rate = refused / n
    between = fsum((hits - rate * size) ** 2 for size, hits in counts) * clusters / (clusters - 1) / n**2
    return min(float(n), n * (rate * (1 - rate) / n) / between) if between else float(n)


class Interval(NamedTuple):
    """A two-sided interval around a share or a statistic, in the units of the value itself."""

    low: float
    high: float


def upper_bound(successes: int, n: int, delta: float) -> float:
    """The one-sided Clopper-Pearson upper bound at confidence 1 - delta; one where nothing was counted."""
    return 1.0 - Bound(delta).lower(n - successes, n)


def interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """The two-sided Clopper-Pearson interval of a share. Ties may make `successes` half a number: rounded outward."""
    outside = (1 - level) / 2
    return Interval(Bound(outside).lower(floor(successes), n), upper_bound(ceil(successes), n, outside))


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): for reported figures, never for a guarantee.

    Zero to one where nothing was counted. Raises ValueError for counts that cannot be.
    """
    from scipy.stats import binomtest  # a second, for commands that only print

    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} trials")
    if n == 0:
        return Interval(0.0, 1.0)
    low, high = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(low), float(high))


def bootstrap(
    values: Sequence[float],
    statistic: Literal["mean", "median"] = "mean",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap of a mean or median over users: one value a user, users drawn with replacement.

    Raises ValueError where there is no user. `scipy.stats.bootstrap` draws from numpy's generators: its ends would
    differ from those in every report written so far.
    """
    if not values:
        raise ValueError("an interval over users needs at least one user")
    take = statistics.fmean if statistic == "mean" else statistics.median
    source = random.Random(seed)
    drawn = sorted(take(source.choices(values, k=len(values))) for _ in range(draws))
    outside = (1 - level) / 2
    return Interval(drawn[floor(outside * (draws - 1))], drawn[ceil((1 - outside) * (draws - 1))])
