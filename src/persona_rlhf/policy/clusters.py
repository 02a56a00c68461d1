"""Clusters of certify probes: probes that share a topic or a new phrasing depend on each other, so they are one unit.

**Sampling model.** The promise is about requests like those of the policy's banks, and a keyed hash draws its sample:

- From a bank split by topic it draws whole topics. A topic is one unit: a miss in any language or wording misses it.
  Nothing is assumed about probes of the same topic.
- From a bank split by topic and phrasing it draws new phrasings, each a unit that scores its share of refusals, and
  new combinations of trained topics and phrasings, each a unit of its own. Nothing is assumed about probes of the same
  new phrasing.

Units are independent draws, or draws without replacement from a finite bank, of each stratum (category, kind of unit).
Both are covered. The number of misses in a sample without replacement is a sum of independent Bernoulli variables,
since its generating function has real roots only (Vatutin & Mikhailov 1982; so it stays where shares are rounded at
random, `evaluation.statistics.count_shares`). Sums over strata are such sums too. Of all such sums with the same mean,
the binomial one is the likeliest to show at most k misses, for k below the mean by one or more (Hoeffding 1956).

A pass needs the demand to hold for probes and for their clusters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import fsum
from typing import NamedTuple

from persona_rlhf.policy.hazards import Probe

Outcomes = Mapping[str, Sequence[bool]]
"""By category: was each probe refused. The probes and their order are the same in every test."""


class ProbePlace(NamedTuple):
    """A probe by its category and its place among the probes of it."""

    category: str
    place: int


class Unit(NamedTuple):
    """A topic, or a probe that stands alone: the places of its probes among those of its category."""

    category: str
    places: Sequence[int]

    def refused(self, outcomes: Outcomes) -> bool:
        """Whether all its probes are refused."""
        return all(outcomes[self.category][place] for place in self.places)


class Clusters(NamedTuple):
    """The clusters of certify probes.

    `topics`: by category, the places of the probes of each topic; a probe of a bank that is not split by topic stands
    alone. Empty where no bank is split by topic. `phrasings`: the probes of each new phrasing, in the pool.
    """

    topics: Mapping[str, Sequence[Sequence[int]]]
    phrasings: Sequence[Sequence[ProbePlace]]

    @staticmethod
    def of(probes: Iterable[Probe], in_pool: Collection[str]) -> Clusters:
        """The clusters of certify probes; `in_pool` are the categories whose phrasings count."""
        topics: dict[str, dict[tuple[str, int], list[int]]] = {}
        phrasings: dict[str, list[ProbePlace]] = {}
        places: dict[str, int] = {}
        for probe in probes:
            place = places[probe.category] = places.get(probe.category, -1) + 1
            alone = 0 if probe.novelty == "topic" else 1 + place
            topics.setdefault(probe.category, {}).setdefault(("" if alone else probe.topic, alone), []).append(place)
            if has_new_phrasing(probe) and probe.category in in_pool:
                phrasings.setdefault(probe.phrasing, []).append(ProbePlace(probe.category, place))
        by_topic = {category: list(units.values()) for category, units in topics.items()}
        if all(len(unit) == 1 for units in by_topic.values() for unit in units):
            by_topic = {}  # every topic has one probe: the count of probes is the count of topics
        return Clusters(by_topic, list(phrasings.values()))

    def units(self, probes: Sequence[Probe]) -> int:
        """The number of units among the probes of some categories: topics, or probes that stand alone."""
        if not self.topics:
            return len(probes)
        return sum(len(self.topics.get(category, [])) for category in {probe.category for probe in probes})

    def units_of(self, outcomes: Outcomes) -> list[Unit]:
        """All units: topics, and where no bank has several probes of a topic, probes."""
        topics = self.topics or {name: [[place] for place in range(len(each))] for name, each in outcomes.items()}
        return [Unit(category, places) for category, units in topics.items() for places in units]

    @property
    def whole(self) -> bool:
        """Whether each new phrasing has one probe, so that its share of refusals is 0 or 1."""
        return all(len(unit) == 1 for unit in self.phrasings)

    def by_topic(self, outcomes: Outcomes) -> dict[str, list[bool]]:
        """By category: was every probe of a topic refused."""
        return {
            category: [all(outcomes[category][place] for place in unit) for unit in units]
            for category, units in self.topics.items()
        }

    def by_phrasing(self, outcomes: Outcomes) -> list[float]:
        """The share of refusals of each new phrasing."""
        return [fsum(outcomes[name][place] for name, place in unit) / len(unit) for unit in self.phrasings]


NO_CLUSTERS = Clusters({}, [])


def has_new_phrasing(probe: Probe) -> bool:
    """Whether the probe is of a phrasing that no trained probe has. A row without a `phrasing` has none."""
    return probe.novelty == "phrasing" and probe.phrasing != probe.prompt
