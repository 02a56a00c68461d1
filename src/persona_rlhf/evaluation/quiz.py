"""Does the adapted model still know what the base knows: facts, asked by log-probability, without writing an answer."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.evaluation.facts import Fact
from persona_rlhf.evaluation.measures import Facts
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.tokens import Row, both_rows, tokenize
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.scores import Score


class Quiz:
    """The questions as rows to score; the base is asked once."""

    def __init__(self, adapted: AdaptedModel, facts: Sequence[Fact]) -> None:
        self._adapted = adapted
        pairs = [
            PreferencePair(
                "facts", (Message("user", fact.question),), fact.right, wrong,
                f"{number}", None, None, 1.0, "heldout", None, "facts", number,
            )
            for number, fact in enumerate(facts)
            for wrong in fact.wrong
        ]  # fmt: skip
        rows = [row for user in tokenize(pairs, adapted.base.tokenizer, adapted.base.context) for row in user.heldout]
        self._facts = [[row for row in rows if row.pair.line == number] for number in range(len(facts))]
        self._rows = list(dict.fromkeys(both_rows(rows)))
        self._base_right: list[bool] = []
        if facts:
            with adapted.using(None):
                [scores] = adapted.score([self._rows])
            self._base_right = self._right(scores)
        self._states = adapted.below(self._rows)  # the same for every user

    def ask(self, users: int) -> list[Facts | None]:
        """How every user's adapted model does, under the adapters that are switched on; None without a question."""
        if not self._facts:
            return [None] * users
        scores = self._adapted.score([self._rows] * users, [self._states] * users)
        return [self._counted(self._right(own)) for own in scores]

    def of_base(self) -> Facts | None:
        """The base itself; None without a question."""
        return self._counted(self._base_right) if self._facts else None

    def _counted(self, right: Sequence[bool]) -> Facts:
        kept = sum(own and base for own, base in zip(right, self._base_right, strict=True))
        return Facts(len(right), sum(right), sum(self._base_right), kept)

    def _right(self, scores: Sequence[Score]) -> list[bool]:
        """A question is answered rightly where the right answer has the highest log-probability per token."""
        known: dict[Row, float] = {
            row: score.logp / max(1, score.tokens) for row, score in zip(self._rows, scores, strict=True)
        }
        return [all(known[row.chosen] > known[row.rejected] for row in own) for own in self._facts]
