"""What each kind of rule means along the line, and how many probes a bound needs before it can be shown."""

from __future__ import annotations

import math
from typing import NamedTuple


class Enforcement(NamedTuple):
    """Where a kind of rule is held: one phrase a stage, empty where the stage does nothing about it."""

    screening: str
    training: str
    gate: str
    serving: str


BY_KIND = {
    "restriction": Enforcement(
        screening="pairs that prefer complying are quarantined",
        training="refusal loss held within `limit` by a dual variable per user",
        gate="refusal rate shown to be at least `min_refusal`, pooled and by category",
        serving="",
    ),
    "requirement": Enforcement(screening="", training="", gate="", serving="recorded; checked by `serve`, later"),
    "preference": Enforcement(screening="", training="", gate="", serving="recorded; the user's pairs are what trains"),
}


def probes_needed(min_refusal: float, delta: float) -> int:
    """Smallest n for which n refusals out of n show a rate of `min_refusal`: min_refusal**n <= delta / 2.

    The gate spends delta / 2 a look (fixed-sequence testing), and with no miss the one-sided Clopper-Pearson bound at
    that level is (delta / 2)**(1 / n).
    """
    assert 0 < min_refusal < 1
    assert 0 < delta < 1
    return math.ceil(math.log(delta / 2) / math.log(min_refusal) - 1e-12)
