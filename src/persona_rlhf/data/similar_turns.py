"""The nearest answer: for each turn of a conversation, the answer that somebody else gave to the most similar turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

COMMON = 0.01
"""Share of turns above which a word is not compared, such as "you" or "think"."""

LEAST_SIMILARITY = 0.5
"""Cosine below which two turns are not similar."""

IDENTICAL = 0.7
"""Share of common words (Jaccard) from which two answers are nearly identical."""

_ROWS = 512  # turns compared with all others in one product


class AnsweredTurn(NamedTuple):
    """The different words of a turn and of the answer to it; the person who answered, and the conversation."""

    turn: frozenset[str]
    answer: frozenset[str]
    person: str
    conversation: str


class Nearest(NamedTuple):
    """The place of the nearest answer, and the similarity of the two turns."""

    place: int
    similarity: float


def word_weights(turns: Sequence[frozenset[str]]) -> list[dict[str, float]]:
    """Each turn as a vector of unit length over its words, weighted by log(turns / turns with the word).

    Words in more than `COMMON` of the turns (and in more than two), or in one turn only, are left out: a turn without
    other words is an empty vector. Source: inverse document frequency (Sparck Jones 1972).
    """
    counts = Counter(word for words in turns for word in words)
    rarity = {word: math.log(len(turns) / n) for word, n in counts.items() if 1 < n <= max(2, COMMON * len(turns))}
    vectors = []
    for words in turns:
        weights = {word: rarity[word] for word in sorted(words & rarity.keys())}
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        vectors.append({word: weight / length for word, weight in weights.items()} if length else {})
    return vectors


def nearly_identical(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether the words of two answers are nearly the same, in any order."""
    return len(first & second) >= IDENTICAL * len(first | second)


def nearest_answers(
    turns: Sequence[AnsweredTurn], progress: Callable[[int], None] = lambda done: None
) -> list[Nearest | None]:
    """For each turn the nearest answer of another person in another conversation that is not nearly identical.

    The similarity of two turns is the cosine of their `word_weights`, rounded to nine digits; of equals, the first in
    the list counts. None where no other turn reaches `LEAST_SIMILARITY`. `progress` is called with the turns done.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    vectors = word_weights([each.turn for each in turns])
    columns = {word: n for n, word in enumerate(sorted({word for vector in vectors for word in vector}))}
    starts = np.cumsum([0, *map(len, vectors)])
    places = [columns[word] for vector in vectors for word in vector]
    weights = [weight for vector in vectors for weight in vector.values()]
    matrix = csr_matrix((weights, places, starts), shape=(len(turns), len(columns)))
    transposed = matrix.T.tocsr()

    def other(place: int, candidate: int) -> bool:
        mine, theirs = turns[place], turns[candidate]
        if mine.person == theirs.person or mine.conversation == theirs.conversation:
            return False
        return not nearly_identical(mine.answer, theirs.answer)

    nearest: list[Nearest | None] = []
    for start in range(0, len(turns), _ROWS):
        products = matrix[start : start + _ROWS] @ transposed
        for row in range(products.shape[0]):
            within = slice(products.indptr[row], products.indptr[row + 1])
            candidates, cosines = products.indices[within], np.round(products.data[within], 9)
            similar = cosines >= LEAST_SIMILARITY
            candidates, cosines = candidates[similar], cosines[similar]
            ranked = ((int(candidates[n]), float(cosines[n])) for n in np.lexsort((candidates, -cosines)))
            nearest.append(next((Nearest(*pair) for pair in ranked if other(start + row, pair[0])), None))
        progress(len(nearest))
    return nearest
