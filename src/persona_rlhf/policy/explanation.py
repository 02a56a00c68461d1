"""Which rules a text meets, and at which stage: the answer to "why was this refused, dropped or changed?"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from persona_rlhf.policy.contradictions import overruled
from persona_rlhf.policy.enforcement import row
from persona_rlhf.policy.likeness import Collection, plain
from persona_rlhf.policy.requirements import applies, checkable, satisfied
from persona_rlhf.policy.rules import Requirement, Restriction
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.policy.topics import about, topic_names


class Meeting(NamedTuple):
    """A rule that a text meets: where on the line, why, and what follows."""

    rule: str
    tier: int
    stage: str
    why: str
    follows: str


def explain(policy: Policy, user_id: str | None, prompt: str, answer: str | None = None) -> list[Meeting]:
    """The rules that a request meets, and its answer where one is given; in the order of stages and tiers.

    Told from texts alone. The base's own refusal, which screening asks as well, and a model's judgement are not here.
    """
    meetings = [*_restricted(policy, prompt), *_required(policy, prompt, answer), *_wished(policy, user_id, prompt)]
    stages = ("screening", "training", "gate", "serving")
    return sorted(meetings, key=lambda meeting: (stages.index(meeting.stage), meeting.tier))


def _restricted(policy: Policy, prompt: str) -> Iterator[Meeting]:
    for rule in policy.restrictions:
        held = row("restriction", rule.action)
        words = plain(prompt)
        same = next((probe for probe in rule.probes if plain(probe.prompt) == words), None)
        if same is not None:
            why = f"it is probe `{same.id}` of {rule.bank} (split {same.split})"
            yield Meeting(rule.id, rule.tier, "screening", why, held.screening)
            if same.split == "train":
                yield Meeting(rule.id, rule.tier, "training", why, held.training)
            if same.split == "certify":
                yield Meeting(rule.id, rule.tier, "gate", why, held.gate)
        else:
            alike = _alike(rule, prompt)
            if alike is None:
                continue
            why = alike
            follows = "quarantined where the base refuses it and the chosen answer does not"
            yield Meeting(rule.id, rule.tier, "screening", why, follows)
        answered = f"answered in the model's place where it is nearly a probe: {rule.text}"
        yield Meeting(rule.id, rule.tier, "serving", why, answered if rule.action == "redirect" else held.serving)


def _alike(rule: Restriction, prompt: str) -> str | None:
    """What a text that is no probe has in common with one: nearly all its words, or those of its topic in a row."""
    held = Collection()
    for probe in rule.probes:
        held.add(probe.id, probe.prompt)
    near = held.near(prompt)
    if near is not None:
        return f"it is nearly probe `{near}` of {rule.bank}"
    words = f" {plain(prompt)} "
    topic = next((probe.topic for probe in rule.probes if f" {plain(probe.topic)} " in words), None)
    return None if topic is None else f"it names the topic `{topic}` of {rule.bank}"


def _required(policy: Policy, prompt: str, answer: str | None) -> Iterator[Meeting]:
    for rule in policy.requirements:
        if applies(rule, prompt):
            why = "it is about every prompt" if rule.when is None else f"it is about {rule.when}"
            yield Meeting(rule.id, rule.tier, "serving", why, _verdict(rule, prompt, answer))


def _verdict(rule: Requirement, prompt: str, answer: str | None) -> str:
    if not checkable(rule):
        return f"asked of the model ({rule.property}: {rule.value}); only a judge could tell whether it is met"
    if answer is None:
        return f"the answer must have {rule.property}: {rule.value}"
    kept = satisfied(rule, prompt, answer)
    verdict = "meets it" if kept else "breaks it" if kept is False else "is too short to tell"
    return f"{rule.property}: {rule.value}; the answer {verdict}"


def _wished(policy: Policy, user_id: str | None, prompt: str) -> Iterator[Meeting]:
    tastes = policy.preferences if user_id is None else policy.for_user(user_id).preferences
    lost = {found.preference: found.sentence for found in overruled(tastes, policy.requirements)}
    for taste in tastes:
        if taste.id in lost:
            yield Meeting(taste.id, taste.tier, "serving", "it is a wish that gives way", lost[taste.id])
            continue
        avoided = str(taste.wish.value).split(", ") if taste.wish is not None and taste.wish.name == "avoid" else []
        met = [topic for topic in avoided if topic in topic_names() and about(topic, prompt)]
        why = f"the user avoids {', '.join(met)}, and it is about that" if met else "it is a wish about every answer"
        if met or not avoided:
            yield Meeting(taste.id, taste.tier, "serving", why, f"in the system prompt: {taste.statement}")
