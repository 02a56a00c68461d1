"""The power of the gate: the chance that a first test passes, all demands and shares of delta together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from persona_rlhf.evaluation.gate import HARMLESS_PROMPTS, Demands
from persona_rlhf.evaluation.statistics import PlannedBet
from persona_rlhf.policy.bound import Bound, look_share
from persona_rlhf.policy.hazards import Probe

DRAWS = 20_000
"""Simulated adapters of a chance that has no closed form: its standard error is at most 0.0035."""

LOOKS = (1, 2, 5, 10)
RATES = (0.99, 0.995, 0.999)
NEWLY_REFUSED = 0.005
"""The share of harmless prompts that an adapter newly refuses, in tables of power."""


class PowerRow(NamedTuple):
    """The chances of passing a user's look, by true rate; and the misses that it allows in the pool."""

    look: int
    misses: int
    chances: dict[str, float]


def power(demands: Demands, probes: Sequence[Probe], looks: Sequence[int] = LOOKS) -> list[PowerRow]:
    """The power of a bank: rows by look, chances by rate, all demands together. `demands` are those of all looks.

    Every unit (topic, or probe) is refused with the rate, and judged rightly; the bound of the judge's error is in the
    demands. A user who fails at the largest alpha may pass at a smaller one, which only adds to these chances.
    """
    sizes = Counter(probe.category for probe in probes)
    units = {name: len(topics) for name, topics in demands.clusters.topics.items()} or sizes
    total = sum(units[name] for name in demands.in_pool)
    rows = []
    for look in looks:
        at_look = demands.at_look(look_share(look))
        chances = {
            f"{rate:g}": chance_of_passing(at_look, sizes, dict.fromkeys(sizes, rate), HARMLESS_PROMPTS, NEWLY_REFUSED)
            for rate in RATES
        }
        rows.append(PowerRow(look, at_look.bound.most_misses(total, demands.pooled), chances))
    return rows


def power_table(rows: Sequence[PowerRow]) -> Table:
    """The power of a bank as a table."""
    heads = [f"refuses {float(rate):.1%}" for rate in rows[0].chances]
    caption = "The chance that an adapter passes at alpha 1, all demands together; smaller alphas add to it."
    table = Table("look", "misses allowed", *heads, caption=caption, caption_justify="left")
    for row in rows:
        allowed = f"{row.misses}" if row.misses >= 0 else "too few probes"
        table.add_row(f"{row.look}", allowed, *(f"{chance:.3f}" for chance in row.chances.values()))
    return table


def chance_of_passing(
    demands: Demands, sizes: Mapping[str, int], rates: Mapping[str, float], harmless: int = 0, newly: float = 0.0
) -> float:
    """P(a test at `demands.level` passes) for an adapter with these rates of judged refusals, by category.

    `sizes`: certify probes by category; a category whose bank is split by topic has topics for units, and `rates` are
    of those. Units are missed independently. `newly`: the share of `harmless` prompts that the adapter newly refuses.

    The chance is exact where no phrasing is new: each category must pass, and the pool by the sum of its misses (a
    convolution of truncated binomials). A topic that is missed is taken to be missed in one probe, so the probes pass
    where their topics do. With new phrasings, the pass of the bet on them is drawn `DRAWS` times.
    """
    import numpy as np
    from scipy.stats import binom  # a second, for commands that only print

    beside = 1.0
    if demands.max_over_refusal is not None and harmless:
        most = Bound(demands.level).most_misses(harmless, 1 - demands.max_over_refusal)
        beside = float(binom.cdf(most, harmless, newly)) if most >= 0 else 0.0
    units = {name: len(topics) for name, topics in demands.clusters.topics.items()}
    sizes = {**sizes, **units}
    if demands.clusters.phrasings:
        return beside * _simulated(demands, sizes, rates)
    pool, apart, total = np.ones(1), 1.0, 0
    for name, min_refusal in demands.categories.items():
        most = demands.bound.most_misses(sizes[name], min_refusal)
        if most < 0:
            return 0.0
        passing = binom.pmf(np.arange(most + 1), sizes[name], 1 - rates[name])
        if name in demands.in_pool:
            pool, total = np.convolve(pool, passing), total + sizes[name]
        else:
            apart *= float(passing.sum())
    return beside * apart * float(pool[: demands.bound.most_misses(total, demands.pooled) + 1].sum())


def _simulated(demands: Demands, sizes: Mapping[str, int], rates: Mapping[str, float]) -> float:
    """The chance by `DRAWS` adapters, each with the same probes of new phrasings and other units."""
    import numpy as np

    source, clusters = np.random.default_rng(0), demands.clusters
    bet = PlannedBet.of(len(clusters.phrasings), demands.bound, demands.pooled, clusters.whole)
    passed, misses = np.ones(DRAWS, bool), {name: np.zeros(DRAWS, int) for name in demands.categories}
    within: Counter[str] = Counter()
    at_most = np.zeros((DRAWS, bet.most + 1))
    at_most[:, 0] = 1.0
    for probes in clusters.phrasings:
        missed = np.zeros(DRAWS, int)
        for name, _ in probes:
            fails = source.random(DRAWS) >= rates[name]
            misses[name] += fails
            missed += fails
            within[name] += 1
        share = (missed / len(probes))[:, None]
        shifted = np.pad(at_most, ((0, 0), (1, 0)))[:, :-1]
        at_most = at_most * (1 - share) + shifted * share
    passed &= at_most.cumsum(axis=1) @ np.array(bet.weights(bet.demand)) * bet.level >= 1
    pooled, total = np.zeros(DRAWS, int), 0
    for name, min_refusal in demands.categories.items():
        misses[name] += source.binomial(sizes[name] - within[name], 1 - rates[name], DRAWS)
        passed &= misses[name] <= demands.bound.most_misses(sizes[name], min_refusal)
        if name in demands.in_pool:
            pooled, total = pooled + misses[name], total + sizes[name]
    passed &= pooled <= demands.bound.most_misses(total, demands.pooled)
    return float(passed.mean())
