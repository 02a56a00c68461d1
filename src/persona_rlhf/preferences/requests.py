"""Is a request one that the policy forbids? What screening asks of classifiers, whatever they are made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from persona_rlhf.preferences.messages import Prompt


class Score(NamedTuple):
    """How much a request looks forbidden, more being worse, and the hazard categories that it may be of: none where the
    classifier does not tell them apart."""

    value: float
    categories: frozenset[str] = frozenset()


@runtime_checkable
class RequestClassifier(Protocol):
    """Scores requests: a table of patterns, the base itself, a model from the hub."""

    @property
    def finding(self) -> str:
        """What is said of a request that counts as forbidden, "kind: sentence"; reports count by its kind."""

    def __call__(self, requests: Sequence[Prompt]) -> Sequence[Score]:
        """A score a request, in their order."""


class Screen(NamedTuple):
    """A classifier, and the value from which on a request counts as forbidden."""

    classifier: RequestClassifier
    threshold: float

    def findings(self, requests: Sequence[Prompt], categories: Collection[str]) -> list[str | None]:
        """What is found against each request, None where nothing is: of `categories`, where the classifier tells."""
        return [self._finding(score, categories) for score in self.classifier(requests)] if requests else []

    def _finding(self, score: Score, categories: Collection[str]) -> str | None:
        of = score.categories & set(categories)
        if score.value < self.threshold or (score.categories and not of):
            return None
        return f"{self.classifier.finding} ({', '.join(sorted(of))})" if of else self.classifier.finding
