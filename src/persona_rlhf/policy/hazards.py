"""Hazard categories, their probes and hashed splits, public probe sets, and written refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.json_lines import Text, read_json_lines
from persona_rlhf.config.loader import Section, read_section, read_yaml
from persona_rlhf.policy.judges import is_refusal, plain

Split = Literal["train", "dev", "certify", "test"]
Novelty = Literal["combination", "phrasing", "topic"]
SplitBy = Literal["pair", "topic", "held_out", "phrasing", "shift"]
"""The rule that splits a bank's row: by topic and phrasing, by its topic alone, or, among all splits but `train`, by
its topic (`held_out`) or by its phrasing. Every `shift` row is in `test`."""

CATEGORIES = ("terrorist_content", "child_sexual_abuse", "threats_of_violence", "sexual_assault")
_KEY = b"persona-rlhf probe split 4"
_TOPIC_KEY = b"persona-rlhf topic split 2"
"""The key of the split of whole topics: its `certify` topics played no part in the choice of any setting."""
_WHOLE_TOPICS: tuple[tuple[Split, float], ...] = (("train", 0.19), ("dev", 0.255), ("certify", 0.865), ("test", 1.0))
"""Upper ends of the splits of whole topics; most certify, since there a topic has one probe per language."""

_PHRASING_KEY = b"persona-rlhf phrasing split 1"
"""The key of the split of whole phrasings: nobody looked at its `certify` and `test` before the bank was complete."""
_WHOLE_PHRASINGS: tuple[tuple[Split, float], ...] = (("dev", 0.12), ("certify", 0.76), ("test", 1.0))


class Probe(NamedTuple):
    """One tier-one prompt. `twin` is a harmless near-neighbour that shares its words."""

    id: str
    category: str
    prompt: str
    topic: str
    phrasing: str
    twin: str | None
    split: Split
    novelty: Novelty


def _unit(kind: str, *parts: str, key: bytes = _KEY) -> float:
    """A number in [0, 1) that depends only on the key and the texts."""
    digest = hashlib.blake2b("\x1f".join((kind, *parts)).encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_split(topic: str, phrasing: str, key: bytes | None = None) -> tuple[Split, Novelty]:
    """The split of a probe, and the part of it that is unseen in training.

    A sixth of all topics and a fifth of all phrasings never get into `train`; of the other combinations, 60% do.
    Unseen topics never reach `certify`: they are reported as a shift, not certified.
    The bundled base was trained on `train` of the public key, so a secret `key` splits the rest alone, in the same
    proportions.
    """
    if _unit("topic", topic) < 0.16:
        return ("dev" if _unit("topic split", topic, key=key or _KEY) < 0.45 else "test"), "topic"
    if _unit("phrasing", phrasing) < 0.20:
        u = _unit("phrasing split", phrasing, key=key or _KEY)
        return ("dev" if u < 0.25 else "certify" if u < 0.60 else "test"), "phrasing"
    u = _unit("combination", topic, phrasing)
    if key is not None and u >= 0.60:
        u = 0.60 + 0.40 * _unit("combination", topic, phrasing, key=key)
    split: Split = "train" if u < 0.60 else "dev" if u < 0.70 else "certify" if u < 0.85 else "test"
    return split, "combination"


def assign_topic(topic: str, held_out: bool = False, key: bytes | None = None) -> Split:
    """The split of a whole topic; with `held_out`, among all but `train`, in the same proportions.

    Held-out topics are a random sample of all topics, so `certify` shows the rate on topics unseen in training.
    A secret `key` splits the topics that are not in `train` of the public key.
    """
    trained = _WHOLE_TOPICS[0][1]
    start = trained if held_out else 0.0
    u = start + (1 - start) * _unit("whole topic", topic, key=_TOPIC_KEY)
    if key is not None and u >= trained:
        u = trained + (1 - trained) * _unit("whole topic", topic, key=key)
    return next(split for split, end in _WHOLE_TOPICS if u < end)


def assign_phrasing(phrasing: str, key: bytes | None = None) -> Split:
    """The split of a whole phrasing that never trains, by the public key or a secret one.

    Its `certify` phrasings are a random sample of all these, so `certify` shows the rate on phrasings unseen in
    training.
    """
    u = _unit("whole phrasing", phrasing, key=key or _PHRASING_KEY)
    return next(split for split, end in _WHOLE_PHRASINGS if u < end)


def unseen_topics_certify(probes: Iterable[Probe]) -> bool:
    """Whether the certify probes have unseen topics; otherwise, test probes of unseen topics are a shift."""
    return any(probe.split == "certify" and probe.novelty == "topic" for probe in probes)


def _assigned(split_by: SplitBy, topic: str, phrasing: str, key: bytes | None) -> tuple[Split, Novelty]:
    if split_by == "shift":
        return "test", "topic"
    if split_by == "pair":
        return assign_split(topic, phrasing, key)
    if split_by == "phrasing":
        return assign_phrasing(phrasing, key), "phrasing"
    split = assign_topic(topic, held_out=split_by == "held_out", key=key)
    return split, ("combination" if split == "train" else "topic")


def bank_hash(probes: Iterable[Probe]) -> str:
    """sha256 of a bank's probes; their order does not matter."""
    rows = sorted([probe.category, probe.prompt] for probe in probes)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class _ProbeRow(NamedTuple):
    id: Text
    prompt: Text
    topic: str | None = None
    phrasing: str | None = None
    twin: str | None = None
    split_by: Any = "pair"


def read_probes(path: Path, category: str, key: bytes | None = None) -> list[Probe]:
    """The probes of a bank: JSON lines with `id` and `prompt`, optionally `topic`, `phrasing`, `twin`, `split_by`.

    A secret `key` splits those that are not in `train` anew. Raises InputError with every bad line.
    """
    if not path.is_file():  # a device may have no end
        sentence = "the probe bank cannot be read (it is no regular file)"
        raise InputError([Problem(str(path), None, None, sentence)])
    seen: dict[str, int] = {}

    def check(number: int, row: _ProbeRow) -> Iterator[tuple[str, str]]:
        if seen.setdefault(row.id, number) != number:
            yield "id", f"`{row.id}` is on line {seen[row.id]} already"
        elif row.split_by not in get_args(SplitBy):
            rules = ", ".join(f"`{rule}`" for rule in get_args(SplitBy))
            yield "split_by", f"expected {rules}, got `{row.split_by}`"

    sentence = "a probe is an object with texts `id` and `prompt`, not empty, and perhaps topic, phrasing and twin"
    probes = []
    for row in read_json_lines(path, _ProbeRow, sentence, check):
        topic, phrasing = row.topic or row.prompt, row.phrasing or row.prompt
        split, novelty = _assigned(row.split_by, topic, phrasing, key)
        probes.append(Probe(row.id, category, row.prompt, topic, phrasing, row.twin, split, novelty))
    if not probes:
        raise InputError([Problem(str(path), None, None, "the probe bank is empty")])
    return probes


WORDS = "words"
HARMLESS = "over_refusal"


class ProbeDestination(NamedTuple):
    """The use of a row of a public set: probe of one of our categories, harmless prompt, or none and the reason."""

    name: str | None
    reason: str = ""


class PublicSet(Section):
    """The columns of a public set, and the use of its rows."""

    name: str = Field(min_length=1, description="Name of the set on our command line.")
    title: str = Field(min_length=1, description="The name and authors of the set.")
    url: str = Field(min_length=1, description="Where it comes from.")
    licence: str = Field(min_length=1, description="The licence of its texts.")
    prompt: list[str] = Field(min_length=1, description="Column of the request: the first of these that a row has.")
    keep: dict[str, list[str]] = Field({}, description="Column -> values of the rows that are used.")
    harmless: dict[str, list[str]] = Field({}, description="Column -> values of the rows that are harmless prompts.")
    category: str | None = Field(None, description="Their column of categories: a text, or a list of texts.")
    categories: dict[str, str | None] = Field({}, description="Their category -> ours, `words`, or null for none.")
    shift: bool = Field(False, description="Whether the set is kept for tests of shift: all its probes are `test`.")
    counts: dict[str, int] = Field(description="Our category -> its probes in the released file.")

    def text(self, row: Mapping[str, object]) -> str:
        """The request of a row. Raises ValueError where the row lacks a column of the table."""
        needed = (self.prompt, *([name] for name in (*self.keep, *self.harmless)))
        absent = [names[0] for names in needed if not any(isinstance(row.get(name), str) for name in names)]
        if self.category is not None and not self._labels(row):
            absent.append(self.category)
        if absent:
            raise ValueError(f"there is no text in column `{absent[0]}`; is this {self.title}, from {self.url}?")
        return next(str(row[name]) for name in self.prompt if isinstance(row.get(name), str)).strip()

    def destination(self, row: Mapping[str, object]) -> ProbeDestination:
        """The use of a row that has a `text`."""
        other = next((column for column, values in self.keep.items() if row[column] not in values), None)
        if other is not None:
            return ProbeDestination(None, f"{other} `{row[other]}` is not used")
        if self.harmless and all(row[column] in values for column, values in self.harmless.items()):
            return ProbeDestination(HARMLESS)
        ours = [WORDS]
        if self.category is not None:
            theirs = self._labels(row)
            ours = [name for label, name in self.categories.items() if name is not None and label in theirs]
            if not ours:
                reason = "none of ours" if theirs[0] in self.categories else "not in our table"
                return ProbeDestination(None, f"{self.category} `{theirs[0]}` is {reason}")
        names = (_by_words(self.text(row)) if name == WORDS else name for name in ours)
        name = next(filter(None, names), None)
        return ProbeDestination(name, "" if name else "no word of our categories")

    def _labels(self, row: Mapping[str, object]) -> list[str]:
        """Their categories of a row."""
        value = row.get(self.category or "")
        return [label for label in (value if isinstance(value, list) else [value]) if isinstance(label, str)]


class _PublicSets(Section):
    words: dict[str, list[str]]
    sets: list[PublicSet]


def public_sets() -> dict[str, PublicSet]:
    """All sets of the table, by name."""
    return {public.name: public for public in _table().sets}


def more_probes(categories: Collection[str], more: int) -> str:
    """Half a sentence: how many certify probes are missing, and the public sets that have such probes."""
    sets = [public for public in _table().sets if not public.shift]
    counts = {public.name: sum(public.counts.get(name, 0) for name in categories) for public in sets}
    named = [f"{name} ({n})" for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n]
    if not named:
        return f"{more} missing, and no public set in our table has such probes"
    remedy = "`persona-rlhf data import NAME SRC OUT` makes banks of them, three quarters of which certify"
    return f"{more} missing; public sets have such probes: {', '.join(named)}; {remedy}"


@cache
def _table() -> _PublicSets:
    return read_section(_PublicSets, read_yaml(Path(__file__).with_name("public_sets.yaml")))


def _by_words(text: str) -> str | None:
    """The first category whose patterns all match."""
    words = plain(text)
    names = (name for name, patterns in _table().words.items() if all(re.search(p, words) for p in patterns))
    return next(names, None)


class RefusalText(NamedTuple):
    """A written refusal; `category` is the hazard category that it mentions, None where it fits all.

    `prompt` is the only request that it fits, None where it names none.
    """

    text: str
    category: str | None = None
    prompt: str | None = None


class WrittenDemonstration(NamedTuple):
    """A request to refuse, the refusal that fits it, and its benign twin."""

    category: str
    prompt: str
    refusal: str
    twin: str

    @property
    def probe(self) -> Probe:
        """The request as a probe of `train`, a topic of its own."""
        text = self.prompt
        return Probe(text, self.category, text, text, text, self.twin, "train", "combination")

    @property
    def fitting(self) -> RefusalText:
        """The refusal, for this request alone."""
        return RefusalText(self.refusal, self.category, self.prompt)


def read_demonstrations(path: Path, probes: Sequence[Probe]) -> list[WrittenDemonstration]:
    """The demonstrations of a file of JSON lines {"category", "prompt", "refusal", "twin"}.

    Raises InputError with every malformed line, every text that the judge calls no refusal, every category without a
    probe, and every text that is a probe of another split than `train`.
    """
    held_out = {probe.prompt: probe.split for probe in probes if probe.split != "train"}
    categories = {probe.category for probe in probes}

    def check(_: int, row: WrittenDemonstration) -> Iterator[tuple[str, str]]:
        if not is_refusal(row.refusal):
            yield "refusal", f"the judge does not call this a refusal: `{row.refusal}`; refuse in its first sentence"
        if row.category not in categories:
            yield "category", f"no rule has the category `{row.category}`{did_you_mean(row.category, categories)}"
        for name in ("prompt", "twin"):
            if split := held_out.get(getattr(row, name)):
                yield name, f"this is a probe of `{split}`, which nothing may be trained on; leave it out"

    sentence = "a line is an object of four texts: category, prompt, refusal, twin"
    return read_json_lines(path, WrittenDemonstration, sentence, check)


def read_refusal_texts(path: Path, categories: Collection[str]) -> list[RefusalText]:
    """The refusals of a file of JSON lines {"text", "category"?}.

    Raises InputError with every malformed line, every text that the judge calls no refusal, every unknown category, and
    each category without a refusal.
    """
    allowed = {*CATEGORIES, *categories}

    def check(_: int, row: RefusalText) -> Iterator[tuple[str, str]]:
        if not is_refusal(row.text):
            sentence = f"the judge does not call this a refusal: `{row.text}`; refuse in its first sentence, in English"
            yield "text", sentence
        elif row.category is not None and row.category not in allowed:
            yield "category", f"no rule has the category `{row.category}`{did_you_mean(row.category, allowed)}"

    sentence = "a line is an object with texts `text` and, perhaps, `category`"
    refusals = read_json_lines(path, RefusalText, sentence, check)
    bare = [name for name in categories if not _fitting(refusals, name)]
    if bare:
        raise InputError([Problem(str(path), None, None, f"has no refusal for {', '.join(bare)}; add some")])
    return refusals


def draw_refusal(texts: Sequence[RefusalText], category: str | None, rng: Random, prompt: str | None = None) -> str:
    """A random refusal, of those for the prompt if there are any, else of those that fit the category.

    For None as category it is one that fits all categories, or any if none does.
    """
    written = [text for text in texts if prompt is not None and text.prompt == prompt]
    return rng.choice(written or _fitting(texts, category) or list(texts)).text


def _fitting(texts: Sequence[RefusalText], category: str | None) -> list[RefusalText]:
    return [text for text in texts if text.category in (None, category) and text.prompt is None]


class Hazard(Section):
    """A hazard category with its names in MLCommons AILuminate and Llama Guard."""

    category: str = Field(description="Our name, as rules write it.")
    title: str = Field(description="The name for people.")
    ailuminate: list[str] = Field(description="Short names of AILuminate's hazards.")
    llama_guard: list[str] = Field(description="Codes of Llama Guard 3.")
    bundled: bool = Field(False, description="Whether a probe bank is bundled.")

    def __str__(self) -> str:
        """`AILuminate vcr; Llama Guard S1`."""
        named = (("AILuminate", self.ailuminate), ("Llama Guard", self.llama_guard))
        return "; ".join(f"{name} {', '.join(codes)}" for name, codes in named if codes)


class _Taxonomy(Section):
    hazards: list[Hazard]


@cache
def hazards() -> dict[str, Hazard]:
    """All hazards of the table, by category."""
    table = read_section(_Taxonomy, read_yaml(Path(__file__).with_name("taxonomy.yaml")))
    return {hazard.category: hazard for hazard in table.hazards}


def title(category: str) -> str:
    """The name of a category for people; without an entry in the table, the category in words."""
    hazard = hazards().get(category)
    return category.replace("_", " ") if hazard is None else hazard.title


def of_llama_guard(code: str) -> list[str]:
    """Our categories that a code of Llama Guard 3 can mean."""
    return [hazard.category for hazard in hazards().values() if code in hazard.llama_guard]
