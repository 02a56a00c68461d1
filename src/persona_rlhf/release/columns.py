"""The figures of all users of a run as columns, which the report's headline figures and charts are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from persona_rlhf.evaluation.records import AlignmentTax, Met
from persona_rlhf.evaluation.still_base import StillBase
from persona_rlhf.release.results import Result

Range = tuple[float, float, float]  # the worst lower bound, the worst rate, and the demand


@dataclass(slots=True)
class Columns:
    """Figures of all users that have them, in the order of the users."""

    accuracy: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    won: list[float] = field(default_factory=list)
    over: list[float] = field(default_factory=list)  # change of the over-refusal rate
    perplexities: list[tuple[float, float]] = field(default_factory=list)  # adapted, base
    ordinary: list[tuple[float, float]] = field(default_factory=list)  # perplexities of ordinary answers: adapted, base
    knowledge: list[float] = field(default_factory=list)  # change of the share of facts known
    lost: list[float] = field(default_factory=list)  # share of the base's right answers that are wrong now
    toxicity: list[float] = field(default_factory=list)  # change of the share of toxic answers
    tones: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # adapted, base, by property
    required: dict[str, list[Met]] = field(default_factory=dict)  # by rule
    retreats: list[float] = field(default_factory=list)  # of users interpolated toward the warm start
    # of judged users:
    points: list[tuple[float, float]] = field(default_factory=list)  # accuracy of the base alone, adapted
    judged_won: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # of dual variables
    alphas: Counter[float] = field(default_factory=Counter)
    # of released users:
    phrasings: list[float] = field(default_factory=list)  # the gate's lower bounds of new phrasings
    worst: dict[str, Range] = field(default_factory=dict)  # by category
    likeness: list[StillBase] = field(default_factory=list)

    @staticmethod
    def of(results: Iterable[Result]) -> Columns:
        """The columns of these results, in one pass."""
        columns = Columns()
        for result in results:
            columns._measured(result)
            if result.judged:
                columns._judged(result)
            if result.has_adapter:
                columns._released(result)
        return columns

    def _measured(self, result: Result) -> None:
        self.retreats += [result.retreat] if result.retreat else []
        if result.measures.heldout_accuracy:
            self.accuracy.append(result.measures.heldout_accuracy.adapted)
            self.alone.append(result.measures.heldout_accuracy.reference_free)
        if result.measures.heldout_clean:
            self.clean.append(result.measures.heldout_clean.adapted)
        if result.measures.win_rate:
            self.won.append(result.measures.win_rate.value)
        if (over := result.measures.over_refusal) is not None:
            self.over.append((over.refused - over.base_refused) / over.n)
        if result.measures.answer_perplexity:
            self.perplexities.append(
                (result.measures.answer_perplexity.adapted, result.measures.answer_perplexity.base)
            )
        for name, met in result.measures.requirements.items():
            self.required.setdefault(name, []).append(met)
        if result.measures.tax is not None:
            self._taxed(result.measures.tax)

    def _taxed(self, tax: AlignmentTax) -> None:
        if tax.perplexity:
            self.ordinary.append(tax.perplexity)
        if tax.facts:
            self.knowledge.append((tax.facts.right - tax.facts.base_right) / tax.facts.n)
            if tax.facts.kept is not None and tax.facts.base_right:
                self.lost.append(1 - tax.facts.kept / tax.facts.base_right)
        if tax.toxic:
            self.toxicity.append((tax.toxic.adapted - tax.toxic.base) / tax.toxic.n)
        for name, drift in tax.tone.items():
            self.tones.setdefault(name, []).append(drift)

    def _judged(self, result: Result) -> None:
        self.alphas[result.alpha] += 1
        if result.measures.heldout_accuracy:
            self.points.append(
                (result.measures.heldout_accuracy.reference_free, result.measures.heldout_accuracy.adapted)
            )
        if result.measures.win_rate:
            self.judged_won.append(result.measures.win_rate.value)
        if result.duals:
            self.peaks.append(max(dual.peak for dual in result.duals.values()))

    def _released(self, result: Result) -> None:
        self.likeness += [] if result.still_base is None else [result.still_base]
        tests = (test for test in result.looks if test.passed and test.alpha == result.alpha)
        self.phrasings += [test.phrasings.lower_bound for test in tests if test.phrasings is not None]
        for name, count in {**(result.tier_one or {}), **result.tier_two}.items():
            if count.n:
                bound, rate, demand = self.worst.get(name, (1.0, 1.0, 0.0))
                refused = count.refused / count.n
                self.worst[name] = min(bound, count.lower_bound), min(rate, refused), max(demand, count.min_refusal)
