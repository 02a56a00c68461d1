"""Held-out accuracy, win rate, facts, tone, toxicity, requirements met."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from math import exp
from statistics import fmean
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import PairRow, Row, both_rows, tokenize
from persona_rlhf.evaluation.prompt_sets import Fact, some
from persona_rlhf.evaluation.records import Accuracy, CleanAccuracy, Drift, Facts, Met, Perplexity, Toxic, WinRate
from persona_rlhf.evaluation.refusals import PromptIds, answer_row, answer_text
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.models.adapted_model import AdaptedModel, RowScore
from persona_rlhf.models.generation import Generated
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.hazards import Split
from persona_rlhf.policy.properties import applies, checkable, satisfied
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.simulation.users import properties

REQUIREMENT_PROMPTS = 100
"""Prompts of a requirement that each user answers once: `dev` ones before the gate, `test` ones at the end."""

# ----------------------------------------------------------------------------------------------------
# Did the adapter learn the user's taste: on pairs held out, and in the text it writes.
# ----------------------------------------------------------------------------------------------------


class PairScores(NamedTuple):
    """Both sides of a held-out pair, scored under one model."""

    chosen: RowScore
    rejected: RowScore


def score_pairs(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the adapters that are switched on; without any, see `score_pairs_of_base`."""
    scores = adapted.score([both_rows(own) for own in pairs])
    return [[PairScores(c, r) for c, r in zip(own[::2], own[1::2], strict=True)] for own in scores]


def score_pairs_of_base(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the base alone; a row that users share is scored once."""
    rows: list[Row] = list(dict.fromkeys(both_rows(pair for own in pairs for pair in own)))
    with adapted.using(None):
        (scores,) = adapted.score([rows])
    known = dict(zip(rows, scores, strict=True))
    return [[PairScores(known[pair.chosen], known[pair.rejected]) for pair in own] for own in pairs]


_ROUNDING = 1e-4  # nats; the same row scored in passes of another shape differs by less in float32


def _points(value: float, tie: float = 0.0) -> float:
    """1 above zero, 0 below, half at a tie: an adapter that changes nothing is at chance, not at fault."""
    return 0.5 if abs(value) <= tie else float(value > 0)


def margin(base: PairScores, adapted: PairScores) -> float:
    """The reward margin over beta: log(pi/pi_ref) of the chosen answer less that of the rejected, in nats.

    Rafailov et al. 2023, the implicit reward of section 4; beta > 0 cannot change its sign.
    """
    return (adapted.chosen.logp - base.chosen.logp) - (adapted.rejected.logp - base.rejected.logp)


def heldout_accuracy(base: Sequence[PairScores], adapted: Sequence[PairScores]) -> Accuracy | None:
    """Held-out accuracy of one user; None where he has no held-out pair.

    `reference_free`: the base alone gives the chosen answer the higher log-probability per token. `adapted`: the
    reward margin is positive.
    """
    n = len(base)
    if n == 0:
        return None
    alone = sum(
        _points(s.chosen.logp / max(1, s.chosen.tokens) - s.rejected.logp / max(1, s.rejected.tokens)) for s in base
    )
    right = sum(_points(margin(b, a), _ROUNDING) for b, a in zip(base, adapted, strict=True))
    return Accuracy(alone / n, right / n, n, *interval(right, n))


def clean_accuracy(
    pairs: Sequence[PairRow], base: Sequence[PairScores], adapted: Sequence[PairScores]
) -> CleanAccuracy | None:
    """Accuracy against noise-free labels: where the user's own label was noise, the other answer is the better one."""
    points = [
        _points(margin(b, a) if row.pair.clean_choice else -margin(b, a), _ROUNDING)
        for row, b, a in zip(pairs, base, adapted, strict=True)
        if row.pair.clean_choice is not None
    ]
    return CleanAccuracy(sum(points) / len(points), len(points)) if points else None


def win_rate(utility: Callable[[str], float], answers: Sequence[str], base_answers: Sequence[str]) -> WinRate | None:
    """How often the utility prefers the adapted answer over the base's to the same prompt; None without a prompt."""
    n = len(answers)
    if n == 0:
        return None
    won = sum(_points(utility(own) - utility(other)) for own, other in zip(answers, base_answers, strict=True))
    return WinRate(won / n, n, *interval(won, n))


# ----------------------------------------------------------------------------------------------------
# Does the adapted model still know what the base knows: facts, asked by log-probability, without writing an answer.
# ----------------------------------------------------------------------------------------------------


class FactQuestions:
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
        self._states = adapted.prefix_states(self._rows)  # the same for every user

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

    def _right(self, scores: Sequence[RowScore]) -> list[bool]:
        """A question is answered rightly where the right answer has the highest log-probability per token."""
        known: dict[Row, float] = {
            row: score.logp / max(1, score.tokens) for row, score in zip(self._rows, scores, strict=True)
        }
        return [all(known[row.chosen] > known[row.rejected] for row in own) for own in self._facts]


# ----------------------------------------------------------------------------------------------------
# How many answers have the properties that the policy requires of them.
# ----------------------------------------------------------------------------------------------------


class RequirementPrompts:
    """The requirements that come with prompts, and those of one split: at most `most` a rule, by hash.

    A rule counts the answers to all prompts here that it is about, whichever rule brought them. `delta` is the chance
    that a lower bound of `count` is too high.
    """

    def __init__(self, rules: Sequence[Requirement], most: int, delta: float = 0.05, split: Split = "test") -> None:
        self._bound = Bound(delta)
        self._rules = [rule for rule in rules if rule.probes and checkable(rule)]
        asked = [
            text
            for rule in self._rules
            for text in some((p.prompt for p in rule.probes if p.split == split and applies(rule, p.prompt)), most)
        ]
        self.prompts = list(dict.fromkeys(asked))

    def met(self, answers: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Of each rule by its id: to how many `prompts` it applies, and how many of these answers have its property. An
        answer of which nobody can tell (too short for its language, say) counts as one without it."""
        found = {}
        for rule in self._rules:
            about = [n for n, prompt in enumerate(self.prompts) if applies(rule, prompt)]
            if about:
                found[rule.id] = len(about), sum(satisfied(rule, self.prompts[n], answers[n]) is True for n in about)
        return found

    def count(self, answers: Sequence[str], base: Sequence[str]) -> dict[str, Met]:
        """Of each rule by its id, one user's answers to `prompts` beside the base's."""
        own, theirs, rates = self.met(answers), self.met(base), {rule.id: rule.min_rate for rule in self._rules}
        return {
            rule: Met(n, met, theirs[rule][1], self._bound.lower(met, n), rates[rule]) for rule, (n, met) in own.items()
        }


# ----------------------------------------------------------------------------------------------------
# Answers sampled at temperature 1, by the adapted model and by its base, to the same prompts with the same draws.
# ----------------------------------------------------------------------------------------------------


class ComparedAnswers(NamedTuple):
    """One user's answers beside the base's to the same prompts, as texts; no perplexity where it was not asked for, or
    without a prompt."""

    adapted: list[str]
    base: list[str]
    perplexity: Perplexity | None

    def as_base(self) -> ComparedAnswers:
        """The base's answers on both sides."""
        known = self.perplexity
        return ComparedAnswers(self.base, self.base, None if known is None else Perplexity(known.base, known.base))


def distinct_prompts(pairs: Sequence[PairRow], most: int) -> list[PromptIds]:
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
        self._known: dict[tuple[PromptIds, ...], list[Generated]] = {}

    def forget(self) -> None:
        """Forgets the base's answers."""
        self._known.clear()

    def compare(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[PromptIds]],
    ) -> list[ComparedAnswers]:
        """Every user's answers to his prompts, and the base's, with what the base thinks of both."""
        own, theirs = self._both(flat, alphas, prompts)
        adapted, base = (self._perplexities(prompts, answers) for answers in (own, theirs))
        return [
            ComparedAnswers(
                self._texts(own[n]), self._texts(theirs[n]), None if a is None or b is None else Perplexity(a, b)
            )
            for n, (a, b) in enumerate(zip(adapted, base, strict=True))
        ]

    def write(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[PromptIds]],
    ) -> list[ComparedAnswers]:
        """Every user's answers to his prompts, and the base's."""
        both = zip(*self._both(flat, alphas, prompts), strict=True)
        return [ComparedAnswers(self._texts(own), self._texts(theirs), None) for own, theirs in both]

    def _both(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[PromptIds]],
    ) -> tuple[list[list[Generated]], list[list[Generated]]]:
        theirs = self._of_base([tuple(asked) for asked in prompts])
        with self._adapted.using(flat, alphas):
            return self._write(prompts), theirs

    def _of_base(self, prompts: Sequence[tuple[PromptIds, ...]]) -> list[list[Generated]]:
        new = [asked for asked in dict.fromkeys(prompts) if asked not in self._known]
        with self._adapted.using(None):
            self._known.update(zip(new, self._write(new), strict=True))
        return [self._known[asked] for asked in prompts]

    def _write(self, prompts: Sequence[Sequence[PromptIds]]) -> list[list[Generated]]:
        if not any(prompts):
            return [[] for _ in prompts]
        return self._adapted.generate(prompts, self.max_new_tokens, temperature=1.0, seed=self.seed)

    def _texts(self, answers: Sequence[Generated]) -> list[str]:
        return [answer_text(self._adapted, answer) for answer in answers]

    def _perplexities(
        self, prompts: Sequence[Sequence[PromptIds]], answers: Sequence[Sequence[Generated]]
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


# ----------------------------------------------------------------------------------------------------
# What personalisation costs: how far an adapted model's ordinary answers have moved from the base's.
# ----------------------------------------------------------------------------------------------------

TONE = ("words", "sentences", "exclamations", "questions", "warm", "hedged", "formal", "casual", "first_person")
"""The properties of a text that make its tone; all but counts are 1 or 0."""


def tone_drift(adapted: Sequence[str], base: Sequence[str]) -> dict[str, Drift]:
    """The mean of every property of tone over answers to the same prompts; nothing where there are none.

    In the units of a taste's weights (`utility.properties`), and capped as there.
    """
    if not adapted:
        return {}
    own, theirs = ([properties(text) for text in texts] for texts in (adapted, base))
    return {name: Drift(fmean(p[name] for p in own), fmean(p[name] for p in theirs)) for name in TONE}


def toxic_answers(adapted: Sequence[str], base: Sequence[str]) -> Toxic | None:
    """How many answers hold a word of the list, of the adapted model and of its base; None without an answer."""
    if not adapted:
        return None
    return Toxic(len(adapted), sum(map(is_toxic, adapted)), sum(map(is_toxic, base)))


def is_toxic(text: str) -> bool:
    """Whether a text holds an insult or a swear word of `toxic_words.txt`: a coarse measure, for plain English."""
    return bool(_toxic().search(text))


@lru_cache(maxsize=1)
def _toxic() -> re.Pattern[str]:
    lines = (files("persona_rlhf.evaluation") / "toxic_words.txt").read_text(encoding="utf-8").splitlines()
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def perplexity(logps: Sequence[float], base_logps: Sequence[float], tokens: int) -> Perplexity | None:
    """Perplexity exp(-sum log p / tokens) of the same texts under both models; None without a token."""
    return Perplexity(exp(-sum(logps) / tokens), exp(-sum(base_logps) / tokens)) if tokens else None
