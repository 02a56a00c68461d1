"""A comparison whose two answers are written: several are sampled together, two are chosen by their first words."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import combinations

from persona_rlhf.policy.judges import shingles
from persona_rlhf.serving.comparisons import AnswerPair, SampledAnswer
from persona_rlhf.serving.openai_api import APIError, TextChunk

OPENING = 12
"""Words of each sampled answer that are read before two of them are chosen. Where the first words of all are equal,
twice as many are read, and so on."""


class Candidate:
    """A sampled answer, as far as it was read."""

    def __init__(self, chunks: Iterator[TextChunk], seed: int) -> None:
        self._chunks, self.seed = chunks, seed
        self.text, self.last = "", TextChunk("")

    @property
    def finished(self) -> bool:
        """Whether its end was read."""
        return self.last.finish is not None

    def read(self, words: int = 1 << 30) -> None:
        """Reads one chunk, unless the answer has so many words already, or is finished.

        Raises APIError where the engine fails, or ends without an end of the answer.
        """
        if self.finished or len(self.text.split()) >= words:
            return
        chunk = next(self._chunks, None)
        if chunk is None:
            raise APIError(502, "The engine ended without an end of its answer.", "engine_failed")
        self.text, self.last = self.text + chunk.text, chunk

    def close(self) -> None:
        """Ends its generation, if it goes on."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()


class PairWriting:
    """Writes the answers of a pair. Answers that are not chosen are not written to their end."""

    def __init__(
        self, pair: AnswerPair, candidates: Sequence[Candidate], author: Callable[[TextChunk], str], order: int
    ) -> None:
        """`author` names the author of an answer by its last chunk; `order` 1 puts the first one of two on the left."""
        self.pair, self.candidates, self._author, self._order = pair, candidates, author, order

    def write(self, wanted: Callable[[], bool]) -> None:
        """Writes until both answers are whole, or the pair is no longer `wanted`. Raises APIError as `read` does."""
        try:
            if (chosen := self._chosen(wanted)) is None:
                return
            left, right = chosen if self._order else chosen[::-1]
            self._show(left, right)
            while not (left.finished and right.finished):
                if not wanted():
                    return
                left.read()
                right.read()
                self._show(left, right)
            self.pair.left, self.pair.right = self._whole(left), self._whole(right)
            self.pair.finished = True
        finally:
            for candidate in self.candidates:
                candidate.close()

    def _chosen(self, wanted: Callable[[], bool]) -> tuple[Candidate, Candidate] | None:
        """The two candidates whose first words are least alike. They are equal only where all answers are."""
        if len(self.candidates) == 2:
            return self.candidates[0], self.candidates[1]
        words = OPENING
        while wanted():
            for candidate in self.candidates:
                candidate.read(words)
            if any(not one.finished and len(one.text.split()) < words for one in self.candidates):
                continue
            first, second = min(combinations(self.candidates, 2), key=lambda pair: likeness(pair[0].text, pair[1].text))
            if first.text != second.text or all(one.finished for one in self.candidates):
                for candidate in self.candidates:
                    if candidate not in (first, second):
                        candidate.close()
                return first, second
            words *= 2
        return None

    def _show(self, left: Candidate, right: Candidate) -> None:
        self.pair.left, self.pair.right = (SampledAnswer(one.text, "", one.seed) for one in (left, right))

    def _whole(self, candidate: Candidate) -> SampledAnswer:
        return SampledAnswer(candidate.text, self._author(candidate.last), candidate.seed)


def written_pair(writing: PairWriting) -> AnswerPair:
    """The pair with both answers whole, for a program that shows nothing of them before. Raises APIError as `read`."""
    writing.write(lambda: True)
    return writing.pair


def likeness(one: str, other: str) -> float:
    """The share of neighbouring words that two texts have in common; above 1 for equal texts."""
    if one == other:
        return 2.0
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)
