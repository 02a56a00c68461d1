"""What each rule means along the line, stage by stage, and how many probes a bound needs before it can be shown."""

from __future__ import annotations

import math
from typing import NamedTuple

from persona_rlhf.policy.languages import known_languages
from persona_rlhf.policy.statements import Action, PreferenceRule, RequirementRule, Rule


class Enforcement(NamedTuple):
    """Where a rule is held: one phrase a stage, empty where the stage does nothing about it."""

    screening: str
    training: str
    gate: str
    card: str
    serving: str


_REFUSED = Enforcement(
    screening="pairs that prefer complying are quarantined",
    training="refusal loss held within `limit` by a dual variable per user",
    gate="certified: refusal rate shown to be at least `min_refusal`, pooled (tier one) and by category",
    card="the counts and bounds of its category",
    serving="the adapter that passed the gate refuses; nothing more is checked",
)
_REQUIRED = Enforcement(
    screening="pairs that prefer an answer without it to one with it are dropped",
    training="not taught",
    gate="measured where the rule names `probes`; holds nobody back",
    card="the share of answers that have it, where it was measured",
    serving="stands in the system prompt; every answer is checked before it is given",
)
_TAUGHT = _REQUIRED._replace(
    training="taught where the rule names `probes`: the base's own answers, repaired, under a dual variable per user",
    gate="measured where the rule names `probes`; an adapter that falls short on `dev` goes back toward the provider's",
)
_JUDGED = Enforcement(
    screening="",
    training="",
    gate="",
    card="",
    serving="stands in the system prompt; not checked, since only a judge could tell",
)
_WISHED = Enforcement(
    screening="",
    training="not enforced: the user's own pairs train the adapter",
    gate="",
    card="",
    serving="stands in the user's system prompt, unless a requirement overrules it",
)
_DRAFTED = _WISHED._replace(
    training="not enforced: the user's own pairs train the adapter; `data draft` drafts pairs from it"
)

TABLE: dict[tuple[str, str], Enforcement] = {
    ("restriction", "refuse"): _REFUSED,
    ("restriction", "redirect"): _REFUSED._replace(
        serving="a request near a probe gets the redirect's text in place of the model's answer"
    ),
    ("restriction", "answer_with_notice"): _TAUGHT,
    ("requirement", "must_include"): _TAUGHT,
    ("requirement", "must_not_include"): _TAUGHT,
    ("requirement", "max_words"): _TAUGHT,
    ("requirement", "min_words"): _REQUIRED,
    ("requirement", "language"): _REQUIRED,
    ("requirement", "reading_level"): _REQUIRED,
    ("requirement", "regex"): _REQUIRED,
    ("requirement", "format"): _REQUIRED,
    ("requirement", "judge"): _JUDGED,
    ("preference", "statement"): _WISHED,
    ("preference", "min_words"): _DRAFTED,
    ("preference", "max_words"): _DRAFTED,
    ("preference", "language"): _DRAFTED,
    ("preference", "formality"): _WISHED,
    ("preference", "tone"): _WISHED,
    ("preference", "avoid"): _DRAFTED,
}
"""Every kind of rule, by what it states: an action, a property, a wish."""


def row(kind: str, states: Action | str) -> Enforcement:
    """The row of a rule. Raises KeyError where there is none: no rule without a row."""
    return TABLE[kind, states]


def row_of(rule: Rule) -> Enforcement:
    """The row of a rule as it is written; an action that a rule leaves out is `refuse`."""
    if isinstance(rule, RequirementRule):
        name, value = rule.property
        unknown = name == "language" and value not in known_languages()
        return row(rule.kind, "judge" if unknown else name)  # of such a language no program here can tell
    if isinstance(rule, PreferenceRule):
        return row(rule.kind, "statement" if rule.wish is None else rule.wish.name)
    return row(rule.kind, rule.action or "refuse")


def probes_needed(min_refusal: float, delta: float) -> int:
    """Smallest n for which n refusals out of n show a rate of `min_refusal`: min_refusal**n <= delta / 2.

    The gate spends delta / 2 a look (fixed-sequence testing), and with no miss the one-sided Clopper-Pearson bound at
    that level is (delta / 2)**(1 / n).
    """
    assert 0 < min_refusal < 1
    assert 0 < delta < 1
    return math.ceil(math.log(delta / 2) / math.log(min_refusal) - 1e-12)
