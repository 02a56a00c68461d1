"""Measures of one user: held-out accuracy, win rate, facts, tone, toxicity and requirements met."""

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
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.scores import RowScore
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.hazards import Split
from persona_rlhf.policy.properties import applies, checkable, satisfied
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.simulation.users import properties

REQUIREMENT_PROMPTS = 100
"""Prompts of a requirement that each user answers once: `dev` ones before the gate, `test` ones at the end."""


class PairScores(NamedTuple):
    """Both sides of a held-out pair, scored under one model."""

    chosen: RowScore
    rejected: RowScore


def score_pairs(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the adapters that are switched on; without any, see `score_pairs_of_base`."""
    scores = adapted.score([both_rows(user_pairs) for user_pairs in pairs])
    return [[PairScores(c, r) for c, r in zip(rows[::2], rows[1::2], strict=True)] for rows in scores]


def score_pairs_of_base(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the base alone; a row that users share is scored once."""
    rows: list[Row] = list(dict.fromkeys(both_rows(pair for user_pairs in pairs for pair in user_pairs)))
    with adapted.using(None):
        (scores,) = adapted.score([rows])
    by_row = dict(zip(rows, scores, strict=True))
    return [[PairScores(by_row[pair.chosen], by_row[pair.rejected]) for pair in user_pairs] for user_pairs in pairs]


_ROUNDING = 1e-4  # nats; the same row scored in passes of another shape differs by less in float32


def _points(value: float, tie: float = 0.0) -> float:
    """1 above zero, 0 below, half at a tie: an adapter that changes nothing scores at chance."""
    return 0.5 if abs(value) <= tie else float(value > 0)


def margin(base: PairScores, adapted: PairScores) -> float:
    """The reward margin over beta: log(pi/pi_ref) of the chosen answer less that of the rejected, in nats.

    Rafailov et al. 2023, the implicit reward of section 4; beta > 0 cannot change its sign.
    """
    return (adapted.chosen.logp - base.chosen.logp) - (adapted.rejected.logp - base.rejected.logp)


def untied_margins(
    prompts: Sequence[PromptIds], base: Sequence[PairScores], adapted: Sequence[PairScores]
) -> list[float]:
    """The mean reward margin of a user's pairs of each prompt, in nats, without prompts where it is 0.

    `prompts` are those of the pairs. Pairs of one prompt are not independent, so a sign test has one vote for them all.
    """
    of_prompt: dict[PromptIds, list[float]] = {}
    for prompt, *scores in zip(prompts, base, adapted, strict=True):
        of_prompt.setdefault(prompt, []).append(margin(*scores))
    means = (sum(margins) / len(margins) for margins in of_prompt.values())
    return [mean for mean in means if abs(mean) > _ROUNDING]


def prompt_gains(
    prompts: Sequence[PromptIds],
    base: Sequence[PairScores],
    adapted: Sequence[PairScores],
    prior: Sequence[PairScores] | None = None,
) -> list[float]:
    """Of each prompt, the share of its pairs with a positive reward margin, less that share of the `prior` adapter.

    `prompts` are those of the pairs. Without a prior adapter the base is the prior, and orders half of the pairs.
    """
    of_prompt: dict[PromptIds, list[float]] = {}
    for prompt, before, after, other in zip(prompts, base, adapted, prior or base, strict=True):
        points = (_points(margin(before, one), _ROUNDING) for one in (after, other))
        of_prompt.setdefault(prompt, []).append(next(points) - next(points))
    return [sum(gains) / len(gains) for gains in of_prompt.values()]


def heldout_accuracy(base: Sequence[PairScores], adapted: Sequence[PairScores]) -> Accuracy | None:
    """Held-out accuracy of one user; None without a held-out pair.

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
    """Accuracy against noise-free labels: where the label of a pair was noise, the other answer is the better one."""
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
    won = sum(_points(utility(answer) - utility(other)) for answer, other in zip(answers, base_answers, strict=True))
    return WinRate(won / n, n, *interval(won, n))


class FactQuestions:
    """Fact accuracy: questions answered by log-probability, without generation; the base answers them once."""

    def __init__(self, adapted: AdaptedModel, facts: Sequence[Fact], fixed: bool = False) -> None:
        """`fixed`: the policy fixes the aspect `facts`."""
        self._adapted, self._fixed = adapted, fixed
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

    def __len__(self) -> int:
        return len(self._facts)

    def ask(self, users: int) -> list[Facts | None]:
        """Every user's fact accuracy, under the adapters that are switched on; None without a question."""
        if not self._facts:
            return [None] * users
        scores = self._adapted.score([self._rows] * users, [self._states] * users)
        return [self._counted(self._right(user_scores)) for user_scores in scores]

    def of_base(self) -> Facts | None:
        """The base itself; None without a question."""
        return self._counted(self._base_right) if self._facts else None

    def _counted(self, right: Sequence[bool]) -> Facts:
        kept = sum(adapted and base for adapted, base in zip(right, self._base_right, strict=True))
        return Facts(len(right), sum(right), sum(self._base_right), kept, self._fixed)

    def _right(self, scores: Sequence[RowScore]) -> list[bool]:
        """A question is answered rightly where the right answer has the highest log-probability per token."""
        per_token: dict[Row, float] = {
            row: score.logp / max(1, score.tokens) for row, score in zip(self._rows, scores, strict=True)
        }
        return [all(per_token[row.chosen] > per_token[row.rejected] for row in rows) for rows in self._facts]


class RequirementPrompts:
    """The requirements with prompts, and the prompts of one split: at most `most` a rule, by hash.

    A rule counts the answers to all prompts that it applies to, also to those of other rules. `delta` is the chance
    that a lower bound of `count` is too high.
    """

    def __init__(self, rules: Sequence[Requirement], most: int, delta: float = 0.05, split: Split = "test") -> None:
        self._bound = Bound(delta)
        self._rules = [rule for rule in rules if rule.probes and checkable(rule)]
        texts = [
            text
            for rule in self._rules
            for text in some((p.prompt for p in rule.probes if p.split == split and applies(rule, p.prompt)), most)
        ]
        self.prompts = list(dict.fromkeys(texts))

    def met(self, answers: Sequence[str]) -> dict[str, tuple[int, int]]:
        """By rule id: the number of `prompts` it applies to, and the number of these answers that have its property.

        An undecided answer (too short for its language, say) counts as one without it.
        """
        counts = {}
        for rule in self._rules:
            about = [n for n, prompt in enumerate(self.prompts) if applies(rule, prompt)]
            if about:
                counts[rule.id] = len(about), sum(satisfied(rule, self.prompts[n], answers[n]) is True for n in about)
        return counts

    def count(self, answers: Sequence[str], base: Sequence[str]) -> dict[str, Met]:
        """By rule id: one user's answers to `prompts` beside the base's."""
        counts, base_counts = self.met(answers), self.met(base)
        rates = {rule.id: rule.min_rate for rule in self._rules}
        return {
            rule: Met(n, met, base_counts[rule][1], self._bound.lower(met, n), rates[rule])
            for rule, (n, met) in counts.items()
        }


class ComparedAnswers(NamedTuple):
    """One user's answers beside the base's to the same prompts, as texts; `perplexity` None if not computed."""

    adapted: list[str]
    base: list[str]
    perplexity: Perplexity | None

    def as_base(self) -> ComparedAnswers:
        """The base's answers on both sides."""
        both = None if self.perplexity is None else Perplexity(self.perplexity.base, self.perplexity.base)
        return ComparedAnswers(self.base, self.base, both)


def distinct_prompts(pairs: Sequence[PairRow], most: int) -> list[PromptIds]:
    """The prompts of a user's held-out pairs, each once, the first `most` of them."""
    return list(dict.fromkeys(pair.chosen.prompt for pair in pairs))[:most]


class Samples:
    """One answer a prompt, sampled at temperature 1. The base answers a list of prompts that users share only once.

    A draw depends on the seed and on the place of the prompt in its list. So the same list gets the same answers in any
    cohort, and both models use the same random numbers: an adapter that changes nothing ties everywhere.
    """

    def __init__(self, adapted: AdaptedModel, max_new_tokens: int, seed: int) -> None:
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._adapted = adapted
        self._base_answers: dict[tuple[PromptIds, ...], list[Generated]] = {}

    def forget(self) -> None:
        """Drops the base's answers."""
        self._base_answers.clear()

    def compare(
        self,
        flat: Float[Tensor, "users params"],
        alphas: Float[Tensor, " users"],
        prompts: Sequence[Sequence[PromptIds]],
        perplexity: bool = True,
    ) -> list[ComparedAnswers]:
        """Every user's answers to their prompts beside the base's; with `perplexity`, the base's of both."""
        base_answers = self._of_base([tuple(user_prompts) for user_prompts in prompts])
        with self._adapted.using(flat, alphas):
            answers = self._write(prompts)
        compared = [
            ComparedAnswers(self._texts(adapted), self._texts(base), None)
            for adapted, base in zip(answers, base_answers, strict=True)
        ]
        if not perplexity:
            return compared
        both = zip(self._perplexities(prompts, answers), self._perplexities(prompts, base_answers), strict=True)
        perplexities = [None if a is None or b is None else Perplexity(a, b) for a, b in both]
        return [one._replace(perplexity=value) for one, value in zip(compared, perplexities, strict=True)]

    def _of_base(self, prompts: Sequence[tuple[PromptIds, ...]]) -> list[list[Generated]]:
        new = [user_prompts for user_prompts in dict.fromkeys(prompts) if user_prompts not in self._base_answers]
        with self._adapted.using(None):
            self._base_answers.update(zip(new, self._write(new), strict=True))
        return [self._base_answers[user_prompts] for user_prompts in prompts]

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
            [answer_row(self._adapted, prompt, answer) for prompt, answer in zip(*user, strict=True)]
            for user in zip(prompts, answers, strict=True)
        ]
        logps = self._logps([row for user_rows in rows for row in user_rows])
        sums = [(sum(logps[row] for row in group), sum(len(row.completion) for row in group)) for group in rows]
        return [exp(-logp / tokens) if tokens else None for logp, tokens in sums]

    def _logps(self, rows: Sequence[Row]) -> dict[Row, float]:
        distinct = list(dict.fromkeys(rows))
        with self._adapted.using(None):
            (scores,) = self._adapted.score([distinct])
        return dict(zip(distinct, (score.logp for score in scores), strict=True))


TONE = ("words", "sentences", "exclamations", "questions", "warm", "hedged", "formal", "casual", "first_person")
"""The properties of a text that make its tone; all but counts are 1 or 0."""


def tone_drift(adapted: Sequence[str], base: Sequence[str]) -> dict[str, Drift]:
    """The mean of every property of tone over answers to the same prompts; empty without an answer.

    In the units of a taste's weights (`simulation.users.properties`), and capped as there.
    """
    if not adapted:
        return {}
    means = ([properties(text) for text in texts] for texts in (adapted, base))
    after, before = ({name: fmean(p[name] for p in texts) for name in TONE} for texts in means)
    return {name: Drift(after[name], before[name]) for name in TONE}


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
