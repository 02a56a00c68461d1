"""Topics and prompts of the bundled world: tier-one topics with benign twins, how-to topics, ordinary requests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple

from persona_rlhf.policy.hazards import assign_split
from persona_rlhf.simulation import answers
from persona_rlhf.simulation.answers import draw_style
from persona_rlhf.simulation.vocabulary import Phrasing, domains, is_writing, read_words, slug, suits, wrap

_WORDS = read_words("prompts")


class Benign(NamedTuple):
    """A harmless verb phrase and the domain (or, for a text to write, the purpose) that answers it."""

    vp: str
    domain: str


class Topic(NamedTuple):
    """A hazardous verb phrase and its twins. The twins share the id, and so the split."""

    id: str
    category: str
    vp: str
    twins: tuple[Benign, ...]


@lru_cache(maxsize=1)
def topics() -> tuple[Topic, ...]:
    """All tier-one topics."""
    all_topics = []
    for category, lines in read_words("hazards").items():
        for line in lines:
            vp, *twins = (part.strip() for part in line.split("|"))
            pairs = tuple(Benign(*(t.strip() for t in twin.rsplit("@", 1))) for twin in twins)
            assert all(is_writing(vp) == is_writing(t.vp) for t in pairs), line
            all_topics.append(Topic(slug(vp), category, vp, pairs))
    assert len({t.id for t in all_topics}) == len(all_topics)
    return tuple(all_topics)


def twin_of(topic: Topic, phrasing: str) -> Benign:
    """The twin that goes with a probe: fixed by a hash, so that each twin of a topic has its share."""
    digest = hashlib.blake2b(f"{topic.id} {phrasing}".encode(), digest_size=4).digest()
    return topic.twins[int.from_bytes(digest, "big") % len(topic.twins)]


@lru_cache(maxsize=1)
def ordinary_topics() -> tuple[tuple[Benign, ...], tuple[Benign, ...]]:
    """Benign how-to topics: those that the corpus may use, and a hashed tenth that is kept out of it."""
    twins = {t.vp for topic in topics() for t in topic.twins}
    every = [Benign(vp, name) for name, d in domains().items() for vp in d.vps if vp not in twins]
    kept = [b for b in every if assign_split(f"ordinary {b.vp}", "x")[1] != "topic"]
    held = [b for b in every if assign_split(f"ordinary {b.vp}", "x")[1] == "topic"]
    return tuple(kept), tuple(held)


class Dialogue(NamedTuple):
    """A prompt, its answer, and the kind of the row."""

    prompt: str
    answer: str
    kind: str


def how_to(rng: Random, topic: Benign, wrapper: Phrasing) -> Dialogue:
    """A benign verb phrase in a wrapper, with advice or the requested text."""
    style = draw_style(rng)
    texts = read_words("content")["messages"].keys() | {"story"}
    make = answers.message if topic.domain in texts else answers.how_to
    return Dialogue(wrap(wrapper, topic.vp), make(rng, style, topic.vp, topic.domain), "how_to")


def fill(rng: Random, vp: str) -> str:
    """The verb phrase with an invented word in place of each "~"."""
    while "~" in vp:
        vp = vp.replace("~", "".join(rng.choice(_WORDS["syllables"]) for _ in range(rng.randint(2, 3))), 1)
    return vp


def _made_up(rng: Random) -> Benign:
    """A topic with an invented word: unknown words must not look harmful."""
    verb = rng.choice(_WORDS["made_up_verbs"])
    home = rng.choice(("home", "craft", "garden", "study"))
    return Benign(fill(rng, f"{verb} {rng.choice(('a', 'the', 'my', 'some', 'two'))} ~"), home)


def suitable(rng: Random, wrappers: Sequence[Phrasing], vp: str) -> Phrasing:
    """A random wrapper that may hold the verb phrase."""
    while True:
        wrapper = rng.choice(wrappers)
        if suits(wrapper, vp):
            return wrapper


def ordinary(rng: Random, vps: Sequence[Benign], wrappers: Sequence[Phrasing]) -> Dialogue:
    """One ordinary exchange of any kind."""
    u = rng.random()
    if u < 0.52:
        topic = _made_up(rng) if rng.random() < 0.10 else rng.choice(vps)
        return how_to(rng, topic, suitable(rng, wrappers, topic.vp))
    style = draw_style(rng)
    words = read_words("content")
    if u < 0.66:
        prompt = rng.choice(_WORDS["suggestion"]).format(t=rng.choice(_WORDS["times"]), o=rng.choice(_WORDS["company"]))
        return Dialogue(prompt, answers.suggestion(rng, style), "suggestion")
    if u < 0.76:
        theme = rng.choice(list(words["facts"]))
        noun = rng.choice(list(words["facts"][theme]))
        prompt = rng.choice(_WORDS["fact"]).format(n=noun)
        return Dialogue(prompt, answers.fact(rng, style, noun, words["facts"][theme][noun]), "fact")
    if u < 0.84:
        one, two = rng.sample(sorted(rng.choice(words["compare"]).items()), 2)
        prompt = rng.choice(_WORDS["comparison"]).format(a=one[0], b=two[0])
        return Dialogue(prompt, answers.comparison(rng, style, one, two), "comparison")
    if u < 0.92:
        hero, place = rng.choice(words["heroes"]), rng.choice(words["places"])
        prompt = rng.choice(_WORDS["story"]).format(h=hero, p=place)
        return Dialogue(prompt, answers.story(rng, style, hero, place), "story")
    talk = rng.choice(words["smalltalk"])
    return Dialogue(rng.choice(talk["prompts"]), answers.small_talk(rng, style, talk["answers"]), "small_talk")
