"""Do no harm: an adapter is released only if it still is the base, and is no worse by the user's own held-out pairs.

Refusals can stay while the text is ruined (likelihood displacement). So each test of the gate has demands that a fixed
sample decides, within the limits of `gate.still_base`:

- perplexity: the base's perplexity of the greedy answers to ordinary prompts, against that of its own answers
- length: tokens of these answers, against the base's; and the answers that are empty
- facts: right answers of the base to `evaluation.facts` that stay right
- pairs: an exact one-sided sign test on the user's held-out pairs, one vote a prompt, of "no worse than the base"

**Sampling.** The first three are of the same prompts for every user, and have no confidence bound: a released adapter
keeps the limits on this sample, and its figures on other prompts scatter. The sign test holds back an adapter that is
no worse with a chance of at most its level, and shows no gain: it takes five prompts to reject anything.

**Statistics of the gate.** Each demand is one more of the intersection that a gate test is. It makes a test pass less
often, whatever the certify probes say, so the chance of a release in breach stays below delta. These demands are
decided first: at an alpha where one fails, no certify probe is asked. The order of the alphas does not depend on them:
the sequence still stops at its first failure. A smaller grid, cut by the same ordinary prompts and facts, would choose
among alphas by prompts that `max_over_refusal` and `max_changed` are then tested on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from persona_rlhf.config.evaluation import StillBaseSettings
from persona_rlhf.evaluation.records import Facts
from persona_rlhf.policy.bound import tail


class LimitedMeasure(NamedTuple):
    """A measure of the adapted model and of its base over n prompts; the adapted model's lies between the limits."""

    n: int
    adapted: float
    base: float
    least: float | None
    most: float | None

    @property
    def passes(self) -> bool:
        """Whether the limits hold."""
        return (self.least is None or self.adapted >= self.least) and (self.most is None or self.adapted <= self.most)

    def __str__(self) -> str:
        limits = [f"at least {self.least:.4g}"] if self.least is not None else []
        limits += [f"at most {self.most:.4g}"] if self.most is not None else []
        return f"{self.adapted:,.4g} (base {self.base:,.4g}, n = {self.n}; {' and '.join(limits) or 'no limit'})"


class SignTest(NamedTuple):
    """The prompts of the user's held-out pairs without ties, those that the adapter ranks better, and their test.

    Better is a positive mean reward margin of the prompt's pairs: the adapter raised the chosen answers against the
    rejected. `p_value` is the chance of so few under "no worse than the base".
    """

    n: int
    better: int
    p_value: float
    level: float

    @property
    def passes(self) -> bool:
        """Whether the pairs leave it open that the adapter is no worse."""
        return self.p_value > self.level

    def __str__(self) -> str:
        votes = f"of {self.better} of {self.n} prompts ranked better than by the base"
        return f"{votes} (p = {self.p_value:.2g}, level {self.level:g})"


class StillBase(NamedTuple):
    """The measures of one adapter at one alpha; None where the config has no limit or nothing to measure."""

    perplexity: LimitedMeasure | None = None
    facts: LimitedMeasure | None = None
    length: LimitedMeasure | None = None
    empty: LimitedMeasure | None = None
    pairs: SignTest | None = None

    @property
    def passes(self) -> bool:
        """Whether every demand passes."""
        return self.shortfall is None

    @property
    def shortfall(self) -> str | None:
        """The first demand that fails, in words; None where none does."""
        return next((f"{name} {measure}" for name, measure in self._named() if not measure.passes), None)

    @property
    def sentences(self) -> list[str]:
        """Every measure with its limits, in words."""
        return [f"{name} {measure}" for name, measure in self._named()]

    def _named(self) -> Iterator[tuple[str, LimitedMeasure | SignTest]]:
        return ((name, measure) for name, measure in zip(_NAMES, self, strict=True) if measure is not None)


_NAMES = (
    "perplexity of ordinary answers",
    "right facts kept",
    "tokens of an answer",
    "empty answers",
    "held-out pairs",
)


def without_limit(settings: StillBaseSettings | None, ordinary: int, facts: int) -> list[str]:
    """Sentences on limits that a config sets and nothing can be measured for: it names no prompts or no facts."""
    if settings is None:
        return []
    sentences = []
    if not ordinary:
        sentences.append(
            "no ordinary prompts are asked (evaluation.ordinary, evaluation.harmless_prompts): no limit on the "
            "perplexity and length of answers holds an adapter back"
        )
    if not facts and settings.max_facts_lost is not None:
        sentences.append("no facts are asked (evaluation.facts): no limit on facts lost holds an adapter back")
    return sentences


class AnswersTo(NamedTuple):
    """Answers to ordinary prompts: their number, their tokens, the base's perplexity of them, and the empty ones."""

    n: int
    tokens: int
    perplexity: float
    empty: int


def still_base(
    settings: StillBaseSettings,
    answers: AnswersTo | None,
    of_base: AnswersTo | None,
    facts: Facts | None,
    margins: Sequence[float],
) -> StillBase:
    """The measures within the limits of `settings`. `margins`: means of a user's held-out prompts, no ties."""
    perplexity = length = empty = right = pairs = None
    if answers is not None and of_base is not None and of_base.tokens:
        n = answers.n
        if (most := settings.max_perplexity) is not None:
            perplexity = LimitedMeasure(n, answers.perplexity, of_base.perplexity, None, most * of_base.perplexity)
        mean, of_base_mean = answers.tokens / n, of_base.tokens / n
        least, longest = (
            None if share is None else share * of_base_mean for share in (settings.min_length, settings.max_length)
        )
        length = LimitedMeasure(n, mean, of_base_mean, least, longest)
        if (share := settings.max_empty) is not None:
            empty = LimitedMeasure(n, answers.empty, of_base.empty, None, of_base.empty + share * n)
    if facts is not None and facts.base_right and (lost := settings.max_facts_lost) is not None:
        right = LimitedMeasure(facts.n, facts.kept or 0, facts.base_right, (1 - lost) * facts.base_right, None)
    if margins and (level := settings.pairs_level) is not None:
        better = sum(margin > 0 for margin in margins)
        pairs = SignTest(len(margins), better, tail(len(margins) - better, len(margins), 0.5), level)
    return StillBase(perplexity, right, length, empty, pairs)
