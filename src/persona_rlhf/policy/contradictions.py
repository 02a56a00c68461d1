"""Properties that no answer has together; and the users' wishes that a requirement above them overrules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from persona_rlhf.policy.requirements import folded
from persona_rlhf.policy.rules import Preference, Requirement
from persona_rlhf.policy.statements import Wish


class Overruled(NamedTuple):
    """A user's wish that gives way to a requirement, and a sentence that tells him so."""

    preference: str
    requirement: str
    sentence: str


def contradict(one: Wish, other: Wish) -> bool:
    """Whether no answer can have both properties; True only where that is certain. Symmetric."""
    return _excludes(one, other) or _excludes(other, one)


def looser(one: Wish, other: Wish) -> bool:
    """Whether the other asks less of the same answers than the one does."""
    match one.name, other.name:
        case ("max_words", "max_words") | ("reading_level", "reading_level"):
            return int(other.value) > int(one.value)
        case "min_words", "min_words":
            return int(other.value) < int(one.value)
    return False


def _excludes(one: Wish, other: Wish) -> bool:
    match one.name, other.name:
        case "max_words", "min_words":
            return int(one.value) < int(other.value)
        case "max_words", "must_include":
            return int(one.value) < len(str(other.value).split())
        case "must_not_include", "must_include":
            return folded(str(one.value)) in folded(str(other.value))
        case "language", "language":
            return one.value != other.value
    return False


def standing(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> list[Preference]:
    """The tastes that no requirement overrules."""
    lost = {found.preference for found in overruled(preferences, requirements)}
    return [taste for taste in preferences if taste.id not in lost]


def overruled(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> Iterator[Overruled]:
    """Every wish that a requirement contradicts. The requirement holds; the user is told whose it is and where."""
    for taste in preferences:
        for rule in requirements:
            if taste.wish is None or not contradict(taste.wish, Wish(rule.property, rule.value)):
                continue
            where = f" for {rule.when}" if rule.when is not None else ""
            sentence = (
                f"You wish for `{taste.wish.name}: {taste.wish.value}` ({taste.id}), but {rule.source_name} requires "
                f"`{rule.property}: {rule.value}`{where} ({rule.id}, {rule.document}:{rule.line}), which stands above "
                "a user's wish, so answers follow that."
            )
            yield Overruled(taste.id, rule.id, sentence)
