#!/usr/bin/env python
"""Makes the tier-one bank for real models: topics and phrasings, both written by hand, to `CATEGORY.LANGUAGE.jsonl`.

    python scripts/make_tier_one_real.py [OUT]

A topic is written in English, and in French too where its line has four parts. It lies in one split by its hash, in
both languages. A training topic is asked in a few phrasings; a held-out topic in one, chosen by hash among all
phrasings, those that training never uses included. Nothing here is random: the same topics and phrasings give the same
bytes. The README's table of counts is printed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from persona_rlhf.policy.hazards import CATEGORIES, assign_topic

FOLDER = Path(__file__).parents[1] / "data" / "policy" / "tier_one_real"
LANGUAGES = ("en", "fr")
PHRASINGS_A_TOPIC = 4  # of a training topic, in each language: more topics teach more than more phrasings of each


class Topic(NamedTuple):
    """A request and its benign twin, verb phrases both, by language."""

    id: str
    category: str
    request: Mapping[str, str]
    twin: Mapping[str, str]


def read_topics(folder: Path = FOLDER) -> list[Topic]:
    """All topics, in the order in which they are written."""
    written = yaml.safe_load((folder / "topics.yaml").read_text(encoding="utf-8"))
    assert tuple(sorted(written)) == tuple(sorted(CATEGORIES))
    topics = []
    for category, lines in written.items():
        for line in lines:
            parts = [part.strip() for part in line.split("|")]
            assert len(parts) in (2, 2 * len(LANGUAGES)), line
            name = re.sub(r"[^a-z0-9]+", "-", parts[0].lower()).strip("-")
            request, twin = (dict(zip(LANGUAGES, parts[start::2], strict=False)) for start in (0, 1))
            topics.append(Topic(name, category, request, twin))
    assert len({topic.id for topic in topics}) == len(topics), "two topics have one id"
    return topics


def rows(topics: Sequence[Topic], phrasings: Mapping[str, Any], language: str) -> Iterator[dict[str, str]]:
    """The probes of some topics in one language, in the shape that `read_probes` takes."""
    trained, held_out = (phrasings[language][part] for part in ("train", "held_out"))
    for topic in topics:
        if assign_topic(topic.id) == "train":
            chosen = _by_hash(trained, topic.id)[:PHRASINGS_A_TOPIC]
        else:
            chosen = _by_hash([*trained, *held_out], topic.id)[:1]
        for phrasing in sorted(chosen):
            name = _hash(phrasing)
            yield {
                "id": f"{topic.category}-{language}-{_hash(topic.id + name)}",
                "prompt": phrasing.replace("{}", topic.request[language]),
                "topic": topic.id,
                "phrasing": f"{language}-{name}",
                "twin": phrasing.replace("{}", topic.twin[language]),
                "split_by": "topic",
            }


def make(out: Path, source: Path = FOLDER) -> None:
    """Writes every bank into a folder."""
    topics = read_topics(source)
    phrasings = yaml.safe_load((source / "phrasings.yaml").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for category in CATEGORIES:
        for language in LANGUAGES:
            chosen = [topic for topic in topics if topic.category == category and language in topic.request]
            bank = rows(chosen, phrasings, language)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bank)
            (out / f"{category}.{language}.jsonl").write_text(text, encoding="utf-8")


def count_table(topics: Sequence[Topic]) -> Iterator[str]:
    """The rows of the README's table: probes by category, language and split."""
    for category, language in product((*CATEGORIES, "all"), LANGUAGES):
        chosen = [topic for topic in topics if category in (topic.category, "all") and language in topic.request]
        count = Counter(assign_topic(topic.id) for topic in chosen)
        held_out = " | ".join(str(count[split]) for split in ("dev", "certify", "test"))
        yield f"| {category} | {language} | {count['train'] * PHRASINGS_A_TOPIC} ({count['train']}) | {held_out} |"


def _by_hash(phrasings: Sequence[str], topic: str) -> list[str]:
    return sorted(phrasings, key=lambda phrasing: _hash(f"{topic} {phrasing}"))


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=5).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER)
    make(parser.parse_args().out)
    print(*count_table(read_topics()), sep="\n")
