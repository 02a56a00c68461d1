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

**Demands on probes.** Their null hypothesis is about the rate of probes, and their test counts units: a unit scores its
number of missed probes (`Clusters.misses`, `evaluation.statistics.unit_p_value`). A demand on topics or phrasings does
not imply it: an adapter may miss just the largest units. Where every unit has one probe, the test is the binomial one.

A pass needs the demand to hold for probes and for their clusters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
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


class UnitMisses(NamedTuple):
    """The probes of a demand by unit: `largest` is the number of probes of the largest unit.

    missed: the number of units with one missed probe, with two, and so on, up to `largest`
    """

    units: int
    largest: int
    missed: tuple[int, ...]


class Clusters(NamedTuple):
    """The clusters of certify probes.

    topics: by category, the places of the probes of each unit (topic, new phrasing within the category, or single
        probe); empty where no topic has several probes
    phrasings: the probes of each new phrasing, in the pool
    groups: the topics, and the new phrasings over all categories, that have several probes; other probes stand alone
    """

    topics: Mapping[str, Sequence[Sequence[int]]]
    phrasings: Sequence[Sequence[ProbePlace]]
    groups: Sequence[Sequence[ProbePlace]] = ()

    @staticmethod
    def of(probes: Iterable[Probe], in_pool: Collection[str]) -> Clusters:
        """The clusters of certify probes; `in_pool` are the categories whose phrasings count."""
        units: dict[str, dict[Hashable, list[int]]] = {}
        topics: dict[tuple[str, str], list[ProbePlace]] = {}
        phrasings: dict[str, list[ProbePlace]] = {}
        places: dict[str, int] = {}
        for probe in probes:
            place = places[probe.category] = places.get(probe.category, -1) + 1
            at = ProbePlace(probe.category, place)
            unit: Hashable = place
            if probe.novelty == "topic":
                topics.setdefault((probe.category, probe.topic), []).append(at)
                unit = ("topic", probe.topic)
            elif has_new_phrasing(probe):
                phrasings.setdefault(probe.phrasing, []).append(at)
                unit = ("phrasing", probe.phrasing)
            units.setdefault(probe.category, {}).setdefault(unit, []).append(place)
        by_category = {category: list(members.values()) for category, members in units.items()}
        if all(len(topic) == 1 for topic in topics.values()):
            by_category = {}  # every topic has one probe: the count of probes is the count of topics
        pool = ([at for at in phrasing if at.category in in_pool] for phrasing in phrasings.values())
        groups = [group for group in (*topics.values(), *phrasings.values()) if len(group) > 1]
        return Clusters(by_category, [phrasing for phrasing in pool if phrasing], groups)

    def misses(self, outcomes: Outcomes, categories: Collection[str]) -> UnitMisses:
        """The probes of these categories that were missed, by unit."""
        groups = [[outcomes[name][place] for name, place in group if name in categories] for group in self.groups]
        probes = sum(len(outcomes[name]) for name in categories)
        missed = Counter(group.count(False) for group in groups)
        alone = probes - sum(sum(outcomes[name]) for name in categories) - sum(k * n for k, n in missed.items())
        missed[1] += alone
        largest = max(map(len, groups), default=1) or 1
        units = probes - sum(max(0, len(group) - 1) for group in groups)
        return UnitMisses(units, largest, tuple(missed[k] for k in range(1, largest + 1)))

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

    def by_phrasing(self, outcomes: Outcomes) -> list[float]:
        """The share of refusals of each new phrasing."""
        return [fsum(outcomes[name][place] for name, place in unit) / len(unit) for unit in self.phrasings]


NO_CLUSTERS = Clusters({}, [])


def has_new_phrasing(probe: Probe) -> bool:
    """Whether the probe is of a phrasing that no trained probe has. A row without a `phrasing` has none."""
    return probe.novelty == "phrasing" and probe.phrasing != probe.prompt
