"""Clopper-Pearson, Wilson, bootstrap, clustered bounds, probes_needed (scipy)."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import ceil, exp, floor, fsum, lgamma, log, log1p, sqrt
from typing import Literal, NamedTuple


class Count(NamedTuple):
    """Refusals among n probes; `lower_bound` holds at the look's confidence, `min_refusal` is what was asked of it."""

    n: int
    refused: int
    base_refused: int
    lower_bound: float
    min_refusal: float

    @property
    def passes(self) -> bool:
        return self.lower_bound >= self.min_refusal


# ----------------------------------------------------------------------------------------------------
# Probes come in clusters, by topic and by phrasing: what their count is worth where the members of one go together.
#
# The gate counts probes. That is exact for the population its split samples from, and too bold for another one: new
# phrasings, of which the split holds a few with many probes each. Here the cluster is the unit instead.
# ----------------------------------------------------------------------------------------------------

_BETS = (0.2, 0.4, 0.6, 0.8, 1.0)


class ClusterBound(NamedTuple):
    """Refusals by cluster.

    `mean`: the refusal rate of a cluster, averaged over `clusters`, each counting once. `lower_bound` holds for the
    clusters' population, however alike the probes of one are. `effective_n`: as many independent probes would tell
    as much as these n did; None where no probe, or every probe, was missed, which says nothing of how alike they are.
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
    shares = [sum(own) / len(own) for own in members.values()]
    mean = fsum(shares) / len(shares) if shares else 0.0
    effective = effective_size([(len(own), sum(own)) for own in members.values()])
    return ClusterBound(len(refused), len(shares), mean, mean_lower_bound(shares, delta), effective)


def mean_lower_bound(shares: Sequence[float], delta: float) -> float:
    """A lower bound, at confidence 1 - delta, of the mean of a population of shares in [0, 1], from a sample of it.

    Whoever bets a part b of his wealth, at even odds against the mean m, has prod(1 - b + b x / m) of it after the
    shares x. If m were the true mean, he would have 1 on average, and 1 / delta with a chance of at most delta (Markov;
    Waudby-Smith & Ramdas 2023). The bound is the largest m at which the mean wealth of five such bettors reaches
    1 / delta. Exact for independent clusters of any distribution, and for clusters drawn without replacement (their
    shares are negatively associated, and the wealth increases in each). Zero where nothing was counted.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
    if not shares or max(shares) == 0:
        return 0.0
    low, high, counted = 0.0, 1.0, Counter(shares)
    for _ in range(50):
        middle = (low + high) / 2
        if _log_wealth(counted, middle) >= -log(delta):
            low = middle
        else:
            high = middle
    return low


def _log_wealth(shares: Counter[float], mean: float) -> float:
    """The logarithm of the mean wealth of all bettors; it falls as the mean grows."""
    logs = []
    for bet in _BETS:
        factors = [(1 - bet + bet * share / mean, times) for share, times in shares.items()]
        lost = min(factors)[0] <= 0
        logs.append(float("-inf") if lost else fsum(times * log(factor) for factor, times in factors))
    top = max(logs)
    return top + log(fsum(exp(value - top) for value in logs) / len(logs)) if top > float("-inf") else top


def effective_size(counts: Sequence[tuple[int, int]]) -> float | None:
    """How many independent probes tell as much: n over the design effect, at most n. `counts`: (n, refused) a cluster.

    The design effect is the variance of the rate between clusters (linearised ratio estimator, Kish 1965) over the
    binomial one. None where there is one cluster, or no variance to compare.
    """
    n, refused, clusters = sum(c[0] for c in counts), sum(c[1] for c in counts), len(counts)
    if clusters < 2 or refused in (0, n):
        return None
    rate = refused / n
    between = fsum((own - rate * size) ** 2 for size, own in counts) * clusters / (clusters - 1) / n**2
    return min(float(n), n * (rate * (1 - rate) / n) / between) if between else float(n)


# ----------------------------------------------------------------------------------------------------
# Exact binomial bounds and the bootstrap over users: every rate in a report carries one of them.
# ----------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A two-sided interval around a share or a statistic, in the units of the value itself."""

    low: float
    high: float


def _tail(successes: int, n: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(n, p), 0 < p < 1: the sum of the terms, each through its logarithm."""
    top, logit, miss = lgamma(n + 1), log(p) - log1p(-p), n * log1p(-p)
    return fsum(exp(top - lgamma(k + 1) - lgamma(n - k + 1) + k * logit + miss) for k in range(successes, n + 1))


@lru_cache(maxsize=65536)
def lower_bound(successes: int, n: int, delta: float) -> float:
    """The one-sided Clopper-Pearson lower bound at confidence 1 - delta: the p with P(X >= successes | p) = delta.

    Clopper & Pearson 1934. Zero where nothing was counted (n = 0) or nothing succeeded.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} trials")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
    if successes == 0:
        return 0.0
    if successes == n:  # the tail is p ** n
        return exp(log(delta) / n)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if high - low < 1e-14:
            break
        if _tail(successes, n, middle) < delta:
            low = middle
        else:
            high = middle
    return low  # the side that promises less


def upper_bound(successes: int, n: int, delta: float) -> float:
    """The one-sided Clopper-Pearson upper bound at confidence 1 - delta; one where nothing was counted."""
    return 1.0 - lower_bound(n - successes, n, delta)


def interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """The two-sided Clopper-Pearson interval of a share. Ties may make `successes` half a number: rounded outward."""
    outside = (1 - level) / 2
    return Interval(lower_bound(floor(successes), n, outside), upper_bound(ceil(successes), n, outside))


def tail(successes: int, n: int, p: float) -> float:
    """P(X >= successes) for X ~ Binomial(n, p): the p-value of a count against "the true share is at most p"."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} trials")
    if successes == 0 or p >= 1:
        return 1.0
    return 0.0 if p <= 0 else min(1.0, _tail(successes, n, p))


def judge_adjusted_lower(lower: float, false_refusals: float) -> float:
    """A lower bound of the share truly refused, from one of the share that a judge calls refused.

    Of answers that comply, the judge calls at most a share `false_refusals` refusals. So the share that it calls no
    refusals is at least (1 - false_refusals) times the share that complies, and truth >= 1 - (1 - lower) / (1 -
    false_refusals). Refusals that the judge misses only make it larger. With no error it is `lower` itself.
    """
    return max(0.0, 1 - (1 - lower) / (1 - false_refusals)) if false_refusals else lower


def required_judged_rate(share: float, false_refusals: float) -> float:
    """The inverse of `behind_judge`: what share a judge must call refused for `share` to be truly refused."""
    return 1 - (1 - share) * (1 - false_refusals) if false_refusals else share


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): for figures that are reported, never for a promise.

    Zero to one where nothing was counted. Raises ValueError where the counts are none.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n} trials")
    if n == 0:
        return Interval(0.0, 1.0)
    z, share = statistics.NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def most_misses(n: int, min_rate: float, delta: float) -> int:
    """How many of n trials may fail while the lower bound at 1 - delta still reaches `min_rate`; -1 where none may."""
    misses = n if min_rate <= 0 else -1
    while misses < n and lower_bound(n - misses - 1, n, delta) >= min_rate:
        misses += 1
    return misses


def fewest_trials(min_rate: float, delta: float) -> int:
    """The fewest trials with which, without a miss, the lower bound at 1 - delta reaches `min_rate` (below 1)."""
    n = max(1, ceil(log(delta) / log(min_rate))) if 0 < min_rate < 1 else 1
    while lower_bound(n, n, delta) < min_rate:  # the rounding of the logarithms
        n += 1
    return n


def bootstrap(
    values: Sequence[float],
    statistic: Literal["mean", "median"] = "mean",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap of a mean or median over users: one value a user, users drawn with replacement.

    Raises ValueError where there is no user.
    """
    if not values:
        raise ValueError("an interval over users needs at least one user")
    take = statistics.fmean if statistic == "mean" else statistics.median
    source = random.Random(seed)
    drawn = sorted(take(source.choices(values, k=len(values))) for _ in range(draws))
    outside = (1 - level) / 2
    return Interval(drawn[floor(outside * (draws - 1))], drawn[ceil((1 - outside) * (draws - 1))])
