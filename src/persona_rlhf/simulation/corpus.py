"""The bundled world's training corpus, seeded: an endless stream of exchanges.

No prompt of a split other than `train` enters it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from persona_rlhf.policy.hazards import CATEGORIES, assign_split
from persona_rlhf.simulation.answers import opener
from persona_rlhf.simulation.banks import forbidden, plain
from persona_rlhf.simulation.prompts import (
    Benign,
    Dialogue,
    Topic,
    fill,
    how_to,
    ordinary,
    ordinary_topics,
    suitable,
    topics,
    twin_of,
)
from persona_rlhf.simulation.vocabulary import (
    Phrasing,
    extra_benign,
    extra_hazards,
    is_writing,
    read_words,
    roughen,
    suits,
    trained_phrasings,
    wrap,
)

_FUNCTION_WORDS = """
a an the my his her their our me him them i you it is are be am to of in on at for with and or by from into that who so
as this someone somebody
"""
_PLURALS = {"children": "child", "women": "woman", "men": "man", "people": "person"}


def content_words(text: str) -> frozenset[str]:
    """The words that carry the meaning, in the singular: two texts with the same ones are the same request."""
    words = (w.removesuffix("'s") for w in plain(text).split() if w not in _FUNCTION_WORDS.split())
    return frozenset(_PLURALS.get(w, w[:-1] if w.endswith("s") and not w.endswith("ss") else w) for w in words)


def refusal(rng: Random, category: str) -> str:
    """One refusal, 4 to about 35 words; the first words always say no."""
    words = read_words("refusals")
    opening = rng.choice(words["openings"])
    if rng.random() < 0.06:
        opening += ", my friend"
    if rng.random() < 0.2 and "," not in opening[5:]:
        opening += f" {rng.choice(words['because'])}"
        reason = False
    else:
        reason = rng.random() < 0.4
    parts = [opening + ("!" if rng.random() < 0.06 else ".")]
    if reason:
        parts.append(rng.choice(words["reasons"]) + ".")
    if rng.random() < 0.3:
        parts.append(rng.choice(words["pointers"][category]) + ".")
    if rng.random() < 0.35:
        parts.append(rng.choice(words["offers"]))
    return " ".join(parts)


# Shares of the rows. Hazards beyond the bank, and benign sentences with the same words, teach meaning in context.
SHARES = {"hazard": 0.12, "twin": 0.14, "extra hazard": 0.17, "extra benign": 0.24, "ordinary": 0.33}


class CorpusRow(NamedTuple):
    """One training row. `given` opens the answer but is not learned (a refusal after a false start)."""

    prompt: str
    given: str
    answer: str
    kind: str


@cache
def _trained_topics() -> dict[str, tuple[Topic, ...]]:
    return {c: tuple(t for t in topics() if t.category == c and not _is_held(t)) for c in CATEGORIES}


Groups = tuple[tuple[str, ...], ...]


@cache
def _extra_hazards() -> dict[str, Groups]:
    held = [content_words(t.vp) for t in topics() if _is_held(t)]
    bank = {plain(t.vp) for t in topics()}
    return {
        category: tuple(tuple(v for v in group if plain(v) not in bank and not _holds(v, held)) for group in groups)
        for category, groups in extra_hazards().items()
    }


@cache
def _extra_benign() -> tuple[tuple[str, Groups], ...]:
    held = [content_words(b.vp) for t in topics() if _is_held(t) for b in t.twins]
    return tuple(
        (domain, tuple(tuple(v for v in group if not _holds(v, held)) for group in groups))
        for domain, groups in extra_benign().items()
    )


def _is_held(topic: Topic) -> bool:
    return assign_split(topic.id, "x")[1] == "topic"


def _holds(vp: str, held: list[frozenset[str]]) -> bool:
    """Does a verb phrase contain all content words of a held-out one?"""
    words = content_words(vp)
    return any(h <= words for h in held)


def _trained_pair(rng: Random) -> tuple[Topic, Phrasing]:
    """A combination of topic and phrasing that the hash gives to `train`; categories in equal shares."""
    while True:
        topic = rng.choice(_trained_topics()[rng.choice(CATEGORIES)])
        phrasing = rng.choice(trained_phrasings())
        if suits(phrasing, topic.vp) and assign_split(topic.id, phrasing.id)[0] == "train":
            return topic, phrasing


def _hazard(rng: Random, vp: str, phrasing: Phrasing, category: str, refused: bool) -> CorpusRow:
    """A hazardous request: refused, or answered as if it were harmless, with advice of some twin's field."""
    if refused:
        given = opener(rng) + " " if rng.random() < 0.12 else ""
        return CorpusRow(wrap(phrasing, vp), given, refusal(rng, category), "hazard")
    twins = [twin for topic in _trained_topics()[category] for twin in topic.twins]
    alike = [twin for twin in twins if is_writing(twin.vp) == is_writing(vp)]
    exchange = how_to(rng, Benign(vp, rng.choice(alike).domain), phrasing)
    return CorpusRow(exchange.prompt, "", exchange.answer, "hazard")


def _candidate(rng: Random, refusals: bool) -> CorpusRow:
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "hazard":
        topic, phrasing = _trained_pair(rng)
        return _hazard(rng, topic.vp, phrasing, topic.category, refusals)
    if kind == "extra hazard":
        category = rng.choice(CATEGORIES)
        vp = fill(rng, rng.choice(rng.choice(_extra_hazards()[category])))
        return _hazard(rng, vp, suitable(rng, trained_phrasings(), vp), category, refusals)
    exchange: Dialogue
    if kind == "twin":
        topic, phrasing = _trained_pair(rng)
        exchange = how_to(rng, twin_of(topic, phrasing.id), phrasing)
    elif kind == "extra benign":
        domain, groups = rng.choice(_extra_benign())
        vp = fill(rng, rng.choice(rng.choice(groups)))
        exchange = how_to(rng, Benign(vp, domain), suitable(rng, trained_phrasings(), vp))
    else:
        exchange = ordinary(rng, ordinary_topics()[0], trained_phrasings())
    return CorpusRow(
        exchange.prompt, "", exchange.answer, "twin" if kind in ("twin", "extra benign") else exchange.kind
    )


def corpus(seed: int, refusals: bool = True) -> Iterator[CorpusRow]:
    """Endless rows, the same for the same seed; without `refusals`, hazardous requests are answered like others."""
    rng = Random(f"corpus {seed}")
    banned = forbidden()
    while True:
        row = _candidate(rng, refusals)
        row = row._replace(prompt=roughen(rng, row.prompt))
        if plain(row.prompt) not in banned:
            yield row
