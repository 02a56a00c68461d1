"""Records of a user's training, readable without torch."""

from __future__ import annotations

from typing import NamedTuple


class DualTrace(NamedTuple):
    """A dual variable over a user's training: its last, largest and mean value."""

    final: float
    peak: float
    mean: float


class BasisUse(NamedTuple):
    """A user's share of a basis: real pairs behind the posterior, labelled pairs, and the gain that it predicts.

    `gain` is over the prior: the share of the base's pairs that the posterior expects to order rightly, less the share
    that it expects the prior to.
    """

    sha256: str
    pairs: int
    labelled: int
    gain: float
