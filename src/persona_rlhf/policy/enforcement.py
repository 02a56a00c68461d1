"""What each rule does per stage; system prompts, redirects, post-checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, assert_never, cast

from persona_rlhf.policy.hazards import title
from persona_rlhf.policy.judges import NearDuplicateIndex, about, known_languages, language_of, topic_names
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import folded, satisfied, standing
from persona_rlhf.policy.rule_schema import Action, PreferenceRule, PropertyName, PropertyValue, RequirementRule, Rule
from persona_rlhf.policy.rules import Preference, Requirement, Restriction

# ----------------------------------------------------------------------------------------------------
# What each rule means along the line, stage by stage, and how many probes a bound needs before it can be shown.
# ----------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------
# What serving makes of the rules: the text of a system prompt, the check of an answer, the answer of a redirect.
# ----------------------------------------------------------------------------------------------------


def system_prompt(policy: Policy, user_id: str) -> str:
    """The requirements, where redirected requests go, and the user's own wishes, in words for a model; "" for none.

    A wish that a requirement overrules is left out: the model is never asked for both. Whatever a document says stays
    on one line, so that no text opens a section of its own.
    """
    tastes = standing(policy.for_user(user_id).preferences, policy.requirements)
    rules = [
        *(_redirect(rule) for rule in policy.restrictions if rule.action == "redirect"),
        *(_required(rule) for rule in policy.requirements),
    ]
    wishes = [_wished(taste) for taste in tastes]
    parts = [
        "\n".join([heading, *(f"- {' '.join(line.split())}" for line in lines)])
        for heading, lines in (("Every answer keeps these rules:", rules), ("Within them, the user likes:", wishes))
        if lines
    ]
    return "\n\n".join(parts)


def post_check(policy: Policy, prompt: str, answer: str) -> list[Requirement]:
    """The requirements that the answer breaks. What only a judge could tell is not among them."""
    return [rule for rule in policy.requirements if satisfied(rule, prompt, answer) is False]


class Redirects:
    """The answers that redirected requests get in place of the model's: built once a policy, asked for every prompt."""

    def __init__(self, policy: Policy) -> None:
        self._texts: dict[str, str] = {}
        self._held = NearDuplicateIndex()
        for rule in policy.restrictions:
            if rule.action == "redirect" and rule.text is not None:
                self._texts[rule.id] = rule.text
                for probe in rule.probes:
                    self._held.add(rule.id, probe.prompt)

    def answer(self, prompt: str) -> str | None:
        """The text of the redirect whose probes the prompt is nearly one of (`likeness.NEAR`); None for none."""
        rule = self._held.near(prompt)
        return None if rule is None else self._texts[rule]


def _redirect(rule: Restriction) -> str:
    return f"Decline requests about {title(rule.category).lower()}, and say: {rule.text}"


def _required(rule: Requirement) -> str:
    where = "" if rule.when is None else f"For {rule.when}: "
    name, value = cast(PropertyName, rule.property), rule.value
    match name:
        case "must_include":
            return f'{where}include the text "{value}".'
        case "must_not_include":
            return f'{where}never write "{value}".'
        case "min_words":
            return f"{where}use at least {value} words."
        case "max_words":
            return f"{where}use at most {value} words."
        case "language":
            return f"{where}answer in the language with the ISO code {value}."
        case "reading_level":
            return f"{where}write so that a pupil of grade {value} can read it."
        case "regex":
            return f"{where}the answer matches the regular expression {value}"
        case "format":
            return f"{where}{'answer with one JSON value only.' if value == 'json' else 'use no Markdown.'}"
        case "judge":
            return f"{where}{value}"
    assert_never(name)


def _wished(taste: Preference) -> str:
    if taste.wish is None:
        return taste.statement
    name, value = taste.wish
    said = {
        "min_words": f"at least {value} words.",
        "max_words": f"at most {value} words.",
        "language": f"answers in the language with the ISO code {value}.",
        "formality": f"{value} words.",
        "tone": f"a tone that is {value}.",
        "avoid": f"not to be led to: {value}.",
    }[name]
    return said if taste.statement == str(taste.wish) else f"{said} {taste.statement}"


# ----------------------------------------------------------------------------------------------------
# How far an answer is from what a user wished for, as far as a program can tell.
# ----------------------------------------------------------------------------------------------------

READABLE = ("min_words", "max_words", "language", "avoid")
"""Wishes that a text shows. Formality and tone are for a reader to judge."""


def readable_tastes(policy: Policy, user_id: str) -> list[Preference]:
    """The tastes of a user that a program can read off an answer, without those that a requirement overrules."""
    tastes = standing(policy.for_user(user_id).preferences, policy.requirements)
    return [taste for taste in tastes if taste.wish is not None and taste.wish.name in READABLE]


def distance(wishes: Sequence[PropertyValue], answer: str) -> float:
    """The sum over wishes of how far the answer is from each, from 0 (as wished): words too many or too few as a share
    of the number asked for, 1 for another language, the share of avoided topics that it touches."""
    return sum(_distance(wish, answer) for wish in wishes)


def _distance(wish: PropertyValue, answer: str) -> float:
    words = len(answer.split())
    match wish.name:
        case "max_words":
            return max(0, words - int(wish.value)) / int(wish.value)
        case "min_words":
            return max(0, int(wish.value) - words) / int(wish.value)
        case "language":
            return float(language_of(answer) != wish.value)
        case "avoid":
            topics = str(wish.value).split(", ")
            return sum(_touches(topic, answer) for topic in topics) / len(topics)
    raise ValueError(f"no program can read `{wish.name}` off a text")


def _touches(topic: str, answer: str) -> bool:
    return about(topic, answer) if topic in topic_names() else folded(topic) in folded(answer)
