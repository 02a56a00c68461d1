"""Where a screen's threshold comes from, and how well it then tells forbidden requests from harmless ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b
from math import floor, inf, nextafter
from typing import Any, NamedTuple

from persona_rlhf.evaluation.intervals import lower_bound, upper_bound
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.preferences.messages import Message, Prompt
from persona_rlhf.preferences.requests import RequestClassifier, Screen


class Found(NamedTuple):
    """How many of n requests a screen found, with a 95% Clopper-Pearson interval."""

    n: int
    found: int

    @property
    def interval(self) -> tuple[float, float]:
        return lower_bound(self.found, self.n, 0.025), upper_bound(self.found, self.n, 0.025)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"n": self.n, "found": self.found, "low": round(low, 6), "high": round(high, 6)}

    def __str__(self) -> str:
        if not self.n:
            return "none asked"
        low, high = self.interval
        return f"{self.found / self.n:.1%} of {self.n} ({low:.1%} to {high:.1%})"


class Calibrated(NamedTuple):
    """A screen, and what it finds of the `dev` probes that its threshold was not set on: forbidden requests, all of
    them and by category, and their harmless twins."""

    screen: Screen
    forbidden: Found
    harmless: Found
    categories: dict[str, Found]

    def to_json(self) -> dict[str, Any]:
        """A row of RUN/screens.json."""
        return {
            "finding": self.screen.classifier.finding,
            "threshold": self.screen.threshold,
            "forbidden": self.forbidden.to_json(),
            "harmless": self.harmless.to_json(),
            "categories": {name: found.to_json() for name, found in self.categories.items()},
        }


def measured(screen: Screen, probes: Sequence[Probe], categories: Collection[str]) -> Calibrated:
    """What a screen finds of the probes and of their twins."""
    found = [finding is not None for finding in screen.findings(_asked(probes), categories)]
    own = {name: [n for n, probe in enumerate(probes) if probe.category == name] for name in sorted(set(categories))}
    near = screen.findings(_twins(probes), categories)
    return Calibrated(
        screen,
        Found(len(found), sum(found)),
        Found(len(near), sum(finding is not None for finding in near)),
        {name: Found(len(places), sum(found[n] for n in places)) for name, places in own.items() if places},
    )


def calibrated(
    classifier: RequestClassifier, probes: Sequence[Probe], categories: Collection[str], false_alarms: float
) -> Calibrated:
    """The lowest threshold that takes at most a share `false_alarms` of harmless twins for forbidden.

    It is set on the probes of one half of the topics (by hash), and measured on those of the other. Raises ValueError
    where either half has no twin.
    """
    halves: tuple[list[Probe], list[Probe]] = [], []
    for probe in probes:
        halves[blake2b(probe.topic.encode()).digest()[0] % 2].append(probe)
    setting, other = halves
    if not (_twins(setting) and _twins(other)):
        raise ValueError("a threshold needs `dev` probes with benign twins of several topics; the banks have too few")
    values = sorted((score.value for score in classifier(_twins(setting))), reverse=True)
    first_too_many = values[floor(false_alarms * len(values))]
    return measured(Screen(classifier, nextafter(first_too_many, inf)), other, categories)


def _asked(probes: Sequence[Probe]) -> list[Prompt]:
    return [(Message("user", probe.prompt),) for probe in probes]


def _twins(probes: Sequence[Probe]) -> list[Prompt]:
    return [(Message("user", probe.twin),) for probe in probes if probe.twin]
