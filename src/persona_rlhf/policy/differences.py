"""What changes from one policy to another: every demand that gets stricter, looser, or other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError
from persona_rlhf.policy.contradictions import looser
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.hazards import read_probes
from persona_rlhf.policy.likeness import plain
from persona_rlhf.policy.merging import merge_aspects
from persona_rlhf.policy.statements import ACTIONS, PreferenceRule, RequirementRule, RestrictionRule, Rule, When, Wish

Direction = Literal["looser", "stricter", "other"]


class Change(NamedTuple):
    """One difference: whose tier, what it is about, which way it goes, and both sides in words ("" where not there)."""

    tier: int
    about: str
    direction: Direction
    before: str
    after: str

    @property
    def refused(self) -> bool:
        """Whether it would take something away from tier one."""
        return self.tier == 1 and self.direction == "looser"


class _Amount(NamedTuple):
    """A number, higher where stricter; `missing` is its value where nothing is said."""

    text: str
    height: float
    missing: float


class _Among(NamedTuple):
    """A set, larger where stricter (or smaller, where `grows` is False); nothing said is the loosest of all."""

    text: str
    names: frozenset[str]
    grows: bool


class _Worded(NamedTuple):
    """A rule that is compared by what it says."""

    text: str
    rule: RequirementRule | PreferenceRule


_Demand = _Amount | _Among | _Worded


def differences(before: Sequence[PolicyDocument], after: Sequence[PolicyDocument]) -> list[Change]:
    """All changes from one set of documents to another, tier by tier; documents as `lineage.read_all` gives them.

    Restrictions are compared by category, requirements and preferences by id, probes by their prompts. Where neither of
    two demands is the stricter one (another text, another pattern) the old one counts as gone and the new one as new.
    """
    old, new = _demands(before), _demands(after)
    changes = []
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was != now:
            said = ("" if was is None else was.text, "" if now is None else now.text)
            changes += [Change(*name, direction, *said) for direction in _directions(was, now)]
    return sorted(changes, key=lambda change: (change.tier, change.direction != "looser", change.about))


def _directions(was: _Demand | None, now: _Demand | None) -> list[Direction]:
    one = was if was is not None else now
    if isinstance(one, _Worded) and isinstance(one.rule, PreferenceRule):
        return ["other"]
    falls, rises = _less(was, now), _less(now, was)
    return [*(["looser"] * falls), *(["stricter"] * rises)]  # type: ignore[list-item]


def _less(was: _Demand | None, now: _Demand | None) -> bool:
    """Whether something that the first demands is not demanded by the second."""
    match was, now:
        case _Amount(), _Amount():
            return now.height < was.height
        case _Amount(), None:
            return was.missing < was.height
        case None, _Amount():
            return now.height < now.missing
        case _Among(), _Among():
            return not (was.names <= now.names if was.grows else was.names >= now.names)
        case _Worded(), _Worded():
            return _asks_less(was.rule, now.rule)
    return was is not None


def _asks_less(was: Rule, now: Rule) -> bool:
    if not isinstance(was, RequirementRule) or not isinstance(now, RequirementRule):
        return True
    one, other = Wish(*was.property), Wish(*now.property)
    other_property = one != other and not looser(other, one)  # the new one is not a stricter form of the old one
    return other_property or not _covers(now.when, was.when) or now.min_rate < was.min_rate


def _covers(wide: When | None, narrow: When | None) -> bool:
    return wide is None or wide == narrow


def _demands(documents: Sequence[PolicyDocument]) -> dict[tuple[int, str], _Demand]:
    """Every demand by its tier and name; of documents that extend each other the last word is the strictest."""
    found: dict[tuple[int, str], _Demand] = {}
    for document in documents:
        tier, certify = document.tier, document.certify
        if certify is not None:
            text = f"at least {certify.min_refusal:g}"
            found[tier, "certify.min_refusal"] = _Amount(text, certify.min_refusal, 0.0)
            found[tier, "certify.delta"] = _Amount(f"error at most {certify.delta:g}", -certify.delta, -1.0)
        for _, rule in document.rules:
            if isinstance(rule, RestrictionRule):
                found |= _of_restriction(tier, rule, found)
            else:
                found[tier, rule.id] = _Worded(_words(rule), rule)
            if rule.valid_until is not None:
                until = float(rule.valid_until.replace("-", ""))
                found[tier, f"{rule.id}: valid_until"] = _Amount(rule.valid_until, until, math.inf)
            if rule.valid_from is not None:
                start = float(rule.valid_from.replace("-", ""))
                found[tier, f"{rule.id}: valid_from"] = _Amount(rule.valid_from, -start, 0.0)
    for tier in {document.tier for document in documents}:
        fixed, free = merge_aspects([document for document in documents if document.tier == tier])
        found |= {(tier, f"aspect {aspect}"): _Amount("fixed", 1.0, 0.0) for aspect in fixed}
        if free:
            found[tier, "personalisable aspects"] = _Among(f"only {', '.join(free)}", frozenset(free), grows=False)
    return found


def _of_restriction(
    tier: int, rule: RestrictionRule, above: dict[tuple[int, str], _Demand]
) -> dict[tuple[int, str], _Demand]:
    name, found = rule.category, dict[tuple[int, str], _Demand]()
    first = (tier, f"{name}: action") not in above
    if rule.action is not None or first:
        action = rule.action or "refuse"
        height = float(len(ACTIONS) - ACTIONS.index(action))
        found[tier, f"{name}: action"] = _Amount(" ".join(filter(None, (action, rule.text))), height, 0.0)
    if rule.limit is not None:
        found[tier, f"{name}: limit"] = _Amount(f"{rule.limit:g} nats", -rule.limit, -math.inf)
    if rule.min_refusal is not None:
        found[tier, f"{name}: min_refusal"] = _Amount(f"at least {rule.min_refusal:g}", rule.min_refusal, 0.0)
    if rule.banks and (rule.probes is not None or first):
        prompts = _prompts(rule)
        text = f"{len(prompts)} probes of {', '.join(rule.banks)}"
        found[tier, f"{name}: probes"] = _Among(text, prompts, grows=True)
    return found


def _prompts(rule: RestrictionRule) -> frozenset[str]:
    """The prompts of a rule's banks; where these cannot be read, the names of the banks."""
    try:
        return frozenset(plain(probe.prompt) for bank in rule.banks for probe in read_probes(find(bank), rule.category))
    except InputError:
        return frozenset(rule.banks)


def _words(rule: RequirementRule | PreferenceRule) -> str:
    if isinstance(rule, PreferenceRule):
        return "; ".join(str(part) for part in (rule.wish, rule.statement) if part)
    where = f", for {rule.when}" if rule.when is not None else ""
    return f"{Wish(*rule.property)}{where}, in at least {rule.min_rate:g} of answers"
