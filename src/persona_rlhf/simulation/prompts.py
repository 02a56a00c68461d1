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
from persona_rlhf.simulation.vocabulary import Phrasing, content, domains, hazard_lines, is_writing, slug, suits, wrap


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
    for category, lines in hazard_lines().items():
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


_FACT = (
    "what is {n}?",
    "tell me about {n}",
    "What do you know about {n}?",
    "explain {n}",
    "Give me a fact about {n}.",
    "describe {n}",
    "i want to learn about {n}",
    "Who or what is {n}?",
    "my kids ask about {n}",
    "facts about {n}",
    "Tell my class about {n}.",
    "why do people talk about {n}",
    "Write two sentences about {n}.",
    "define {n}",
)
_COMPARE = (
    "which is better, {a} or {b}?",
    "{a} or {b}?",
    "compare {a} and {b}",
    "Should I choose {a} or {b}?",
    "What is the difference between {a} and {b}?",
    "i cant decide between {a} and {b}",
    "{a} vs {b}",
    "My partner likes {a}, I like {b}. Who is right?",
    "Would you pick {a} or {b}?",
    "is {a} nicer than {b}",
)
_STORY = (
    "tell me a story about {h}",
    "write a short story about {h} {p}",
    "Tell me a story about {h} {p}.",
    "a bedtime story with {h}, please",
    "Make up a story {p}.",
    "i want a story about {h}",
    "story about {h} {p}",
    "Write a tale for my kids about {h}.",
    "can you invent a story {p} with {h}?",
    "Once upon a time, {h}",
    "Give me a short crime story about {h}.",
    "write a story for a girl of six about {h}",
)
_SUGGEST = (
    "what should i do {t}?",
    "Suggest something to do {t}.",
    "any ideas {o}?",
    "give me an idea {o}",
    "What can I do {t} {o}?",
    "recommend something {o}",
    "i need a plan {t} {o}",
    "i am free {t}",
    "Where should we go {t}?",
    "Suggest a hobby {o}.",
    "a gift idea {o} please",
    "what would be fun {o} {t}?",
    "help me choose an activity {o}",
    "we are a group of five and free {t}",
    "List some ideas {o}.",
)
_TIMES = (
    "this weekend",
    "tonight",
    "tomorrow",
    "on a rainy day",
    "in summer",
    "on sunday",
    "after school",
    "in winter",
    "next week",
    "this evening",
    "in the holidays",
    "on my day off",
    "in a new city",
    "after work",
    "at home",
)
_WHO = (
    "for my kids",
    "for my wife",
    "with a friend",
    "for my neighbour",
    "for a young girl",
    "for a police officer",
    "with my partner",
    "for my boss",
    "for two women",
    "for an old man",
    "with my class",
    "for my ex",
    "for a boy",
    "for my mother",
    "with a crowd of friends",
    "for a teenager",
    "with my dog",
    "for a nurse",
    "for my roommate",
)
_SYLLABLES = (
    "ba",
    "ro",
    "mi",
    "ten",
    "lo",
    "kar",
    "pu",
    "sel",
    "do",
    "ri",
    "fen",
    "ga",
    "tol",
    "wi",
    "zan",
    "mo",
    "ler",
    "ka",
    "bri",
    "sto",
    "pen",
    "del",
    "na",
    "vu",
    "pla",
    "ster",
    "cho",
    "ly",
    "mar",
    "tin",
    "qui",
    "sho",
    "gle",
)
_MADE_UP = (
    "clean",
    "fix",
    "buy",
    "use",
    "draw",
    "paint",
    "find",
    "cook",
    "wash",
    "carry",
    "sell",
    "make",
    "hold",
    "open",
    "shoot a photo of",
    "read about",
    "plant",
    "move",
    "build",
    "learn about",
    "write about",
    "order",
    "play",
)


class Dialogue(NamedTuple):
    """A prompt, its answer, and the kind of the row."""

    prompt: str
    answer: str
    kind: str


def how_to(rng: Random, topic: Benign, wrapper: Phrasing) -> Dialogue:
    """A benign verb phrase in a wrapper, with advice or the requested text."""
    style = draw_style(rng)
    texts = content()["messages"].keys() | {"story"}
    make = answers.message if topic.domain in texts else answers.how_to
    return Dialogue(wrap(wrapper, topic.vp), make(rng, style, topic.vp, topic.domain), "how_to")


def fill(rng: Random, vp: str) -> str:
    """The verb phrase with an invented word in place of each "~"."""
    while "~" in vp:
        vp = vp.replace("~", "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))), 1)
    return vp


def _made_up(rng: Random) -> Benign:
    """A topic with an invented word: unknown words must not look harmful."""
    verb = rng.choice(_MADE_UP)
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
    words = content()
    if u < 0.66:
        prompt = rng.choice(_SUGGEST).format(t=rng.choice(_TIMES), o=rng.choice(_WHO))
        return Dialogue(prompt, answers.suggestion(rng, style), "suggestion")
    if u < 0.76:
        theme = rng.choice(list(words["facts"]))
        noun = rng.choice(list(words["facts"][theme]))
        return Dialogue(
            rng.choice(_FACT).format(n=noun), answers.fact(rng, style, noun, words["facts"][theme][noun]), "fact"
        )
    if u < 0.84:
        one, two = rng.sample(sorted(rng.choice(words["compare"]).items()), 2)
        return Dialogue(
            rng.choice(_COMPARE).format(a=one[0], b=two[0]), answers.comparison(rng, style, one, two), "comparison"
        )
    if u < 0.92:
        hero, place = rng.choice(words["heroes"]), rng.choice(words["places"])
        return Dialogue(rng.choice(_STORY).format(h=hero, p=place), answers.story(rng, style, hero, place), "story")
    talk = rng.choice(words["smalltalk"])
    return Dialogue(rng.choice(talk["prompts"]), answers.small_talk(rng, style, talk["answers"]), "small_talk")
