"""Enforcement of rules: the table of stages, system prompts, redirects, checks of answers, overruled wishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.config.loader import read_yaml
from persona_rlhf.policy.hazards import title
from persona_rlhf.policy.judges import NearDuplicateIndex
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import (
    READABLE,
    REQUIREMENTS,
    WISHED,
    JudgedSentence,
    MustInclude,
    contradict,
    required,
    satisfied,
    wished,
)
from persona_rlhf.policy.rule_schema import Action, PreferenceRule, PropertyValue, RequirementRule, Rule
from persona_rlhf.policy.rules import Preference, Requirement, Restriction


class Enforcement(NamedTuple):
    """The enforcement of a rule: one phrase per stage, empty where the stage does nothing."""

    screening: str = ""
    training: str = ""
    gate: str = ""
    card: str = ""
    serving: str = ""


_PHRASES: Any = read_yaml(Path(__file__).with_name("enforcement.yaml")).tree
_ROWS = {name: Enforcement(**phrases) for name, phrases in _PHRASES.items()}

TABLE: dict[tuple[str, str], Enforcement] = {
    ("restriction", "refuse"): _ROWS["refused"],
    ("restriction", "redirect"): _ROWS["redirected"],
    ("restriction", "answer_with_notice"): _ROWS[MustInclude.stages],
    **{("requirement", name): _ROWS[kind.stages] for name, kind in REQUIREMENTS.items()},
    ("preference", "statement"): _ROWS["wished"],
    **{("preference", name): _ROWS["drafted" if kind.readable else "wished"] for name, kind in WISHED.items()},
}
"""The enforcement of every rule, by its kind and its action, property or wish."""


def row(kind: str, states: Action | str) -> Enforcement:
    """The row of the table for a rule. Raises KeyError where there is none."""
    return TABLE[kind, states]


def row_of(rule: Rule) -> Enforcement:
    """The row of the table for a written rule; without an action, a restriction refuses."""
    if isinstance(rule, RequirementRule):
        name, value = rule.property
        return row(rule.kind, name if REQUIREMENTS[name](value).checkable else JudgedSentence.name)
    if isinstance(rule, PreferenceRule):
        return row(rule.kind, "statement" if rule.wish is None else rule.wish.name)
    return row(rule.kind, rule.action or "refuse")


def system_prompt(policy: Policy, user_id: str) -> str:
    """The requirements, redirects and the user's wishes as instructions to a model; "" where there are none.

    An overruled wish is left out. Every text of a document stays on one line, so that none can start a new section.
    """
    tastes = effective(policy.for_user(user_id).preferences, policy.requirements)
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
    """The requirements that the answer breaks, without those that no program can check."""
    return [rule for rule in policy.requirements if satisfied(rule, prompt, answer) is False]


class Redirects:
    """The texts that replace the model's answers to redirected requests; built once per policy."""

    def __init__(self, policy: Policy) -> None:
        self._texts: dict[str, str] = {}
        self._probes = NearDuplicateIndex()
        for rule in policy.restrictions:
            if rule.action == "redirect" and rule.text is not None:
                self._texts[rule.id] = rule.text
                for probe in rule.probes:
                    self._probes.add(rule.id, probe.prompt)

    def answer(self, prompt: str) -> str | None:
        """The text of the redirect that has a near-duplicate of the prompt among its probes, or None."""
        rule = self._probes.near(prompt)
        return None if rule is None else self._texts[rule]


def _redirect(rule: Restriction) -> str:
    return f"Decline requests about {title(rule.category).lower()}, and say: {rule.text}"


def _required(rule: Requirement) -> str:
    return f"{'' if rule.when is None else f'For {rule.when}: '}{required(rule).wording()}"


def _wished(taste: Preference) -> str:
    if taste.wish is None:
        return taste.statement
    liking = wished(taste.wish).liking()
    return liking if taste.statement == str(taste.wish) else f"{liking} {taste.statement}"


class Overruled(NamedTuple):
    """A preference that gives way to a requirement, and a sentence that explains it to the user."""

    preference: str
    requirement: str
    sentence: str


def overruled(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> Iterator[Overruled]:
    """Every preference whose wish a requirement contradicts, with the requirement's issuer and place."""
    for taste in preferences:
        for rule in requirements:
            if taste.wish is None or not contradict(taste.wish, PropertyValue(rule.property, rule.value)):
                continue
            where = f" for {rule.when}" if rule.when is not None else ""
            sentence = (
                f"You wish for `{taste.wish.name}: {taste.wish.value}` ({taste.id}), but {rule.source_name} requires "
                f"`{rule.property}: {rule.value}`{where} ({rule.id}, {rule.document}:{rule.line}); a requirement "
                "overrides a user's wish, so answers follow it."
            )
            yield Overruled(taste.id, rule.id, sentence)


def effective(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> list[Preference]:
    """The preferences that no requirement overrules."""
    lost = {conflict.preference for conflict in overruled(preferences, requirements)}
    return [taste for taste in preferences if taste.id not in lost]


def readable_tastes(policy: Policy, user_id: str) -> list[Preference]:
    """The preferences of a user whose distance from an answer a program can tell, without the overruled ones."""
    tastes = effective(policy.for_user(user_id).preferences, policy.requirements)
    return [taste for taste in tastes if taste.wish is not None and taste.wish.name in READABLE]
