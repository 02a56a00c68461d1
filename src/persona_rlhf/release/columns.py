"""What the page of a run needs of all its users: some numbers each, whatever else stands in their lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from persona_rlhf.evaluation.measures import AlignmentTax, Met
from persona_rlhf.release.results import Result

Range = tuple[float, float, float]  # the worst lower bound, the worst rate, and the demand


@dataclass(slots=True)
class Columns:
    """Numbers of all users that have them, in the order of the users."""

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
    retreats: list[float] = field(default_factory=list)  # of those who were taken back toward the provider's adapter
    alarms: int = 0
    # of those who were judged:
    points: list[tuple[float, float]] = field(default_factory=list)  # accuracy of the base alone, adapted
    judged_won: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # of dual variables
    alphas: Counter[float] = field(default_factory=Counter)
    # of those who were released:
    phrasings: list[float] = field(default_factory=list)  # lower bounds with every phrasing counting once
    worst: dict[str, Range] = field(default_factory=dict)  # by category

    @staticmethod
    def of(results: Iterable[Result]) -> Columns:
        """One pass over the results."""
        found = Columns()
        for result in results:
            found._measured(result)
            if result.status in ("released", "held_back"):
                found._judged(result)
            if result.status == "released":
                found._released(result)
        return found

    def _measured(self, result: Result) -> None:
        self.alarms += result.alarm
        self.retreats += [result.retreat] if result.retreat else []
        if result.heldout_accuracy:
            self.accuracy.append(result.heldout_accuracy.adapted)
            self.alone.append(result.heldout_accuracy.reference_free)
        if result.heldout_clean:
            self.clean.append(result.heldout_clean.adapted)
        if result.win_rate:
            self.won.append(result.win_rate.value)
        if (over := result.over_refusal) is not None:
            self.over.append((over.refused - over.base_refused) / over.n)
        if result.answer_perplexity:
            self.perplexities.append((result.answer_perplexity.adapted, result.answer_perplexity.base))
        for name, met in result.requirements.items():
            self.required.setdefault(name, []).append(met)
        if result.tax is not None:
            self._taxed(result.tax)

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
        if result.heldout_accuracy:
            self.points.append((result.heldout_accuracy.reference_free, result.heldout_accuracy.adapted))
        if result.win_rate:
            self.judged_won.append(result.win_rate.value)
        if result.duals:
            self.peaks.append(max(dual.peak for dual in result.duals.values()))

    def _released(self, result: Result) -> None:
        if result.clusters is not None:
            self.phrasings.append(result.clusters.phrasings.lower_bound)
        for name, count in {**(result.tier_one or {}), **result.tier_two}.items():
            if count.n:
                bound, rate, asked = self.worst.get(name, (1.0, 1.0, 0.0))
                refused = count.refused / count.n
                known = min(bound, count.lower_bound), min(rate, refused), max(asked, count.min_refusal)
                self.worst[name] = known
