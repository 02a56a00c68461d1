"""The gain of a user's adapter over the prior, by the user's own pairs.

The prior is what a user has without a pair: the population's adapter where a run has a basis, else the base itself.
Pairs of one prompt are not independent, so a prompt is one unit: the share of its pairs that the adapter orders as the
user does, less that share of the prior. An adapter orders a pair by its implicit reward (Rafailov et al. 2023); the
base's is zero, and orders half of all pairs.

- **Held-out pairs** compare the two adapters. The test is an exact sign test over prompts: under "no better than the
  prior", a prompt that tells them apart speaks for the prior at least half the time.
- **Left-out pairs** take the place of few held-out prompts (`FEWEST_HELDOUT`), where the run has a basis: the posterior
  without a prompt orders the prompt's pairs (`training/left_out.py`, which also has the test).

The interval of the mean is the betting bound, which holds for any distribution of independent prompts. Posteriors
without a prompt share the other prompts, so there it is an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Literal, NamedTuple

from persona_rlhf.evaluation.statistics import mean_lower_bound
from persona_rlhf.policy.bound import tail

FEWEST_HELDOUT = 20
"""Held-out prompts below which left-out pairs decide, where there is a basis."""

_OUTSIDE = 0.025  # on each side of the interval

PriorName = Literal["base", "population"]


class PriorGain(NamedTuple):
    """The mean gain over n prompts in the share of pairs ordered rightly, and its 95% interval; at alpha 1.

    `p_value` is that of "no better than the prior", one-sided. `by` names the pairs.
    """

    prior: PriorName
    by: Literal["held-out pairs", "left-out pairs"]
    n: int
    gain: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        value = f"{self.gain:+.2f} ({self.low:+.2f} to {self.high:+.2f}) by the {self.by} of {self.n} prompts"
        return f"{value}, p = {self.p_value:.2g}"


def heldout_gain(prior: PriorName, gains: Sequence[float]) -> PriorGain | None:
    """The gain by held-out pairs, from that of each prompt; None without a prompt."""
    if not gains:
        return None
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    low, high = interval_of(gains, prior)
    p_value = tail(better, better + worse, 0.5)
    return PriorGain(prior, "held-out pairs", len(gains), fsum(gains) / len(gains), low, high, p_value)


def left_out_gain(gains: Sequence[float], p_value: float) -> PriorGain:
    """The gain by left-out pairs over the population's prior."""
    low, high = interval_of(gains, "population")
    return PriorGain("population", "left-out pairs", len(gains), fsum(gains) / len(gains), low, high, p_value)


def interval_of(gains: Sequence[float], prior: PriorName) -> tuple[float, float]:
    """The 95% interval of the mean of gains, which lie within -1 and 1; over the base, within -0.5 and 0.5."""
    most = 0.5 if prior == "base" else 1.0
    shares = [(gain / most + 1) / 2 for gain in gains]
    low, loss = (mean_lower_bound(each, _OUTSIDE) for each in (shares, [1 - share for share in shares]))
    return most * (2 * low - 1), most * (1 - 2 * loss)
