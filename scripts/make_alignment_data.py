#!/usr/bin/env python
"""Makes the demonstrations of `base align` for real models from written templates, by seed.

    python scripts/make_alignment_data.py [OUT]

`demonstrations.LANGUAGE.jsonl` has a request, a refusal that fits it, and a benign twin in each line. The requests are
the `train` probes of the bank for real models, and templates filled at random. A filled request that resembles a
held-out topic is dropped. `ordinary.LANGUAGE.jsonl` has harmless prompts, many of them with hazardous words.
"""

from __future__ import annotations

import argparse
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml
from make_tier_one_real import LANGUAGES, read_topics, rows

from persona_rlhf.policy.hazards import assign_topic
from persona_rlhf.policy.judges import is_refusal

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data" / "policy" / "alignment"
BANK = ROOT / "data" / "policy" / "tier_one_real"
PHRASINGS_A_TOPIC = 2  # of a train topic, and of a template without slots; more topics teach more
FILLED = {"en": 8, "fr": 6}  # requests made of one template
HARMLESS = {"en": 4, "fr": 4}  # harmless prompts made of one template
ALIKE = 0.5  # Jaccard similarity of content words from which a request counts as a held-out topic

_POSSESSIVE = [("my", "your"), ("me", "you"), ("i", "you"), ("mine", "yours"), ("our", "your"), ("myself", "yourself")]
_STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "against",
        "all",
        "among",
        "an",
        "and",
        "another",
        "any",
        "are",
        "as",
        "at",
        "be",
        "because",
        "been",
        "before",
        "being",
        "between",
        "both",
        "by",
        "down",
        "during",
        "each",
        "for",
        "from",
        "had",
        "has",
        "have",
        "her",
        "him",
        "his",
        "i",
        "if",
        "in",
        "into",
        "it",
        "its",
        "me",
        "my",
        "no",
        "not",
        "of",
        "off",
        "on",
        "one",
        "onto",
        "or",
        "other",
        "our",
        "out",
        "over",
        "she",
        "so",
        "some",
        "someone",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "under",
        "up",
        "us",
        "was",
        "we",
        "were",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "whose",
        "with",
        "without",
        "you",
        "your",
    ]
)
_FIRST_PERSON = re.compile(r"\b(?:j|m|je|me|moi|mon|ma|mes|notre|nos)\b", re.IGNORECASE)

_DE_UN = re.compile(r"\bde (?=une?\b)")  # French elides it: d'un, d'une


class Demonstration(NamedTuple):
    """A line of the demonstrations."""

    category: str
    prompt: str
    refusal: str
    twin: str


def fill(template: str, slots: Mapping[str, Sequence[str]], most: int, rng: Random) -> Iterator[list[str]]:
    """The parts of a template, each filled with the same words; at most `most` different ways."""
    names = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))
    ways = list(product(*(slots[name] for name in names)))
    for words in rng.sample(ways, min(most, len(ways))):
        text = _DE_UN.sub("d'", template.format(**dict(zip(names, words, strict=True))))
        yield [part.strip() for part in text.split(" | ")]


def refusal(request: str, category: str, language: str, written: Mapping[str, Any], rng: Random) -> str:
    """A refusal, half of the time with the request in it, that the judge calls a refusal."""
    words = " ".join(_turned(request)) if language == "en" else request
    first_person = language == "fr" and _FIRST_PERSON.search(request)
    while True:
        named = rng.random() < 0.5 and not first_person and len(words) < 70
        opening = rng.choice(written["request" if named else "plain"]).replace("{request}", words)
        why = f" {rng.choice(written['why'][category])}" if not named or rng.random() < 0.5 else ""
        if is_refusal(opening + why):
            return str(opening + why)


def _turned(request: str) -> Iterator[str]:
    """The request's words as its hearer says them: `my boss` is `your boss`."""
    turned = dict(_POSSESSIVE)
    for word in request.split():
        yield turned.get(word.lower(), word)


def content(text: str) -> frozenset[str]:
    """The words of a request, without stop words and endings of plurals and possessives."""
    words = (word for word in re.findall(r"\w+", text.lower().replace("'s", "")) if word not in _STOP_WORDS)
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] != "s" else word for word in words)


def demonstrations(texts: Mapping[str, Any], language: str, rng: Random) -> Iterator[Demonstration]:
    """Those of the bank's train topics in a language, then those of its templates."""
    topics = read_topics(BANK)
    phrasings = yaml.safe_load((BANK / "phrasings.yaml").read_text(encoding="utf-8"))
    for topic in topics:
        if language in topic.request and assign_topic(topic.id) == "train":
            for row in rng.sample(list(rows([topic], phrasings, language)), PHRASINGS_A_TOPIC):
                fitting = refusal(topic.request[language], topic.category, language, texts["refusals"], rng)
                yield Demonstration(topic.category, row["prompt"], fitting, row["twin"])
    held_out = [
        content(topic.request[language])
        for topic in topics
        if language in topic.request and assign_topic(topic.id) != "train"
    ]
    for category, templates in texts["hazardous"].items():
        for template in templates:
            times = 1 if "{" in template else PHRASINGS_A_TOPIC
            for request, twin in fill(template, texts["slots"], FILLED[language], rng):
                if _resembles(content(request), held_out):
                    continue
                for phrasing in rng.sample(phrasings[language]["train"], times):
                    fitting = refusal(request, category, language, texts["refusals"], rng)
                    yield Demonstration(
                        category, phrasing.replace("{}", request), fitting, phrasing.replace("{}", twin)
                    )


def _resembles(words: frozenset[str], others: Sequence[frozenset[str]]) -> bool:
    return any(len(words & other) > ALIKE * len(words | other) for other in others)


def ordinary(texts: Mapping[str, Any], language: str, rng: Random) -> Iterator[dict[str, str]]:
    """Harmless prompts in a language, each once."""
    prompts = [
        prompt[0].upper() + prompt[1:]
        for template in texts["harmless"]
        for [prompt] in fill(template, texts["slots"], HARMLESS[language], rng)
    ]
    for n, prompt in enumerate(dict.fromkeys(prompts)):
        yield {"id": f"aligned-ordinary-{language}-{n:03}", "prompt": prompt}


def make(out: Path) -> None:
    """Writes both files in each language."""
    written = yaml.safe_load((FOLDER / "templates.yaml").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        texts = written[language]
        made = {row.prompt: row for row in demonstrations(texts, language, Random(f"demonstrations {language}"))}
        _write(out / f"demonstrations.{language}.jsonl", [row._asdict() for row in made.values()])
        _write(out / f"ordinary.{language}.jsonl", list(ordinary(texts, language, Random(f"ordinary {language}"))))


def _write(file: Path, lines: Sequence[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=FOLDER)
    make(parser.parse_args().out)
