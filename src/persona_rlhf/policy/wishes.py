"""How far an answer is from what a user wished for, as far as a program can tell."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.policy.contradictions import standing
from persona_rlhf.policy.languages import language_of
from persona_rlhf.policy.requirements import folded
from persona_rlhf.policy.rules import Preference
from persona_rlhf.policy.statements import Wish
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.policy.topics import about, topic_names

READABLE = ("min_words", "max_words", "language", "avoid")
"""Wishes that a text shows. Formality and tone are for a reader to judge."""


def readable_tastes(policy: Policy, user_id: str) -> list[Preference]:
    """The tastes of a user that a program can read off an answer, without those that a requirement overrules."""
    tastes = standing(policy.for_user(user_id).preferences, policy.requirements)
    return [taste for taste in tastes if taste.wish is not None and taste.wish.name in READABLE]


def distance(wishes: Sequence[Wish], answer: str) -> float:
    """The sum over wishes of how far the answer is from each, from 0 (as wished): words too many or too few as a share
    of the number asked for, 1 for another language, the share of avoided topics that it touches."""
    return sum(_distance(wish, answer) for wish in wishes)


def _distance(wish: Wish, answer: str) -> float:
    words = len(answer.split())
    match wish.name:
        case "max_words":
            return max(0, words - int(wish.value)) / int(wish.value)
        case "min_words":
            return max(0, int(wish.value) - words) / int(wish.value)
        case "language":
            return float(language_of(answer) != wish.value)
        case "avoid":
            topics = str(wish.value).split(", ")
            return sum(_touches(topic, answer) for topic in topics) / len(topics)
    raise ValueError(f"no program can read `{wish.name}` off a text")


def _touches(topic: str, answer: str) -> bool:
    return about(topic, answer) if topic in topic_names() else folded(topic) in folded(answer)
