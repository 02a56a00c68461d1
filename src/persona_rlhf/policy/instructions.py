"""What serving makes of the rules: the text of a system prompt, the check of an answer, the answer of a redirect."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never, cast

from persona_rlhf.policy.contradictions import standing
from persona_rlhf.policy.likeness import Collection
from persona_rlhf.policy.requirements import satisfied
from persona_rlhf.policy.rules import Preference, Requirement, Restriction
from persona_rlhf.policy.statements import Property
from persona_rlhf.policy.taxonomy import title

if TYPE_CHECKING:
    from persona_rlhf.policy.tiers import Policy


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
        self._held = Collection()
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
    name, value = cast(Property, rule.property), rule.value
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
