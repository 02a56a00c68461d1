"""Which texts are the same request: equal words, or nearly all word pairs in common."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise

NEAR = 0.8
"""Jaccard similarity of word pairs from which two texts count as one."""


def plain(text: str) -> str:
    """The words alone, in lower case and without accents: case, punctuation and spacing make no other request."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare))


def shingles(text: str) -> frozenset[tuple[str, str]]:
    """Pairs of neighbouring words of the plain text; its ends count as words, so that one word has pairs too."""
    words = ["", *plain(text).split(), ""]
    return frozenset(pairwise(words))


class Collection:
    """Named texts that can be asked for a near-duplicate of another: Jaccard similarity of shingles >= `NEAR`.

    Broder 1997, counted exactly through an inverted index.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._having: defaultdict[tuple[str, str], list[int]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        found = shingles(text)
        for shingle in found:
            self._having[shingle].append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(found))

    def near(self, text: str) -> str | None:
        """The name of the text that is most alike, where one is alike enough."""
        found = shingles(text)
        common = Counter(place for shingle in found for place in self._having.get(shingle, ()))
        alike = {place: n / (len(found) + self._sizes[place] - n) for place, n in common.items()}
        best = max(alike, key=lambda place: alike[place], default=None)
        return self._names[best] if best is not None and alike[best] >= NEAR else None
