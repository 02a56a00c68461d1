"""Answers sampled at temperature 1, by the adapted model and by its base, to the same prompts with the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.evaluation.measures import Perplexity
from persona_rlhf.evaluation.refusals import Prompt, answer_row, answer_text
from persona_rlhf.preferences.tokens import PairRow, Row
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.generation import Generated


class Compared(NamedTuple):
    """One user's answers beside the base's to the same prompts, as texts; no perplexity where it was not asked for, or
    without a prompt."""

    adapted: list[str]
    base: list[str]
    perplexity: Perplexity | None

    def as_base(self) -> Compared:
        """The base's answers on both sides."""
        known = self.perplexity
        return Compared(self.base, self.base, None if known is None else Perplexity(known.base, known.base))


def distinct_prompts(pairs: Sequence[PairRow], most: int) -> list[Prompt]:
    """The prompts of a user's held-out pairs, each once, the first `most` of them."""
    return list(dict.fromkeys(pair.chosen.prompt for pair in pairs))[:most]


class Samples:
    """One sampled answer a prompt. The base answers a list of prompts that several users share only once.

    A draw depends on the seed and on the place of the prompt in its list: the same list is answered alike in any
    cohort, and both models are compared on the same random numbers (an adapter that changes nothing ties everywhere).
    """

    def __init__(self, adapted: AdaptedModel, max_new_tokens: int, seed: int) -> None:
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._adapted = adapted
        self._known: dict[tuple[Prompt, ...], list[Generated]] = {}

    def forget(self) -> None:
        """Forgets the base's answers."""
        self._known.clear()

    def compare(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[Prompt]],
    ) -> list[Compared]:
        """Every user's answers to his prompts, and the base's, with what the base thinks of both."""
        own, theirs = self._both(flat, alphas, prompts)
        adapted, base = (self._perplexities(prompts, answers) for answers in (own, theirs))
        return [
            Compared(self._texts(own[n]), self._texts(theirs[n]), None if a is None or b is None else Perplexity(a, b))
            for n, (a, b) in enumerate(zip(adapted, base, strict=True))
        ]

    def write(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[Prompt]],
    ) -> list[Compared]:
        """Every user's answers to his prompts, and the base's."""
        both = zip(*self._both(flat, alphas, prompts), strict=True)
        return [Compared(self._texts(own), self._texts(theirs), None) for own, theirs in both]

    def _both(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[Prompt]],
    ) -> tuple[list[list[Generated]], list[list[Generated]]]:
        theirs = self._of_base([tuple(asked) for asked in prompts])
        with self._adapted.using(flat, alphas):
            return self._write(prompts), theirs

    def _of_base(self, prompts: Sequence[tuple[Prompt, ...]]) -> list[list[Generated]]:
        new = [asked for asked in dict.fromkeys(prompts) if asked not in self._known]
        with self._adapted.using(None):
            self._known.update(zip(new, self._write(new), strict=True))
        return [self._known[asked] for asked in prompts]

    def _write(self, prompts: Sequence[Sequence[Prompt]]) -> list[list[Generated]]:
        if not any(prompts):
            return [[] for _ in prompts]
        return self._adapted.generate(prompts, self.max_new_tokens, temperature=1.0, seed=self.seed)

    def _texts(self, answers: Sequence[Generated]) -> list[str]:
        return [answer_text(self._adapted, answer) for answer in answers]

    def _perplexities(
        self, prompts: Sequence[Sequence[Prompt]], answers: Sequence[Sequence[Generated]]
    ) -> list[float | None]:
        rows = [
            [answer_row(self._adapted, prompt, answer) for prompt, answer in zip(asked, given, strict=True)]
            for asked, given in zip(prompts, answers, strict=True)
        ]
        known = self._logps([row for own in rows for row in own])
        sums = [(sum(known[row] for row in own), sum(len(row.completion) for row in own)) for own in rows]
        return [exp(-logp / tokens) if tokens else None for logp, tokens in sums]

    def _logps(self, rows: Sequence[Row]) -> dict[Row, float]:
        distinct = list(dict.fromkeys(rows))
        with self._adapted.using(None):
            (scores,) = self._adapted.score([distinct])
        return dict(zip(distinct, (score.logp for score in scores), strict=True))
