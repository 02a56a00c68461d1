"""How many answers have the properties that the policy requires of them."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.evaluation.intervals import lower_bound
from persona_rlhf.evaluation.measures import Met
from persona_rlhf.evaluation.retention import some
from persona_rlhf.policy.requirements import applies, checkable, satisfied
from persona_rlhf.policy.rules import Requirement


class Required:
    """The requirements that come with prompts, and their `test` prompts: at most `most` a rule, by hash.

    A rule counts the answers to all prompts here that it is about, whichever rule brought them. `delta` is the chance
    that a lower bound is too high.
    """

    def __init__(self, rules: Sequence[Requirement], most: int, delta: float) -> None:
        self._delta = delta
        self._rules = [rule for rule in rules if rule.probes and checkable(rule)]
        asked = [
            text
            for rule in self._rules
            for text in some((p.prompt for p in rule.probes if p.split == "test" and applies(rule, p.prompt)), most)
        ]
        self.prompts = list(dict.fromkeys(asked))

    def count(self, answers: Sequence[str], base: Sequence[str]) -> dict[str, Met]:
        """Of each rule by its id, from one user's answers to `prompts` and the base's. An answer of which nobody can
        tell (too short for its language, say) counts as one without the property."""
        found = {}
        for rule in self._rules:
            about = [n for n, prompt in enumerate(self.prompts) if applies(rule, prompt)]
            own, theirs = (
                sum(satisfied(rule, self.prompts[n], texts[n]) is True for n in about) for texts in (answers, base)
            )
            if about:
                bound = lower_bound(own, len(about), self._delta)
                found[rule.id] = Met(len(about), own, theirs, bound, rule.min_rate)
        return found
