"""The likeness of an adapted model and its base: answers to ordinary prompts, facts and held-out pairs.

The gate asks for these before its tests, and the report of a user after them. So each adapter is asked once at each
alpha, and its answers are kept until `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from hashlib import blake2b
from math import exp
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.config.evaluation import StillBaseSettings
from persona_rlhf.data.tokenize import Row, UserRows
from persona_rlhf.evaluation.metrics import (
    ComparedAnswers,
    FactQuestions,
    PairScores,
    perplexity,
    prompt_gains,
    score_pairs,
    score_pairs_of_base,
    tone_drift,
    toxic_answers,
    untied_margins,
)
from persona_rlhf.evaluation.records import AlignmentTax, Facts
from persona_rlhf.evaluation.refusals import BaseAnswers, PromptIds, refusal_outcomes
from persona_rlhf.evaluation.still_base import AnswersTo, StillBase, still_base
from persona_rlhf.models.adapted_model import AdaptedModel

Value = TypeVar("Value")


class PerAdapter(Generic[Value]):
    """Values of adapters at alphas, kept: those that are missing are computed together."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Value] = {}

    def of(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        compute: Callable[[list[int]], Sequence[Value]],
        names: Sequence[str] | None = None,
    ) -> list[Value]:
        """One value a user. `compute` gets the places of the missing ones; `names` tell users of one adapter apart."""
        digests = [blake2b(one.detach().to("cpu", torch.float32).numpy().tobytes()).digest() for one in flat]
        keys = list(zip(digests, alphas.tolist(), names or [""] * len(digests), strict=True))
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        if new:
            self._kept.update(zip((keys[place] for place in new), compute(new), strict=True))
        return [self._kept[key] for key in keys]

    def forget(self) -> None:
        """Drops the values."""
        self._kept.clear()


class OrdinaryBehaviour(NamedTuple):
    """One adapted model on ordinary prompts and facts.

    refused, texts, answers: its greedy answers, and whether each refuses
    base_logps: its log-probabilities (nats) of the base's answers
    """

    refused: list[bool]
    texts: list[str]
    answers: list[Row]
    base_logps: list[float]
    facts: Facts | None


class BaseLikeness:
    """Measures the likeness of adapters to their base; `answers` are the base's to the ordinary `prompts`."""

    def __init__(
        self, adapted: AdaptedModel, prompts: Sequence[PromptIds], answers: BaseAnswers, facts: FactQuestions
    ) -> None:
        self._adapted, self.prompts, self.answers, self.facts = adapted, prompts, answers, facts
        self._behaviour = PerAdapter[OrdinaryBehaviour]()
        self._scores = PerAdapter[list[PairScores]]()
        self._base_scores: dict[str, list[PairScores]] = {}

    def forget(self) -> None:
        """Drops the values of users, so that memory stays bounded."""
        self._behaviour.forget()
        self._scores.forget()
        self._base_scores.clear()

    def behaviour(
        self, flat: Float[Tensor, "users params"], alphas: Float[Tensor, " users"]
    ) -> list[OrdinaryBehaviour]:
        """The adapted models of a cohort on ordinary prompts and facts."""

        def compute(places: list[int]) -> list[OrdinaryBehaviour]:
            refusals = refusal_outcomes(self._adapted, flat[places], alphas[places], self.prompts, self.answers)
            with self._adapted.using(flat[places], alphas[places]):
                facts = self.facts.ask(len(places))
            columns = refusals.refused, refusals.texts, refusals.answers, refusals.base_logps, facts
            return [OrdinaryBehaviour(*user) for user in zip(*columns, strict=True)]

        return self._behaviour.of(flat, alphas, compute)

    def scores(
        self, flat: Float[Tensor, "users params"], alphas: Float[Tensor, " users"], users: Sequence[UserRows]
    ) -> list[list[PairScores]]:
        """The held-out pairs of each user under the user's adapter."""

        def compute(places: list[int]) -> list[list[PairScores]]:
            with self._adapted.using(flat[places], alphas[places]):
                return score_pairs(self._adapted, [users[place].heldout for place in places])

        return self._scores.of(flat, alphas, compute, [user.user_id for user in users])

    def base_scores(self, users: Sequence[UserRows]) -> list[list[PairScores]]:
        """The held-out pairs of each user under the base."""
        new = [user for user in users if user.user_id not in self._base_scores]
        if new:
            scored = score_pairs_of_base(self._adapted, [user.heldout for user in new])
            self._base_scores.update(zip((user.user_id for user in new), scored, strict=True))
        return [self._base_scores[user.user_id] for user in users]

    def prompt_gains(
        self, flat: Float[Tensor, "users params"], users: Sequence[UserRows], prior: Float[Tensor, " params"] | None
    ) -> list[list[float]]:
        """The gain of each user's adapter, as trained, on each held-out prompt; see `metrics.prompt_gains`."""
        whole = torch.ones(len(users), device=flat.device)
        base, scores = self.base_scores(users), self.scores(flat, whole, users)
        of_prior: Sequence[list[PairScores] | None] = [None] * len(users)
        if prior is not None:
            of_prior = self.scores(prior.to(flat).expand_as(flat), whole, users)
        prompts = ([pair.chosen.prompt for pair in user.heldout] for user in users)
        return [prompt_gains(*columns) for columns in zip(prompts, base, scores, of_prior, strict=True)]

    def still_base(
        self,
        settings: StillBaseSettings,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        users: Sequence[UserRows],
    ) -> list[StillBase]:
        """Whether each adapter still is the base, by `settings`; `users` may be empty, then no pairs are tested."""
        margins: list[list[float]] = [[] for _ in range(flat.shape[0])]
        if users:
            prompts = ([pair.chosen.prompt for pair in user.heldout] for user in users)
            columns = prompts, self.base_scores(users), self.scores(flat, alphas, users)
            margins = list(map(untied_margins, *columns))
        behaviours = self.behaviour(flat, alphas)
        answered = self._answered([behaviour.answers for behaviour in behaviours])
        return [
            still_base(settings, answers, self._of_base, behaviour.facts, of_user)
            for answers, behaviour, of_user in zip(answered, behaviours, margins, strict=True)
        ]

    def tax(
        self, ordinary: OrdinaryBehaviour, near: Sequence[str], base_near: Sequence[str], sampled: ComparedAnswers
    ) -> AlignmentTax:
        """The cost of one user's adapter, from answers that other measures need as well.

        `near` and `base_near` are the answers of both to benign twins.
        """
        answers = self.answers.of(self.prompts)
        tokens = sum(len(answer.row.completion) for answer in answers)
        greedy, base_greedy = [*ordinary.texts, *near], [*(answer.text for answer in answers), *base_near]
        return AlignmentTax(
            perplexity=perplexity(ordinary.base_logps, [self.base_logps[answer.row] for answer in answers], tokens),
            facts=ordinary.facts,
            tone=tone_drift(greedy, base_greedy),
            toxic=toxic_answers([*greedy, *sampled.adapted], [*base_greedy, *sampled.base]),
        )

    @cached_property
    def base_logps(self) -> dict[Row, float]:
        """The base's log-probabilities (nats) of its own answers to the ordinary prompts."""
        return self._logps([answer.row for answer in self.answers.of(self.prompts)])

    @cached_property
    def _of_base(self) -> AnswersTo | None:
        [answered] = self._answered([[answer.row for answer in self.answers.of(self.prompts)]])
        return answered

    def _answered(self, rows: Sequence[Sequence[Row]]) -> list[AnswersTo | None]:
        """The answers of each user, measured by the base; None without a prompt."""
        distinct = dict.fromkeys(row for of_user in rows for row in of_user)
        logps = self.base_logps | self._logps([row for row in distinct if row not in self.base_logps])
        ends = set(self._adapted.base.eos_ids)
        answered: list[AnswersTo | None] = []
        for of_user in rows:
            tokens = sum(len(row.completion) for row in of_user)
            nats = -sum(logps[row] for row in of_user) / max(1, tokens)
            empty = sum(set(row.completion) <= ends for row in of_user)
            perplexity_of_user = float(f"{exp(min(_MOST_NATS, nats)):.5g}")  # the same in a cohort of any shape
            answered.append(AnswersTo(len(of_user), tokens, perplexity_of_user, empty) if of_user else None)
        return answered

    def _logps(self, rows: Sequence[Row]) -> dict[Row, float]:
        if not rows:
            return {}
        with self._adapted.using(None):
            [scores] = self._adapted.score([rows])
        return {row: score.logp for row, score in zip(rows, scores, strict=True)}


_MOST_NATS = 700.0  # a token; exp of more is no float, and a broken model's NaN counts as this
