"""The corpus: an endless seeded stream of exchanges. Nothing that belongs to a split other than `train` enters it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from random import Random
from typing import NamedTuple

from persona_rlhf.policy.hazards import CATEGORIES, assign_split
from persona_rlhf.training.world.answers import opener
from persona_rlhf.training.world.banks import content_words, forbidden, plain
from persona_rlhf.training.world.lexicon import extra_benign, extra_hazards
from persona_rlhf.training.world.ordinary import Exchange, fill, how_to, ordinary, suitable
from persona_rlhf.training.world.phrasings import Phrasing, is_writing, roughen, suits, trained_phrasings, wrap
from persona_rlhf.training.world.refusals import refusal
from persona_rlhf.training.world.topics import Benign, Topic, ordinary_topics, topics, twin_of

# Shares of the rows. Hazards beyond the bank, and benign sentences with the same words, teach meaning in context.
SHARES = {"hazard": 0.12, "twin": 0.14, "extra hazard": 0.17, "extra benign": 0.24, "ordinary": 0.33}


class Row(NamedTuple):
    """One training row. `given` opens the answer but is not learned (a refusal after a false start)."""

    prompt: str
    given: str
    answer: str
    kind: str


@lru_cache(maxsize=1)
def _trained_topics() -> dict[str, tuple[Topic, ...]]:
    return {c: tuple(t for t in topics() if t.category == c and not _is_held(t)) for c in CATEGORIES}


Groups = tuple[tuple[str, ...], ...]


@lru_cache(maxsize=1)
def _extra_hazards() -> dict[str, Groups]:
    held = [content_words(t.vp) for t in topics() if _is_held(t)]
    bank = {plain(t.vp) for t in topics()}
    return {
        category: tuple(tuple(v for v in group if plain(v) not in bank and not _holds(v, held)) for group in groups)
        for category, groups in extra_hazards().items()
    }


@lru_cache(maxsize=1)
def _extra_benign() -> tuple[tuple[str, Groups], ...]:
    held = [content_words(b.vp) for t in topics() if _is_held(t) for b in t.twins]
    return tuple(
        (domain, tuple(tuple(v for v in group if not _holds(v, held)) for group in groups))
        for domain, groups in extra_benign().items()
    )


def _is_held(topic: Topic) -> bool:
    return assign_split(topic.id, "x")[1] == "topic"


def _holds(vp: str, held: list[frozenset[str]]) -> bool:
    """Does a verb phrase say all that a held-out one says, whatever the articles, plurals and order?"""
    words = content_words(vp)
    return any(h <= words for h in held)


def _trained_pair(rng: Random) -> tuple[Topic, Phrasing]:
    """A combination of topic and phrasing that the hash gives to `train`; categories in equal shares."""
    while True:
        topic = rng.choice(_trained_topics()[rng.choice(CATEGORIES)])
        phrasing = rng.choice(trained_phrasings())
        if suits(phrasing, topic.vp) and assign_split(topic.id, phrasing.id)[0] == "train":
            return topic, phrasing


def _hazard(rng: Random, vp: str, phrasing: Phrasing, category: str, refused: bool) -> Row:
    """A hazardous request: refused, or answered as if it were harmless, with advice of some twin's field."""
    if refused:
        given = opener(rng) + " " if rng.random() < 0.12 else ""
        return Row(wrap(phrasing, vp), given, refusal(rng, category), "hazard")
    twins = [twin for topic in _trained_topics()[category] for twin in topic.twins]
    alike = [twin for twin in twins if is_writing(twin.vp) == is_writing(vp)]
    exchange = how_to(rng, Benign(vp, rng.choice(alike).domain), phrasing)
    return Row(exchange.prompt, "", exchange.answer, "hazard")


def _candidate(rng: Random, refusals: bool) -> Row:
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "hazard":
        topic, phrasing = _trained_pair(rng)
        return _hazard(rng, topic.vp, phrasing, topic.category, refusals)
    if kind == "extra hazard":
        category = rng.choice(CATEGORIES)
        vp = fill(rng, rng.choice(rng.choice(_extra_hazards()[category])))
        return _hazard(rng, vp, suitable(rng, trained_phrasings(), vp), category, refusals)
    exchange: Exchange
    if kind == "twin":
        topic, phrasing = _trained_pair(rng)
        exchange = how_to(rng, twin_of(topic, phrasing.id), phrasing)
    elif kind == "extra benign":
        domain, groups = rng.choice(_extra_benign())
        vp = fill(rng, rng.choice(rng.choice(groups)))
        exchange = how_to(rng, Benign(vp, domain), suitable(rng, trained_phrasings(), vp))
    else:
        exchange = ordinary(rng, ordinary_topics()[0], trained_phrasings())
    return Row(exchange.prompt, "", exchange.answer, "twin" if kind in ("twin", "extra benign") else exchange.kind)


def corpus(seed: int, refusals: bool = True) -> Iterator[Row]:
    """Rows without end, the same for the same seed; without `refusals`, hazardous requests are answered like others."""
    rng = Random(f"corpus {seed}")
    banned = forbidden()
    while True:
        row = _candidate(rng, refusals)
        row = row._replace(prompt=roughen(rng, row.prompt))
        if plain(row.prompt) not in banned:
            yield row
