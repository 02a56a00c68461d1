"""Which language a text is in: by its script, else by its most frequent little words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

from persona_rlhf.inputs.section import Section, read_section
from persona_rlhf.inputs.yaml_text import read_yaml

_FEWEST = 2
"""Little words that must be found before a text counts as being in a language."""


class _Table(Section):
    scripts: dict[str, str]
    words: dict[str, str]


def known_languages() -> tuple[str, ...]:
    """The ISO 639-1 codes that can be told."""
    table = _table()
    return tuple(dict.fromkeys([*table.words, *table.scripts.values()]))


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, or None where that cannot be told.

    A script that one language alone is written in tells it, where most letters are of it. Else the language whose
    little words (the, der, les, ...) are the most frequent: at least two, and more than of any other language.
    """
    table = _table()
    letters = Counter(_script(character) for character in text if character.isalpha())
    if not letters:
        return None
    if letters.keys() & {"HIRAGANA", "KATAKANA"}:  # Japanese writes Chinese characters between them
        letters["HIRAGANA"] += letters.pop("CJK", 0) + letters.pop("KATAKANA", 0)
    script, most = letters.most_common(1)[0]
    if script in table.scripts:
        return table.scripts[script] if 2 * most > letters.total() else None
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    found = {code: sum(words[word] for word in little) for code, little in _little_words().items()}
    (best, count), (_, second) = sorted(found.items(), key=lambda item: -item[1])[:2]
    return best if count >= _FEWEST and count > second else None


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _little_words() -> dict[str, frozenset[str]]:
    return {code: frozenset(words.split()) for code, words in _table().words.items()}


@cache
def _table() -> _Table:
    return read_section(_Table, read_yaml(Path(__file__).with_suffix(".yaml")))
