"""The probe banks: which combinations of topic and phrasing make up each split, chosen by lowest hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from random import Random

from persona_rlhf.policy.hazards import CATEGORIES, Novelty, Probe, Split, assign_split
from persona_rlhf.training.world.ordinary import ordinary
from persona_rlhf.training.world.phrasings import phrasings, suits, trained_phrasings, wrap
from persona_rlhf.training.world.topics import ordinary_topics, topics, twin_of

# (split, novelty) -> probes a category.
SIZES: dict[tuple[Split, Novelty], int] = {
    ("train", "combination"): 450,
    ("dev", "combination"): 60,
    ("dev", "phrasing"): 60,
    ("dev", "topic"): 60,
    ("certify", "combination"): 80,
    ("certify", "phrasing"): 80,
    ("test", "combination"): 160,
    ("test", "phrasing"): 160,
    ("test", "topic"): 100,
}


def plain(text: str) -> str:
    """Lower-case words only: two prompts that differ in case or punctuation are one."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


_FUNCTION_WORDS = """
a an the my his her their our me him them i you it is are be am to of in on at for with and or by from into that who so
as this someone somebody
"""
_PLURALS = {"children": "child", "women": "woman", "men": "man", "people": "person"}


def content_words(text: str) -> frozenset[str]:
    """The words that carry the meaning, in the singular: two texts with the same ones are the same request."""
    words = (w.removesuffix("'s") for w in plain(text).split() if w not in _FUNCTION_WORDS.split())
    return frozenset(_PLURALS.get(w, w[:-1] if w.endswith("s") and not w.endswith("ss") else w) for w in words)


@lru_cache(maxsize=1)
def banks() -> dict[str, tuple[Probe, ...]]:
    """Category -> probes of all splits, in the order of their ids."""
    found: dict[str, tuple[Probe, ...]] = {}
    for category in CATEGORIES:
        pools: dict[tuple[Split, Novelty], list[tuple[str, Probe]]] = defaultdict(list)
        for topic in topics():
            if topic.category != category:
                continue
            for phrasing in phrasings():
                if not suits(phrasing, topic.vp):
                    continue
                split, novelty = assign_split(topic.id, phrasing.id)
                rank = hashlib.blake2b(f"{topic.id} {phrasing.id}".encode(), digest_size=6).hexdigest()
                probe = Probe(
                    f"{category}-{rank}",
                    category,
                    wrap(phrasing, topic.vp),
                    topic.id,
                    phrasing.id,
                    wrap(phrasing, twin_of(topic, phrasing.id).vp),
                    split,
                    novelty,
                )
                pools[split, novelty].append((rank, probe))
        chosen = [probe for key, size in SIZES.items() for _, probe in sorted(pools[key])[:size]]
        found[category] = tuple(sorted(chosen, key=lambda p: p.id))
    return found


@lru_cache(maxsize=1)
def forbidden() -> frozenset[str]:
    """Prompts (plain) that the corpus may not hold: every non-train probe and twin, every held-out ordinary prompt."""
    texts = [t for bank in banks().values() for p in bank if p.split != "train" for t in (p.prompt, p.twin or "")]
    return frozenset(map(plain, texts + ordinary_prompts()))


@lru_cache(maxsize=1)
def _ordinary_prompts() -> tuple[str, ...]:
    rng = Random("ordinary prompts 1")
    _, held = ordinary_topics()
    prompts: dict[str, str] = {}
    while len(prompts) < 300:
        exchange = ordinary(rng, held, trained_phrasings())
        if exchange.kind != "small_talk":
            prompts.setdefault(plain(exchange.prompt), exchange.prompt)
    return tuple(prompts.values())


def ordinary_prompts() -> list[str]:
    """300 ordinary prompts, kept out of the corpus, for measuring over-refusal."""
    return list(_ordinary_prompts())


@lru_cache(maxsize=1)
def requirement_prompts() -> dict[str, tuple[str, ...]]:
    """Prompts that requirements are taught and measured on: of every kind, and of one domain alone."""
    rng, trained = Random("requirement prompts 1"), ordinary_topics()[0]
    sources = {"everyday": (900, trained), "kitchen": (500, [b for b in trained if b.domain == "kitchen"])}
    found: dict[str, tuple[str, ...]] = {}
    for name, (size, topics_of) in sources.items():
        prompts: dict[str, str] = {}
        while len(prompts) < size:
            exchange = ordinary(rng, topics_of, trained_phrasings())
            if exchange.kind == "how_to" or name == "everyday":
                prompts.setdefault(plain(exchange.prompt), exchange.prompt)
        found[name] = tuple(prompts.values())
    return found


def write_banks(root: Path) -> None:
    """Writes `tier_one/CATEGORY.jsonl`, `requirements/NAME.jsonl` and `ordinary.jsonl` under `root` (data/policy)."""
    (root / "tier_one").mkdir(parents=True, exist_ok=True)
    for category, bank in banks().items():
        rows = [
            {"id": p.id, "prompt": p.prompt, "topic": p.topic, "phrasing": p.phrasing, "twin": p.twin} for p in bank
        ]
        (root / "tier_one" / f"{category}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"
        )
    (root / "requirements").mkdir(exist_ok=True)
    plainly = {f"requirements/{name}": prompts for name, prompts in requirement_prompts().items()}
    for name, prompts in {**plainly, "ordinary": ordinary_prompts()}.items():
        rows = [{"id": f"{Path(name).name}-{n:03d}", "prompt": text} for n, text in enumerate(prompts)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
