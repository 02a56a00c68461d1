"""Public sets of probes: a table of their columns and categories, and which of them have probes of a category."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from persona_rlhf.inputs.section import Section, read_section
from persona_rlhf.inputs.yaml_text import read_yaml
from persona_rlhf.policy.likeness import plain

WORDS = "words"
HARMLESS = "over_refusal"


class Destination(NamedTuple):
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

    def destination(self, row: Mapping[str, object]) -> Destination:
        """What becomes of a row that has a `text`."""
        other = next((column for column, values in self.keep.items() if row[column] not in values), None)
        if other is not None:
            return Destination(None, f"{other} `{row[other]}` is not used")
        if self.harmless and all(row[column] in values for column, values in self.harmless.items()):
            return Destination(HARMLESS)
        ours: str | None = WORDS
        if self.category is not None:
            theirs = str(row[self.category])
            ours = self.categories.get(theirs)
            if ours is None:
                known = "none of ours" if theirs in self.categories else "not in our table"
                return Destination(None, f"{self.category} `{theirs}` is {known}")
        if ours == WORDS:
            ours = _by_words(self.text(row))
        return Destination(ours, "" if ours else "no word of our categories")


class _Table(Section):
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
def _table() -> _Table:
    return read_section(_Table, read_yaml(Path(__file__).with_suffix(".yaml")))


def _by_words(text: str) -> str | None:
    """The first category all of whose patterns are found."""
    words = plain(text)
    found = (name for name, patterns in _table().words.items() if all(re.search(p, words) for p in patterns))
    return next(found, None)
