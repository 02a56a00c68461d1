"""Features of an answer's text: statistics of its form, and its words in hashed buckets.

No text is kept and no model is called. The scale of every feature comes from answers of the base, which are no user's.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BUCKETS = 4096
"""Buckets of words (Weinberger et al. 2009, feature hashing); two words that share one count as the same word."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_END = re.compile(r"(?<!\d)[.!?]+(?=\s|$)")
_ITEM = re.compile(r"(?:^|\s)(?:\d+[.)]|[-*•])\s")
_LONG = 8  # letters


def _share(part: float, whole: int) -> float:
    return part / max(1, whole)


_FORM: Mapping[str, Callable[[str, list[str]], float]] = {
    "words": lambda text, words: len(words),
    "log words": lambda text, words: math.log1p(len(words)),
    "sentences": lambda text, words: len(_END.findall(text)),
    "words a sentence": lambda text, words: _share(len(words), len(_END.findall(text))),
    "lines": lambda text, words: text.count("\n"),
    "list items": lambda text, words: len(_ITEM.findall(text)),
    "exclamation marks": lambda text, words: text.count("!"),
    "an exclamation mark": lambda text, words: "!" in text,
    "question marks": lambda text, words: text.count("?"),
    "a question mark": lambda text, words: "?" in text,
    "ends with a question": lambda text, words: text.rstrip().endswith("?"),
    "ends with an exclamation": lambda text, words: text.rstrip().endswith("!"),
    "commas": lambda text, words: text.count(","),
    "colons": lambda text, words: text.count(":") + text.count(";"),
    "quotes": lambda text, words: text.count('"') + text.count("'"),
    "digits": lambda text, words: sum(letter.isdigit() for letter in text),
    "letters a word": lambda text, words: _share(sum(map(len, words)), len(words)),
    "long words": lambda text, words: sum(len(word) >= _LONG for word in words),
    "different words": lambda text, words: _share(len(set(words)), len(words)),
}
"""Statistics of form that any text has."""


def _bucket(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS


def _counts(texts: Sequence[str]) -> Float[Tensor, "answers features"]:
    """Statistics of form, then for each bucket the number of different words in it; the first word counts again."""
    rows = torch.zeros(len(texts), len(_FORM) + BUCKETS)
    for row, text in zip(rows, texts, strict=True):
        words = [match.lower() for match in _WORD.findall(text)]
        row[: len(_FORM)] = torch.tensor([float(measure(text, words)) for measure in _FORM.values()])
        for word in sorted({*words, *(f"^{word}" for word in words[:1])}):
            row[len(_FORM) + _bucket(word)] += 1
    return rows


class AnswerFeatures(NamedTuple):
    """Features of answers, each divided by its `scale`: the spread of a statistic, the root of the spread of a word.

    With the root, rare words weigh less than under a common spread. A feature without spread is 0.
    """

    scale: Float[Tensor, " features"]

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "answers features"]:
        """The features of texts, as rows."""
        return torch.where(self.scale > 0, _counts(texts) / self.scale.clamp_min(1e-12), 0.0)


def scaled_features(answers: Sequence[str]) -> AnswerFeatures:
    """Features scaled by answers of the base, at least two. No user's text takes part."""
    spread = _counts(answers).std(0)
    spread[len(_FORM) :] = spread[len(_FORM) :].sqrt()
    return AnswerFeatures(spread)
