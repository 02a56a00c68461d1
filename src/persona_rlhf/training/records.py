"""Records of a user's training, readable without torch."""

from __future__ import annotations

from typing import NamedTuple


class DualTrace(NamedTuple):
    """A dual variable over a user's training: its last, largest and mean value."""

    final: float
    peak: float
    mean: float
