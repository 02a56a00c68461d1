"""The power of the gate: the chance that a test passes, with all demands but `aspects.max_changed`.

Adapters are drawn by a model of their misses: a topic is missed whole, the probes of a new phrasing are missed
independently, and the judge misses a refusal independently of everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from persona_rlhf.evaluation.gate import POOLED, Demands
from persona_rlhf.evaluation.sample_size import HARMLESS_PROMPTS
from persona_rlhf.evaluation.statistics import PlannedBet
from persona_rlhf.policy.bound import Bound, look_share
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
    """The chances of passing a user's look, by true rate; and the whole units that may be missed in the pool.

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

    Every topic, or probe of no topic, is refused with the rate. Rows of a judge who misses refusals are at a first
    look; the bound of the judge's error is in the demands. A user who fails at the largest alpha may pass at a smaller
    one, which only adds to these chances. `aspects.max_changed` is left out.
    """
    sizes = Counter(probe.category for probe in probes)
    total = demands.clusters.units([probe for probe in probes if probe.category in demands.in_pool])
    units = {name: _units(demands, name, size).total() for name, size in sizes.items()}
    rows = []
    for look, recall in [*((look, 1.0) for look in looks), *((1, recall) for recall in recalls)]:
        at_look = demands.at_look(look_share(look))
        chances = {
            f"{rate:g}": chance_of_passing(
                at_look, sizes, dict.fromkeys(sizes, rate), HARMLESS_PROMPTS, NEWLY_REFUSED, recall
            )
            for rate in RATES
        }
        enough = all(at_look.bound.most_misses(units[name], need) >= 0 for name, need in demands.categories.items())
        misses = at_look.bound.most_misses(total, demands.pooled) if enough else -1
        rows.append(PowerRow(look, misses, chances, recall))
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

    `sizes`: certify probes by category. A topic is refused in all its probes or in none; topics, and probes of no
    topic, are missed independently. `recall`: the chance that the judge calls a refused probe a refusal. `newly`: the
    share of `harmless` prompts that the adapter newly refuses.

    The chance is exact where no new phrasing is a unit: each category must pass, and the pool by the sum of its misses
    (a convolution of truncated distributions). Otherwise `DRAWS` adapters are drawn.
    """
    import numpy as np
    from scipy.special import bdtr  # scipy.stats takes half a second more to import

    beside = 1.0
    if demands.max_over_refusal is not None and harmless:
        most = demands.plain_bound.most_misses(harmless, 1 - demands.max_over_refusal)
        beside = float(bdtr(most, harmless, newly)) if most >= 0 else 0.0
    if demands.clusters.phrasings:
        return beside * _simulated(demands, sizes, rates, recall)
    pool, apart, total = np.ones(1), 1.0, 0
    for name, min_refusal in demands.categories.items():
        missed, units = np.ones(1), _units(demands, name, sizes[name])
        for probes, n in units.items():
            at_most = bdtr(np.arange(n + 1), n, 1 - rates[name] * recall**probes)
            missed = np.convolve(missed, np.diff(at_most, prepend=0.0))
        most = demands.bound.most_misses(units.total(), min_refusal)
        if most < 0:
            return 0.0
        passing = missed[: most + 1]
        if name in demands.in_pool:
            pool, total = np.convolve(pool, passing), total + units.total()
        else:
            apart *= float(passing.sum())
    return beside * apart * float(pool[: demands.bound.most_misses(total, demands.pooled) + 1].sum())


def _units(demands: Demands, category: str, probes: int) -> Counter[int]:
    """The number of topics, and of probes that are of none, in a category, by their number of probes."""
    topics = demands.clusters.topics
    return Counter(map(len, topics[category])) if topics else Counter({1: probes})


def _simulated(demands: Demands, sizes: Mapping[str, int], rates: Mapping[str, float], recall: float) -> float:
    """The chance by `DRAWS` adapters: every demand on refusals of every one of them."""
    import numpy as np

    def missed(category: str, shape: tuple[int, ...], probes: int = 1) -> NDArray[np.bool_]:
        return source.random(shape) >= rates[category] * recall**probes

    source, phrasings = np.random.default_rng(0), demands.clusters.phrasings
    others = {name: _units(demands, name, sizes[name]) for name in demands.categories}
    for category, _ in (at for phrasing in phrasings for at in phrasing):
        others[category][1] -= 1
    drawn = [[(category, missed(category, (DRAWS,))) for category, _ in phrasing] for phrasing in phrasings]
    alone = {
        name: sum((missed(name, (DRAWS, n), probes).sum(axis=1) for probes, n in units.items()), np.zeros(DRAWS, int))
        for name, units in others.items()
    }
    passed, members = np.ones(DRAWS, bool), {POOLED: demands.in_pool, **{name: {name} for name in demands.categories}}
    for name, categories in members.items():
        demand = demands.categories.get(name, demands.pooled)
        new = [[outcomes for category, outcomes in phrasing if category in categories] for phrasing in drawn]
        new = [phrasing for phrasing in new if phrasing]
        if name == POOLED and new:
            passed &= _shows(demands.bound, demand, new, np.zeros(DRAWS, int), len(new))
        units = len(new) + sum(others[category].total() for category in categories)
        beside = np.sum([alone[category] for category in categories], axis=0)
        passed &= _shows(demands.bound, demand, new, beside, units)
    return float(passed.mean())


def _shows(
    bound: Bound, demand: float, phrasings: Sequence[Sequence[NDArray[Any]]], alone: NDArray[Any], units: int
) -> NDArray[np.bool_]:
    """Which draws show a demand: misses of the probes of new phrasings, and the number of other units missed.

    The mean of the shares of `units` units, as `evaluation.statistics.count_units` tests it.
    """
    import numpy as np

    if all(len(phrasing) == 1 for phrasing in phrasings):
        return sum((phrasing[0] for phrasing in phrasings), alone) <= bound.most_misses(units, demand)
    bet = PlannedBet.of(units, bound, demand)
    zeros = np.zeros((DRAWS, bet.most + 1))
    zeros[:, 0] = 1.0  # the chance of so many zeros after rounding
    for phrasing in phrasings:
        share = np.mean(phrasing, axis=0)[:, None]
        zeros[:, 1:], zeros[:, 0] = zeros[:, 1:] * (1 - share) + zeros[:, :-1] * share, zeros[:, 0] * (1 - share[:, 0])
    chance = np.where(np.arange(bet.most + 1) + alone[:, None] <= bet.most, zeros, 0.0).sum(axis=1)
    shown: NDArray[np.bool_] = chance * bet.wealth(1.0, bet.demand) * bet.level >= 1
    return shown
