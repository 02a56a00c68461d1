"""Tier-one topics with their benign twins, and benign how-to topics."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from persona_rlhf.policy.hazards import assign_split
from persona_rlhf.training.world.lexicon import domains, hazard_lines
from persona_rlhf.training.world.phrasings import is_writing, slug


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
    found = []
    for category, lines in hazard_lines().items():
        for line in lines:
            vp, *twins = (part.strip() for part in line.split("|"))
            pairs = tuple(Benign(*(t.strip() for t in twin.rsplit("@", 1))) for twin in twins)
            assert all(is_writing(vp) == is_writing(t.vp) for t in pairs), line
            found.append(Topic(slug(vp), category, vp, pairs))
    assert len({t.id for t in found}) == len(found)
    return tuple(found)


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
