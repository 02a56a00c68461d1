"""How many answers have the properties that the policy requires of them."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.evaluation.intervals import lower_bound
from persona_rlhf.evaluation.measures import Met
from persona_rlhf.evaluation.retention import some
from persona_rlhf.policy.hazards import Split
from persona_rlhf.policy.requirements import applies, checkable, satisfied
from persona_rlhf.policy.rules import Requirement


class Required:
    """The requirements that come with prompts, and those of one split: at most `most` a rule, by hash.

    A rule counts the answers to all prompts here that it is about, whichever rule brought them. `delta` is the chance
    that a lower bound of `count` is too high.
    """

    def __init__(self, rules: Sequence[Requirement], most: int, delta: float = 0.05, split: Split = "test") -> None:
        self._delta = delta
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
            rule: Met(n, met, theirs[rule][1], lower_bound(met, n, self._delta), rates[rule])
            for rule, (n, met) in own.items()
        }
