"""The bundled world's probe banks, seeded, and the other prompts that its corpus may not hold.

The public bank has training probes, new combinations of a topic and a phrasing, new phrasings
(`phrasings_held_out.yaml`) and new topics. Those with the lowest hashes are drawn. A private bank has other new
combinations and phrasings, which a secret seed draws.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations, cycle
from random import Random

from persona_rlhf.policy.hazards import CATEGORIES, Novelty, Probe, Split, assign_phrasing, assign_split
from persona_rlhf.simulation.prompts import Topic, ordinary, ordinary_topics, topics, twin_of
from persona_rlhf.simulation.vocabulary import (
    Phrasing,
    extra_benign,
    held_out_phrasings,
    phrasings,
    suits,
    trained_phrasings,
    with_noise,
    with_remarks,
    wrap,
)

Part = tuple[Split, Novelty]

# Probes a category. The first ones by rank stay in the public bank; RETIRED come next in rank, were looked at in the
# past, and are in no bank; FRESH follow them.
FIRST: dict[Part, int] = {("train", "combination"): 450, ("dev", "combination"): 60, ("dev", "topic"): 60}
RETIRED: dict[Part, int] = {
    ("dev", "phrasing"): 60,
    ("certify", "combination"): 80,
    ("certify", "phrasing"): 80,
    ("test", "combination"): 160,
    ("test", "phrasing"): 160,
    ("test", "topic"): 100,
}
FRESH: dict[Part, int] = {("certify", "combination"): 20, ("test", "combination"): 160, ("test", "topic"): 100}
TOPICS_A_PHRASING: dict[Split, int] = {"dev": 4, "certify": 2, "test": 4}
"""Topics with which each new phrasing is drawn, each of another category."""


def plain(text: str) -> str:
    """Lower-case words only: two prompts that differ in case or punctuation are one."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _rank(topic: Topic, phrasing: Phrasing, seed: str) -> str:
    return hashlib.blake2b(f"{topic.id} {phrasing.id}".encode(), digest_size=6, key=seed.encode()).hexdigest()


def _probe(topic: Topic, phrasing: Phrasing, split: Split, novelty: Novelty, seed: str) -> Probe:
    return Probe(
        f"{topic.category}-{_rank(topic, phrasing, seed)}",
        topic.category,
        wrap(phrasing, topic.vp),
        topic.id,
        phrasing.id,
        wrap(phrasing, twin_of(topic, phrasing.id).vp),
        split,
        novelty,
    )


@cache
def _met_phrasings() -> frozenset[str]:
    """The ids of phrasings that typing noise can make of another one that trains."""
    noisy = {plain(text): phrasing.id for phrasing in trained_phrasings() for text in with_noise(phrasing)}
    return frozenset(p.id for p in phrasings() if noisy.get(plain(p.template), p.id) != p.id)


@cache
def _met_twins() -> frozenset[str]:
    """The harmless verb phrases of the corpus beyond the banks' twins: with any phrasing, it may hold one of them."""
    return frozenset(vp for groups in extra_benign().values() for group in groups for vp in group)


@cache
def _pools() -> dict[tuple[str, Split, Novelty], tuple[tuple[Topic, Phrasing], ...]]:
    """(category, split, novelty) -> all combinations of topics and the corpus's phrasings, by their public rank."""
    pools: dict[tuple[str, Split, Novelty], list[tuple[Topic, Phrasing]]] = defaultdict(list)
    for topic in topics():
        for phrasing in phrasings():
            if suits(phrasing, topic.vp):
                pools[topic.category, *assign_split(topic.id, phrasing.id)].append((topic, phrasing))
    return {key: tuple(sorted(pool, key=lambda pair: _rank(pair[0], pair[1], ""))) for key, pool in pools.items()}


def _public(category: str, part: Part) -> tuple[list[tuple[Topic, Phrasing]], list[tuple[Topic, Phrasing]]]:
    """The combinations of a part that the public bank holds or held, and those that no bank has held.

    The latter are combinations that the corpus cannot hold, but for a typing slip.
    """
    pool = _pools()[category, *part]
    kept, looked_at = FIRST.get(part, 0), RETIRED.get(part, 0)
    rest = [
        (topic, phrasing)
        for topic, phrasing in pool[kept + looked_at :]
        if phrasing.id not in _met_phrasings() and twin_of(topic, phrasing.id).vp not in _met_twins()
    ]
    fresh = FRESH.get(part, 0)
    return [*pool[:kept], *rest[:fresh]], rest[fresh:]


def _combinations() -> Iterator[Probe]:
    for category in CATEGORIES:
        for part in FIRST | FRESH:
            yield from (_probe(*pair, *part, "") for pair in _public(category, part)[0])


def _private_combinations(seed: str, size: int) -> Iterator[Probe]:
    """`size` times as many of `certify` as the public bank has; fewer where there are no more."""
    part: Part = ("certify", "combination")
    for category in CATEGORIES:
        pool = sorted(_public(category, part)[1], key=lambda pair: _rank(pair[0], pair[1], seed))
        yield from (_probe(*pair, *part, seed) for pair in pool[: size * FRESH[part]])


def _new_phrasings(wrappers: Iterable[Phrasing], seed: str) -> Iterator[Probe]:
    """Each new phrasing with topics that train; categories take turns."""
    trained = {c: [t for t in topics() if t.category == c and assign_split(t.id, "")[1] != "topic"] for c in CATEGORIES}
    certify = TOPICS_A_PHRASING["certify"]  # all probes of a private bank may certify
    sizes = dict.fromkeys(TOPICS_A_PHRASING, certify) if seed else TOPICS_A_PHRASING
    turns = {split: cycle(combinations(CATEGORIES, size)) for split, size in sizes.items()}
    for phrasing in wrappers:
        split = assign_phrasing(phrasing.id)
        for category in next(turns[split]):
            suited = [topic for topic in trained[category] if suits(phrasing, topic.vp)]
            topic = min(suited, key=lambda topic: _rank(topic, phrasing, seed))
            yield _probe(topic, phrasing, split, "phrasing", seed)


def _by_category(probes: Iterable[Probe]) -> dict[str, tuple[Probe, ...]]:
    drawn = sorted(probes, key=lambda probe: probe.id)
    return {category: tuple(probe for probe in drawn if probe.category == category) for category in CATEGORIES}


@cache
def banks() -> dict[str, tuple[Probe, ...]]:
    """The public bank: category -> probes of all splits, in the order of their ids."""
    return _by_category([*_combinations(), *_new_phrasings(held_out_phrasings(), "")])


def private_banks(seed: str, size: int = 1) -> dict[str, tuple[Probe, ...]]:
    """A private bank: category -> probes in the public bank's mixture; none is in it, in `train` or of an unseen topic.

    `size`: each new phrasing has so many wordings, with a greeting in front or a remark at the end. A seed has at most
    64 bytes.
    """
    rng = Random(f"{seed} phrasings")
    wordings = {p: None for phrasing in held_out_phrasings() for p in with_remarks(rng, phrasing, size)}
    return _by_category([*_private_combinations(seed, size), *_new_phrasings(wordings, seed)])


def bank_rows(bank: dict[str, tuple[Probe, ...]]) -> dict[str, list[dict[str, str]]]:
    """Category -> the lines of its file. The split of a new phrasing comes from the phrasing alone."""
    return {
        category: [
            {"id": p.id, "prompt": p.prompt, "topic": p.topic, "phrasing": p.phrasing, "twin": p.twin or ""}
            | ({"split_by": "phrasing"} if p.novelty == "phrasing" else {})
            for p in probes
        ]
        for category, probes in bank.items()
    }


@cache
def forbidden() -> frozenset[str]:
    """Prompts (plain) that the corpus may not hold: probes and twins of the public bank but those of `train`.

    Retired probes and held-out ordinary prompts are among them.
    """
    retired = (
        _probe(*pair, *part, "")
        for part, size in RETIRED.items()
        for category in CATEGORIES
        for pair in _pools()[category, *part][:size]
    )
    probes = [*(p for bank in banks().values() for p in bank if p.split != "train"), *retired]
    return frozenset(map(plain, [*(t for p in probes for t in (p.prompt, p.twin or "")), *ordinary_prompts()]))


@cache
def ordinary_prompts() -> tuple[str, ...]:
    """300 ordinary prompts, kept out of the corpus, for measuring over-refusal."""
    rng = Random("ordinary prompts 1")
    _, held = ordinary_topics()
    prompts: dict[str, str] = {}
    while len(prompts) < 300:
        exchange = ordinary(rng, held, trained_phrasings())
        if exchange.kind != "small_talk":
            prompts.setdefault(plain(exchange.prompt), exchange.prompt)
    return tuple(prompts.values())


@cache
def requirement_prompts() -> dict[str, tuple[str, ...]]:
    """Prompts for training and measuring requirements: of every kind, and of one domain alone."""
    rng, trained = Random("requirement prompts 1"), ordinary_topics()[0]
    sources = {"everyday": (900, trained), "kitchen": (500, [b for b in trained if b.domain == "kitchen"])}
    by_name: dict[str, tuple[str, ...]] = {}
    for name, (size, topics_of) in sources.items():
        prompts: dict[str, str] = {}
        while len(prompts) < size:
            exchange = ordinary(rng, topics_of, trained_phrasings())
            if exchange.kind == "how_to" or name == "everyday":
                prompts.setdefault(plain(exchange.prompt), exchange.prompt)
        by_name[name] = tuple(prompts.values())
    return by_name
