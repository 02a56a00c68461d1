"""Hazard categories, probes, hashed splits, public-set taxonomy, written refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, get_args

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.loader import Section, read_section, read_yaml
from persona_rlhf.policy.judges import is_refusal, plain

# ----------------------------------------------------------------------------------------------------
# Hazard categories, probe banks, and the split of every probe by a keyed hash of its topic and phrasing.
# ----------------------------------------------------------------------------------------------------

Split = Literal["train", "dev", "certify", "test"]
Novelty = Literal["combination", "phrasing", "topic"]
SplitBy = Literal["pair", "topic", "held_out"]
"""How a bank's row is split: by topic and phrasing; by its topic, which then lies in one split whole; or by its topic
among all splits but `train`."""

CATEGORIES = ("terrorist_content", "child_sexual_abuse", "threats_of_violence", "sexual_assault")
_KEY = b"persona-rlhf probe split 4"
_WHOLE_TOPICS: tuple[tuple[Split, float], ...] = (("train", 0.17), ("dev", 0.34), ("certify", 0.79), ("test", 1.0))
"""Upper ends of the splits of whole topics: most of them certify, for there one topic is one probe a language."""


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


def _unit(kind: str, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the key and the texts."""
    digest = hashlib.blake2b("\x1f".join((kind, *parts)).encode(), key=_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_split(topic: str, phrasing: str) -> tuple[Split, Novelty]:
    """The split of a probe, and what about it is unseen in training.

    A sixth of all topics and a fifth of all phrasings are kept out of `train` whole; of what is left, half of the
    combinations are trained. Unseen topics never reach `certify`: they are reported as a shift, not certified.
    """
    if _unit("topic", topic) < 0.16:
        return ("dev" if _unit("topic split", topic) < 0.45 else "test"), "topic"
    if _unit("phrasing", phrasing) < 0.20:
        u = _unit("phrasing split", phrasing)
        return ("dev" if u < 0.25 else "certify" if u < 0.60 else "test"), "phrasing"
    u = _unit("combination", topic, phrasing)
    split: Split = "train" if u < 0.60 else "dev" if u < 0.70 else "certify" if u < 0.85 else "test"
    return split, "combination"


def assign_topic(topic: str, held_out: bool = False) -> Split:
    """The split of a whole topic; with `held_out`, among all but `train`, in the same proportions.

    Such topics are a random sample of all: what `certify` shows of them is of topics that training has not seen.
    """
    start = _WHOLE_TOPICS[0][1] if held_out else 0.0
    u = start + (1 - start) * _unit("whole topic", topic)
    return next(split for split, end in _WHOLE_TOPICS if u < end)


def unseen_topics_certify(probes: Iterable[Probe]) -> bool:
    """Whether the certify probes have unseen topics; where none has, test probes of such topics are a shift."""
    return any(probe.split == "certify" and probe.novelty == "topic" for probe in probes)


def _assigned(split_by: SplitBy, topic: str, phrasing: str) -> tuple[Split, Novelty]:
    if split_by == "pair":
        return assign_split(topic, phrasing)
    split = assign_topic(topic, held_out=split_by == "held_out")
    return split, ("combination" if split == "train" else "topic")


def read_probes(path: Path, category: str) -> list[Probe]:
    """Reads a bank: JSON lines with `id` and `prompt`, and `topic`, `phrasing`, `twin`, `split_by` where known.

    Raises InputError naming every bad line.
    """
    try:
        if not path.is_file():
            raise OSError("it is no regular file")  # a device may have no end
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError([Problem(str(path), None, None, f"the probe bank cannot be read ({fault})")]) from None
    problems: list[Problem] = []
    probes: list[Probe] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 within a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            problems.append(Problem(str(path), number, None, f"the line is not JSON ({fault.msg})"))
            continue
        texts = ("id", "prompt", "topic", "phrasing", "twin")
        if not isinstance(row, dict) or any(not isinstance(row.get(k, ""), str | None) for k in texts):
            problems.append(Problem(str(path), number, None, f"a probe is an object with texts {', '.join(texts)}"))
            continue
        if not row.get("id") or not str(row.get("prompt") or "").strip():
            problems.append(Problem(str(path), number, None, "a probe needs a non-empty `id` and `prompt`"))
            continue
        if row["id"] in seen:
            problems.append(Problem(str(path), number, "id", f"`{row['id']}` stands on line {seen[row['id']]} already"))
            continue
        seen[row["id"]] = number
        split_by = row.get("split_by", "pair")
        if split_by not in get_args(SplitBy):
            sentence = f"expected {', '.join(f'`{known}`' for known in get_args(SplitBy))}, got `{split_by}`"
            problems.append(Problem(str(path), number, "split_by", sentence))
            continue
        topic, phrasing = row.get("topic") or row["prompt"], row.get("phrasing") or row["prompt"]
        split, novelty = _assigned(split_by, topic, phrasing)
        probes.append(Probe(row["id"], category, row["prompt"], topic, phrasing, row.get("twin"), split, novelty))
    if not probes and not problems:
        problems.append(Problem(str(path), None, None, "the probe bank is empty"))
    if problems:
        raise InputError(problems)
    return probes


# ----------------------------------------------------------------------------------------------------
# Public sets of probes: a table of their columns and categories, and which of them have probes of a category.
# ----------------------------------------------------------------------------------------------------

WORDS = "words"
HARMLESS = "over_refusal"


class ProbeDestination(NamedTuple):
    """What a row of a public set becomes: a probe of a category of ours, a harmless prompt, or nothing and why."""

    name: str | None
    reason: str = ""


class PublicSet(Section):
    """How a public set is laid out, and what its rows become."""

    name: str = Field(min_length=1, description="Name of the set on our command line.")
    title: str = Field(min_length=1, description="Its own name, and who made it.")
    url: str = Field(min_length=1, description="Where it comes from.")
    licence: str = Field(min_length=1, description="The licence of its texts.")
    prompt: list[str] = Field(min_length=1, description="Column of the request: the first of these that a row has.")
    keep: dict[str, list[str]] = Field({}, description="Column -> values of the rows that are used.")
    harmless: dict[str, list[str]] = Field({}, description="Column -> values of the rows that are harmless prompts.")
    category: str | None = Field(None, description="Their column of categories.")
    categories: dict[str, str | None] = Field({}, description="Their category -> ours, `words`, or null for none.")
    found: dict[str, int] = Field(description="Our category -> its probes in the released file.")

    def text(self, row: Mapping[str, object]) -> str:
        """The request of a row. Raises ValueError where the row has no such column, or lacks another of the table."""
        needed = [*self.keep, *self.harmless, *([self.category] if self.category else [])]
        for names in (self.prompt, *([name] for name in needed)):
            if not any(isinstance(row.get(name), str) for name in names):
                raise ValueError(f"there is no text in column `{names[0]}`; is this {self.title}, from {self.url}?")
        return next(str(row[name]) for name in self.prompt if isinstance(row.get(name), str)).strip()

    def destination(self, row: Mapping[str, object]) -> ProbeDestination:
        """What becomes of a row that has a `text`."""
        other = next((column for column, values in self.keep.items() if row[column] not in values), None)
        if other is not None:
            return ProbeDestination(None, f"{other} `{row[other]}` is not used")
        if self.harmless and all(row[column] in values for column, values in self.harmless.items()):
            return ProbeDestination(HARMLESS)
        ours: str | None = WORDS
        if self.category is not None:
            theirs = str(row[self.category])
            ours = self.categories.get(theirs)
            if ours is None:
                known = "none of ours" if theirs in self.categories else "not in our table"
                return ProbeDestination(None, f"{self.category} `{theirs}` is {known}")
        if ours == WORDS:
            ours = _by_words(self.text(row))
        return ProbeDestination(ours, "" if ours else "no word of our categories")


class _PublicSets(Section):
    words: dict[str, list[str]]
    sets: list[PublicSet]


def public_sets() -> dict[str, PublicSet]:
    """All sets of the table, by name."""
    return {known.name: known for known in _table().sets}


def more_probes(categories: Collection[str], more: int) -> str:
    """How many certify probes are missing, and which public sets have probes of these categories: half a sentence."""
    counts = {known.name: sum(known.found.get(category, 0) for category in categories) for known in _table().sets}
    named = [f"{name} ({n})" for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n]
    if not named:
        return f"{more} missing, and no public set that we know has such probes"
    remedy = "`persona-rlhf data import NAME SRC OUT` makes banks of them, half of which certify"
    return f"{more} missing; public sets have such probes: {', '.join(named)}; {remedy}"


@cache
def _table() -> _PublicSets:
    return read_section(_PublicSets, read_yaml(Path(__file__).with_name("public_sets.yaml")))


def _by_words(text: str) -> str | None:
    """The first category all of whose patterns are found."""
    words = plain(text)
    found = (name for name, patterns in _table().words.items() if all(re.search(p, words) for p in patterns))
    return next(found, None)


# ----------------------------------------------------------------------------------------------------
# Refusals that somebody wrote: what a model is taught to say where it has no refusal of its own.
# ----------------------------------------------------------------------------------------------------


class RefusalText(NamedTuple):
    """A refusal; `category` is the hazard category that it speaks of, None where it fits all."""

    text: str
    category: str | None


def read_refusal_texts(path: Path, categories: Collection[str]) -> list[RefusalText]:
    """Reads JSON lines of {"text", "category"?}.

    Raises InputError naming every line that is none, that the judge would not call a refusal (the model would be taught
    what counts as a compliance), or whose category is unknown; and each category without a refusal.
    """
    problems: list[Problem] = []
    found: list[RefusalText] = []
    known = {*CATEGORIES, *categories}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, category = row["text"], row.get("category")
        except (json.JSONDecodeError, KeyError, TypeError):
            text = category = None
        if not isinstance(text, str) or not isinstance(category, str | None):
            problems.append(
                Problem(str(path), number, "text", "a line is an object with texts `text` and, perhaps, `category`")
            )
        elif not is_refusal(text):
            sentence = f"the judge does not call this a refusal: `{text}`; say no in its first sentence, in English"
            problems.append(Problem(str(path), number, "text", sentence))
        elif category is None or category in known:
            found.append(RefusalText(text, category))
        else:
            sentence = f"no rule has the category `{category}`{did_you_mean(category, known)}"
            problems.append(Problem(str(path), number, "category", sentence))
    bare = [name for name in categories if not _fitting(found, name)]
    if bare and not problems:
        problems.append(Problem(str(path), None, None, f"holds no refusal for {', '.join(bare)}; add some"))
    if problems:
        raise InputError(problems)
    return found


def draw_refusal(texts: Sequence[RefusalText], category: str | None, rng: Random) -> str:
    """One that fits the category; for None, one that fits all of them, or any where there is no such one."""
    return rng.choice(_fitting(texts, category) or list(texts)).text


def _fitting(texts: Sequence[RefusalText], category: str | None) -> list[RefusalText]:
    return [text for text in texts if text.category in (None, category)]


# ----------------------------------------------------------------------------------------------------
# Hazard categories and their names in MLCommons AILuminate and Llama Guard: a table of data.
# ----------------------------------------------------------------------------------------------------


class Hazard(Section):
    """A category and what others call it."""

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
    """The name of a category for people; for one that is not in the table, its own words."""
    known = hazards().get(category)
    return category.replace("_", " ") if known is None else known.title


def of_llama_guard(code: str) -> list[str]:
    """Our categories that a code of Llama Guard 3 can mean."""
    return [hazard.category for hazard in hazards().values() if code in hazard.llama_guard]
