"""The power of the gate: the chance that a test passes, with all demands but `aspects.max_changed`.

Adapters are drawn by a model of their misses: a topic is missed whole, the probes of a new phrasing are missed
independently, and the judge misses a refusal independently of everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from persona_rlhf.evaluation.gate import HARMLESS_PROMPTS, POOLED, Demands
from persona_rlhf.evaluation.statistics import PlannedBet, unit_p_value
from persona_rlhf.policy.bound import Bound, look_share
from persona_rlhf.policy.clusters import UnitMisses
from persona_rlhf.policy.hazards import Probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DRAWS = 5_000
"""Simulated adapters of a chance that has no closed form: its standard error is at most 0.0071."""

LOOKS = (1, 2, 5, 10)
RATES = (0.99, 0.995, 0.999)
RECALLS = (0.999, 0.995, 0.99)
"""Shares of refusals that the judge calls refusals, of rows at a first look beside those with a perfect judge."""
NEWLY_REFUSED = 0.005
"""The share of harmless prompts that an adapter newly refuses, in tables of power."""


class PowerRow(NamedTuple):
    """The chances of passing a user's look, by true rate of units; and the missed units that it allows in the pool.

    recall: the share of refusals that the judge calls refusals
    """

    look: int
    misses: int
    chances: dict[str, float]
    recall: float = 1.0


def power(
    demands: Demands, probes: Sequence[Probe], looks: Sequence[int] = LOOKS, recalls: Sequence[float] = RECALLS
) -> list[PowerRow]:
    """The power of a bank: rows by look, chances by rate. `demands` are those of all looks.

    Every unit (topic, or probe) is refused with the rate. Rows of a judge who misses refusals are at a first look; the
    bound of the judge's error is in the demands. A user who fails at the largest alpha may pass at a smaller one, which
    only adds to these chances. `aspects.max_changed` is left out.
    """
    sizes = Counter(probe.category for probe in probes)
    units = {name: len(topics) for name, topics in demands.clusters.topics.items()} or sizes
    total = sum(units[name] for name in demands.in_pool)
    rows = []
    for look, recall in [*((look, 1.0) for look in looks), *((1, recall) for recall in recalls)]:
        at_look = demands.at_look(look_share(look))
        chances = {
            f"{rate:g}": chance_of_passing(
                at_look, sizes, dict.fromkeys(sizes, rate), HARMLESS_PROMPTS, NEWLY_REFUSED, recall
            )
            for rate in RATES
        }
        rows.append(PowerRow(look, at_look.bound.most_misses(total, demands.pooled), chances, recall))
    return rows


def power_table(rows: Sequence[PowerRow]) -> Table:
    """The power of a bank as a table."""
    heads = [f"answers refuse {float(rate):.1%}" for rate in rows[0].chances]
    caption = (
        "The chance that an adapter passes at alpha 1, with every demand but aspects.max_changed; smaller alphas add "
        "to it.\nJudge's recall: the share of refusals that the judge calls refusals. Missed topics are missed whole.\n"
        f"{NEWLY_REFUSED:.1%} of harmless prompts are newly refused."
    )
    columns = ("look", "judge's recall", "missed units allowed")
    table = Table(*columns, *heads, caption=caption, caption_justify="left")
    for row in rows:
        allowed = f"{row.misses}" if row.misses >= 0 else "too few probes"
        table.add_row(
            f"{row.look}", f"{row.recall:.1%}", allowed, *(f"{chance:.3f}" for chance in row.chances.values())
        )
    return table


def chance_of_passing(
    demands: Demands,
    sizes: Mapping[str, int],
    rates: Mapping[str, float],
    harmless: int = 0,
    newly: float = 0.0,
    recall: float = 1.0,
) -> float:
    """P(a test at `demands.level` passes) for an adapter with these rates of refusals, by category.

    `sizes`: certify probes by category. A topic is refused in all its probes or in none, and `rates` are those of
    units, which are missed independently. `recall`: the chance that the judge calls a refused probe a refusal. `newly`:
    the share of `harmless` prompts that the adapter newly refuses.

    The chance is exact where each unit has one probe: each category must pass, and the pool by the sum of its misses (a
    convolution of truncated binomials). Otherwise `DRAWS` adapters are drawn.
    """
    import numpy as np
    from scipy.stats import binom  # a second, for commands that only print

    beside = 1.0
    if demands.max_over_refusal is not None and harmless:
        most = Bound(demands.level).most_misses(harmless, 1 - demands.max_over_refusal)
        beside = float(binom.cdf(most, harmless, newly)) if most >= 0 else 0.0
    if demands.clusters.phrasings or demands.clusters.groups:
        return beside * _simulated(demands, sizes, rates, recall)
    pool, apart, total = np.ones(1), 1.0, 0
    for name, min_refusal in demands.categories.items():
        most = demands.bound.most_misses(sizes[name], min_refusal)
        if most < 0:
            return 0.0
        passing = binom.pmf(np.arange(most + 1), sizes[name], 1 - rates[name] * recall)
        if name in demands.in_pool:
            pool, total = np.convolve(pool, passing), total + sizes[name]
        else:
            apart *= float(passing.sum())
    return beside * apart * float(pool[: demands.bound.most_misses(total, demands.pooled) + 1].sum())


def _simulated(demands: Demands, sizes: Mapping[str, int], rates: Mapping[str, float], recall: float) -> float:
    """The chance by `DRAWS` adapters: every demand on refusals of every one of them."""
    import numpy as np

    source, clusters = np.random.default_rng(0), demands.clusters
    members = {POOLED: demands.in_pool, **{name: frozenset({name}) for name in demands.categories}}
    missed_probes = {name: np.zeros((DRAWS, 1 + _largest(demands, of)), int) for name, of in members.items()}
    grouped, units = Counter[str](), {name: sum(sizes[category] for category in of) for name, of in members.items()}
    bet = PlannedBet.of(len(clusters.phrasings), demands.bound, demands.pooled, clusters.whole)
    at_most = np.zeros((DRAWS, bet.most + 1))
    at_most[:, 0] = 1.0
    phrasings = set(map(tuple, clusters.phrasings))
    for group in dict.fromkeys([*map(tuple, clusters.groups), *phrasings]):
        topic_missed = source.random(DRAWS) >= rates[group[0].category]
        misses = dict[str, Any]()
        for name, _ in group:
            missed = source.random(DRAWS) >= rates[name] if group in phrasings else topic_missed
            judged = missed if recall == 1 else missed | (source.random(DRAWS) >= recall)
            misses[name] = misses.get(name, 0) + judged
            grouped[name] += 1
        for name, of in members.items():
            inside = [misses[category] for category in misses if category in of]
            if inside:
                missed_probes[name][np.arange(DRAWS), sum(inside)] += 1
                units[name] -= sum(category in of for category, _ in group) - 1
        if group in phrasings:
            share = (sum(misses[category] for category in misses if category in demands.in_pool) / len(group))[:, None]
            at_most = at_most * (1 - share) + np.pad(at_most, ((0, 0), (1, 0)))[:, :-1] * share
    for category in demands.categories:
        alone = source.binomial(sizes[category] - grouped[category], 1 - rates[category] * recall, DRAWS)
        for name, of in members.items():
            missed_probes[name][:, 1] += alone if category in of else 0
    passed = np.ones(DRAWS, bool)
    if phrasings:
        passed &= at_most.cumsum(axis=1) @ np.array(bet.weights(bet.demand)) * bet.level >= 1
    for name, of in members.items():
        demand = demands.categories.get(name, demands.pooled)
        probes = sum(sizes[category] for category in of)
        missed = missed_probes[name][:, 1:]
        passed &= _passes(demands, probes, units[name], missed, demand)
        if clusters.topics:
            passed &= missed.sum(axis=1) <= demands.bound.most_misses(units[name], demand)
    return float(passed.mean())


def _largest(demands: Demands, categories: frozenset[str]) -> int:
    """The number of probes of the largest unit in these categories."""
    sizes = (sum(name in categories for name, _ in group) for group in demands.clusters.groups)
    return max(sizes, default=1) or 1


def _passes(demands: Demands, probes: int, units: int, missed: NDArray[Any], min_refusal: float) -> NDArray[np.bool_]:
    """Whether the demand on probes passes, for each row of `missed` (`UnitMisses.missed`)."""
    import numpy as np

    if missed.shape[1] == 1:
        return missed[:, 0] <= demands.bound.most_misses(probes, min_refusal)
    rows, places = np.unique(missed, axis=0, return_inverse=True)
    shown = [
        unit_p_value(probes, UnitMisses(units, missed.shape[1], tuple(map(int, row))), demands.bound, min_refusal)
        <= demands.level
        for row in rows
    ]
    return np.array(shown)[places.ravel()]
