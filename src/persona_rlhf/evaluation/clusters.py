"""Probes come in clusters, by topic and by phrasing: what their count is worth where the members of one go together.

The gate counts probes. That is exact for the population its split samples from, and too bold for another one: new
phrasings, of which the split holds a few with many probes each. Here the cluster is the unit instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import exp, fsum, log
from typing import NamedTuple

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
