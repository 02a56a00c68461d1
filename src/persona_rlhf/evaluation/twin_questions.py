"""Questions in two wordings with the same two answers, scored by log-probability, without generation.

What the two wordings have in common cancels in their difference: a taste for the words of the answers, and knowledge of
the topic. The same scores under drawn signs of the adapter's layers show what layers do that do not act together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.evaluation.metrics import margin, score_pairs, score_pairs_of_base
from persona_rlhf.models.adapted_model import AdaptedModel

ROUNDS = 19
"""Draws of signs: if the observed statistic is above all of them, the p-value is 0.05."""


class TwinQuestion(NamedTuple):
    """Two wordings of a question, and two answers: agreement and disagreement."""

    first: str
    second: str
    agrees: str
    disagrees: str


class TwinQuestions:
    """Twin questions, which the base answers once."""

    def __init__(self, adapted: AdaptedModel, twins: Sequence[TwinQuestion]) -> None:
        self._adapted = adapted
        pairs = [
            PreferencePair(
                "views", (Message("user", wording),), twin.agrees, twin.disagrees,
                f"{number}", None, None, 1.0, "heldout", None, wording, number,
            )
            for number, twin in enumerate(twins)
            for wording in (twin.first, twin.second)
        ]  # fmt: skip
        users = tokenize(pairs, adapted.base.tokenizer, adapted.base.context)
        self._rows = [row for user in users for row in user.heldout]
        [self._base] = score_pairs_of_base(adapted, [self._rows])

    def rises(self, flat: Float[Tensor, "users params"]) -> list[list[tuple[float, float]]]:
        """By user and question: nats by which the adapter raises agreement with each of the two wordings."""
        with self._adapted.using(flat, torch.ones(flat.shape[0], device=flat.device)):
            scores = score_pairs(self._adapted, [self._rows] * flat.shape[0])
        margins = [[margin(*pair) for pair in zip(self._base, one, strict=True)] for one in scores]
        return [list(zip(one[::2], one[1::2], strict=True)) for one in margins]

    def flipped_rises(self, flat: Float[Tensor, "users params"]) -> list[list[list[tuple[float, float]]]]:
        """By user and round: the rises of the adapter under drawn signs of its layers, the same for all users."""
        rounds = [self.rises(self.with_signs(flat, number)) for number in range(ROUNDS)]
        return [[one[user] for one in rounds] for user in range(flat.shape[0])]

    def with_signs(self, flat: Float[Tensor, "users params"], number: int) -> Float[Tensor, "users params"]:
        """The adapters of a round, each layer's change of the weights with a sign drawn for the round."""
        spans = self._adapted.spans.values()
        signs = torch.randint(2, (len(spans),), generator=torch.Generator().manual_seed(number)) * 2 - 1
        flipped = flat.clone()
        for span, sign in zip(spans, signs.tolist(), strict=True):
            flipped[:, span.b_start : span.stop] *= sign
        return flipped
