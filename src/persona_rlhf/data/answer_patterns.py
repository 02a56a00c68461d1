"""Users whose choices follow the place or the length of the answers, or change when the same pair comes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.policy.bound import Bound

if TYPE_CHECKING:
    from persona_rlhf.config.experiment import PatternSettings


class AnswerPattern(NamedTuple):
    """A user's pattern: `followed` of `n` choices follow it; `lower` is the lower bound of the share."""

    user_id: str
    kind: str  # place, longer, changed
    followed: int
    n: int
    lower: float

    @property
    def reason(self) -> str:
        """The pattern as a sentence."""
        what = {
            "place": "chose the answer at the same place",
            "longer": "chose the longer answer",
            "changed": "answered a repeated pair otherwise",
        }
        return f"{what[self.kind]} in {self.followed:,} of {self.n:,} cases (at least {self.lower:.0%})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._asdict(), "reason": self.reason}


def answer_patterns(pairs: Iterable[PreferencePair], settings: PatternSettings) -> list[AnswerPattern]:
    """The patterns of all users whose share is above the settings' with confidence 1 - `level`, in file order.

    The bound is Clopper and Pearson's. It is exact for choices that are independent of each other. Ties do not count.
    """
    by_user: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        if not pair.tie:
            by_user.setdefault(pair.user_id, []).append(pair)
    return [pattern for user, theirs in by_user.items() for pattern in _patterns_of(user, theirs, settings)]


def _patterns_of(user: str, pairs: Sequence[PreferencePair], settings: PatternSettings) -> Iterable[AnswerPattern]:
    """The patterns of one user; the favourite of several places has a level divided by their number."""
    places = _places(pairs)
    most, shown = max(places.values(), default=0), max((count for _, count in places), default=1)
    longer, unequal = _longer(pairs)
    changed, repeats = _changed(pairs)
    for kind, count, n, limit, level in (
        ("place", most, places.total(), settings.place, settings.level / shown),
        ("longer", longer, unequal, settings.longer, settings.level),
        ("changed", changed, repeats, settings.changed, settings.level),
    ):
        if limit is None or not n or count <= limit * n:  # most users, for whom scipy is not imported
            continue
        lower = Bound(level).lower(count, n)
        if lower > limit:
            yield AnswerPattern(user, kind, count, n, lower)


def _places(pairs: Sequence[PreferencePair]) -> Counter[tuple[int, int]]:
    """The places of the chosen answers, of how many; a choice among several answers counts once."""
    choices = {(pair.prompt, pair.chosen, pair.place) for pair in pairs if pair.place is not None}
    return Counter(place for _, _, place in choices if place is not None)


def _longer(pairs: Sequence[PreferencePair]) -> tuple[int, int]:
    """How often the chosen answer is the longer one in characters, and the pairs of unequal length."""
    unequal = [len(pair.chosen) > len(pair.rejected) for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    return sum(unequal), len(unequal)


def _changed(pairs: Sequence[PreferencePair]) -> tuple[int, int]:
    """How often a pair that came again was answered otherwise than the first time, and the repeats."""
    first: dict[tuple[object, frozenset[str]], str] = {}
    changed = repeats = 0
    for pair in pairs:
        key = (pair.prompt, frozenset((pair.chosen, pair.rejected)))
        if key in first:
            repeats += 1
            changed += pair.chosen != first[key]
        else:
            first[key] = pair.chosen
    return changed, repeats
