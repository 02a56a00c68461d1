"""How held-out accuracy grows with a user's pairs: the data-need curve of a user, of all users, and the pairs needed.

The curve is that of the labels: of a reward that is fitted to growing random subsets of a user's pairs
(`training/subset_accuracy.py`). No adapter is trained for it. An adapter learns less than the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2
from random import Random
from statistics import fmean
from typing import NamedTuple

from persona_rlhf.evaluation.statistics import FEWEST_OF_INTERVAL, interval_over_users

SHARE = 0.8
"""The part of the gain for which the pairs needed are told."""

_DRAWS, _LEVEL = 400, 0.95  # of the bootstrap over users
_FEWEST = 2  # users of a curve over users


class CurvePoint(NamedTuple):
    """Held-out accuracy at a number of pairs, with its 95% interval; of n users, or of one user's n prompts.

    `low` and `high` are None over fewer users than `FEWEST_OF_INTERVAL`.
    """

    pairs: int
    accuracy: float
    low: float | None
    high: float | None
    n: int


class UserCurve(NamedTuple):
    """The curve of one user, who has `pairs` training pairs, and the accuracy of the adapter that the user has."""

    user_id: str
    slug: str
    pairs: int
    points: Sequence[CurvePoint]
    adapter: CurvePoint | None = None


class DataNeed(NamedTuple):
    """The pairs that bring `share` of the gain of `of` pairs, with a 95% interval over users.

    All are None where the labels show no gain at `of` pairs; `low` and `high` with fewer users than
    `FEWEST_OF_INTERVAL`.
    """

    pairs: int | None
    low: int | None
    high: int | None
    of: int
    users: int
    share: float = SHARE

    def sentence(self) -> str:
        """The need in words."""
        gain = f"{self.share:.0%} of the gain that {self.of} pairs bring"
        if self.pairs is None:
            return f"{self.users} users' labels show no gain of the reward at {self.of} pairs"
        interval = "too few users for an interval" if self.low is None else f"{self.low} to {self.high}"
        return f"{self.pairs} pairs ({interval}) bring {gain}, by the labels of {self.users} users"


def over_users(curves: Sequence[UserCurve]) -> list[CurvePoint]:
    """The mean over users at each number of pairs that two users have; users differ between numbers of pairs."""
    reached: dict[int, list[float]] = {}
    for curve in curves:
        for point in curve.points:
            reached.setdefault(point.pairs, []).append(point.accuracy)
    return [
        CurvePoint(pairs, fmean(values), *_interval(values), len(values))
        for pairs, values in sorted(reached.items())
        if len(values) >= _FEWEST
    ]


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    return interval_over_users(values) or (None, None)


def data_need(curves: Sequence[UserCurve], seed: int = 0) -> DataNeed | None:
    """The pairs needed, by users who all have the largest number of pairs that half of the users reach.

    None where there are no two such users.
    """
    largest = sorted(max(point.pairs for point in curve.points) for curve in curves)
    if len(largest) < _FEWEST:
        return None
    of = largest[len(largest) // 2]
    whole = [{point.pairs: point.accuracy for point in curve.points} for curve in curves]
    whole = [values for values in whole if of in values]
    if len(whole) < _FEWEST:
        return None
    source = Random(seed)
    draws = [_needed(source.choices(whole, k=len(whole)), of) for _ in range(_DRAWS)]
    pairs = _needed(whole, of)
    if pairs is None or sum(draw is None for draw in draws) > _DRAWS * (1 - _LEVEL) / 2:
        return DataNeed(None, None, None, of, len(whole))
    if len(whole) < FEWEST_OF_INTERVAL:
        return DataNeed(pairs, None, None, of, len(whole))
    needs = sorted(draw for draw in draws if draw is not None)
    outside = round((1 - _LEVEL) / 2 * len(needs))
    return DataNeed(pairs, needs[outside], needs[-1 - outside], of, len(whole))


def _needed(users: Sequence[Mapping[int, float]], of: int) -> int | None:
    """The pairs at which the mean curve first has the share of its gain over no pair; straight between its points, in
    the logarithm of 1 + pairs."""
    shared = sorted(pairs for pairs in set.intersection(*(set(values) for values in users)) if pairs <= of)
    curve = [(pairs, fmean(values[pairs] for values in users)) for pairs in shared]
    goal = curve[0][1] + SHARE * (curve[-1][1] - curve[0][1])
    if curve[-1][1] <= curve[0][1]:
        return None
    before, low = curve[0]
    for pairs, accuracy in curve[1:]:
        if accuracy >= goal:
            part = (goal - low) / (accuracy - low)
            return ceil(round(2 ** (log2(1 + before) + part * (log2(1 + pairs) - log2(1 + before))) - 1, 6))
        before, low = pairs, accuracy
    return None
