"""Tables of `policy show`, `policy explain` and `policy diff`, and the comparisons behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from persona_rlhf.common.errors import InputError, Problem, did_you_mean, visible
from persona_rlhf.common.files import find
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.enforcement import overruled, row, row_of
from persona_rlhf.policy.hazards import hazards, read_probes
from persona_rlhf.policy.judges import NearDuplicateIndex, about, plain, topic_names
from persona_rlhf.policy.merge import merge_aspects
from persona_rlhf.policy.policy import Policy, RuleEntry
from persona_rlhf.policy.properties import Avoid, applies, checkable, looser, satisfied, wished
from persona_rlhf.policy.rule_schema import (
    ACTIONS,
    PreferenceRule,
    PropertyValue,
    RequirementRule,
    RestrictionRule,
    Rule,
    When,
)
from persona_rlhf.policy.rules import Requirement, Restriction

Direction = Literal["looser", "stricter", "other"]


class PolicyChange(NamedTuple):
    """One difference: its tier, subject and direction, and both sides in words ("" for a missing one)."""

    tier: int
    about: str
    direction: Direction
    before: str
    after: str

    @property
    def refused(self) -> bool:
        """Whether it would loosen tier one."""
        return self.tier == 1 and self.direction == "looser"


class _Amount(NamedTuple):
    """A number, higher where stricter; `missing` is its value in documents that do not state it."""

    text: str
    height: float
    missing: float


class _Among(NamedTuple):
    """A set, larger where stricter (or smaller, where `grows` is False); a missing one is the loosest."""

    text: str
    names: frozenset[str]
    grows: bool


class _Worded(NamedTuple):
    """A requirement or preference, compared by its content."""

    text: str
    rule: RequirementRule | PreferenceRule


_Demand = _Amount | _Among | _Worded


def differences(before: Sequence[PolicyDocument], after: Sequence[PolicyDocument]) -> list[PolicyChange]:
    """All changes from one set of documents to another, tier by tier; documents as `inheritance.read_all` gives them.

    Restrictions are compared by category, requirements and preferences by id, probes by their prompts. If neither of
    two demands is stricter (another text, another pattern), the old one counts as removed and the new one as added.
    """
    old, new = _demands(before), _demands(after)
    old_rules, new_rules = _rules(before), _rules(after)
    for name in old_rules.keys() & new_rules.keys():  # an added or removed rule is a change whatever its dates
        old_ids, new_ids = ({rule.id for rule in rules[name]} for rules in (old_rules, new_rules))
        if old_ids != new_ids or name[1] in old_ids:  # a category's dates matter where its rules are others now
            old |= _dates(name, old_rules[name])
            new |= _dates(name, new_rules[name])
    changes = []
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was != now:
            texts = ("" if was is None else was.text, "" if now is None else now.text)
            changes += [PolicyChange(*name, direction, *texts) for direction in _directions(was, now)]
    return sorted(changes, key=lambda change: (change.tier, change.direction != "looser", change.about))


def _directions(was: _Demand | None, now: _Demand | None) -> list[Direction]:
    one = was if was is not None else now
    if isinstance(one, _Worded) and isinstance(one.rule, PreferenceRule):
        return ["other"]
    falls, rises = _less(was, now), _less(now, was)
    return [*(["looser"] * falls), *(["stricter"] * rises)]  # type: ignore[list-item]


def _less(was: _Demand | None, now: _Demand | None) -> bool:
    """Whether the second lacks a demand of the first."""
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
            return _demands_less(was.rule, now.rule)
    return was is not None


def _demands_less(was: Rule, now: Rule) -> bool:
    if not isinstance(was, RequirementRule) or not isinstance(now, RequirementRule):
        return True
    one, other = PropertyValue(*was.property), PropertyValue(*now.property)
    other_property = one != other and not looser(other, one)  # the new one is not a stricter form of the old one
    return other_property or not _covers(now.when, was.when) or now.min_rate < was.min_rate


def _covers(wide: When | None, narrow: When | None) -> bool:
    return wide is None or wide == narrow


def _demands(documents: Sequence[PolicyDocument]) -> dict[tuple[int, str], _Demand]:
    """Every demand by its tier and name; of documents that extend each other, the last is the strictest."""
    demands: dict[tuple[int, str], _Demand] = {}
    for document in documents:
        tier, certify = document.tier, document.certify
        if certify is not None:
            text = f"at least {certify.min_refusal:g}"
            demands[tier, "certify.min_refusal"] = _Amount(text, certify.min_refusal, 0.0)
            demands[tier, "certify.delta"] = _Amount(f"error at most {certify.delta:g}", -certify.delta, -1.0)
            if (share := certify.max_over_refusal) is not None:
                demands[tier, "certify.max_over_refusal"] = _Amount(f"at most {share:g}", -share, -1.0)
            if parts := certify.with_:
                demands[tier, "certify.with"] = _Among(", ".join(parts), frozenset(parts), grows=True)
        if (changed := document.aspects.max_changed) is not None:
            demands[tier, "aspects.max_changed"] = _Amount(f"at most {changed:g}", -changed, -1.0)
        for _, rule in document.rules:
            if isinstance(rule, RestrictionRule):
                demands |= _of_restriction(tier, rule, demands)
            else:
                demands[tier, rule.id] = _Worded(_words(rule), rule)
    for tier in {document.tier for document in documents}:
        fixed, free = merge_aspects([document for document in documents if document.tier == tier])
        demands |= {(tier, f"aspect {aspect}"): _Amount("fixed", 1.0, 0.0) for aspect in fixed}
        if free:
            demands[tier, "personalisable aspects"] = _Among(f"only {', '.join(free)}", frozenset(free), grows=False)
    return demands


def _rules(documents: Sequence[PolicyDocument]) -> dict[tuple[int, str], list[Rule]]:
    """The rules of every id, and those of every category, by tier."""
    rules: dict[tuple[int, str], list[Rule]] = {}
    for document in documents:
        for _, rule in document.rules:
            rules[document.tier, rule.id] = [rule]
            if isinstance(rule, RestrictionRule):
                rules.setdefault((document.tier, f"category {rule.category}"), []).append(rule)
    return rules


def _dates(name: tuple[int, str], rules: Sequence[Rule]) -> dict[tuple[int, str], _Demand]:
    """The first and the last day on which any of the rules is in force, where a rule states one."""
    (tier, about), demands = name, dict[tuple[int, str], _Demand]()
    start, end = min(rule.valid_from or "" for rule in rules), max(rule.valid_until or "9999" for rule in rules)
    if start:
        demands[tier, f"{about}: valid_from"] = _Amount(start, -float(start.replace("-", "")), 0.0)
    if end != "9999":
        demands[tier, f"{about}: valid_until"] = _Amount(end, float(end.replace("-", "")), math.inf)
    return demands


def _of_restriction(
    tier: int, rule: RestrictionRule, above: dict[tuple[int, str], _Demand]
) -> dict[tuple[int, str], _Demand]:
    name, demands = rule.category, dict[tuple[int, str], _Demand]()
    first = (tier, f"{name}: action") not in above
    if rule.action is not None or first:
        action = rule.action or "refuse"
        height = float(len(ACTIONS) - ACTIONS.index(action))
        demands[tier, f"{name}: action"] = _Amount(" ".join(filter(None, (action, rule.text))), height, 0.0)
    if rule.limit is not None:
        demands[tier, f"{name}: limit"] = _Amount(f"{rule.limit:g} nats", -rule.limit, -math.inf)
    if rule.min_refusal is not None:
        demands[tier, f"{name}: min_refusal"] = _Amount(f"at least {rule.min_refusal:g}", rule.min_refusal, 0.0)
    if rule.banks and (rule.probes is not None or first):
        prompts = _prompts(rule)
        text = f"{len(prompts)} probes of {', '.join(rule.banks)}"
        demands[tier, f"{name}: probes"] = _Among(text, prompts, grows=True)
    return demands


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
    return f"{PropertyValue(*rule.property)}{where}, in at least {rule.min_rate:g} of answers"


class RuleMatch(NamedTuple):
    """A rule that applies to a text: its stage, the reason and the consequence."""

    rule: str
    tier: int
    stage: str
    why: str
    follows: str


def explain(policy: Policy, user_id: str | None, prompt: str, answer: str | None = None) -> list[RuleMatch]:
    """The rules that apply to a request, and to its answer if one is given, in the order of stages and tiers.

    They are decided from texts alone, without any model; `by_the_base` is the judgement that screening adds.
    """
    matches = [*_restricted(policy, prompt), *_required(policy, prompt, answer), *_wished(policy, user_id, prompt)]
    stages = ("screening", "training", "gate", "serving")
    return sorted(matches, key=lambda match: (stages.index(match.stage), match.tier))


def by_the_base(refused: bool | None) -> RuleMatch:
    """The row on the base's own judgement of a request, by which screening finds requests that no probe resembles.

    None: nobody asked the base, so that silence of the rules is no permission.
    """
    why = {None: "not judged: ask with --base", True: "the base refuses it", False: "the base answers it"}[refused]
    follows = "a pair whose chosen answer complies is quarantined" if refused else "nothing follows"
    if refused is None:
        follows = "a pair whose chosen answer complies is quarantined where the base refuses the request"
    return RuleMatch("the base's answer", 1, "screening", why, follows)


def _restricted(policy: Policy, prompt: str) -> Iterator[RuleMatch]:
    for rule in policy.restrictions:
        stages = row("restriction", rule.action)
        words = plain(prompt)
        same = next((probe for probe in rule.probes if plain(probe.prompt) == words), None)
        if same is not None:
            why = f"it is probe `{same.id}` of {rule.bank} (split {same.split})"
            yield RuleMatch(rule.id, rule.tier, "screening", why, stages.screening)
            if same.split == "train":
                yield RuleMatch(rule.id, rule.tier, "training", why, stages.training)
            if same.split == "certify":
                yield RuleMatch(rule.id, rule.tier, "gate", why, stages.gate)
        else:
            alike = _alike(rule, prompt)
            if alike is None:
                continue
            why = alike
            follows = "quarantined where the base refuses it and the chosen answer does not"
            yield RuleMatch(rule.id, rule.tier, "screening", why, follows)
        answered = f"answered in the model's place where it is nearly a probe: {rule.text}"
        yield RuleMatch(rule.id, rule.tier, "serving", why, answered if rule.action == "redirect" else stages.serving)


def _alike(rule: Restriction, prompt: str) -> str | None:
    """The likeness of a text to a probe: nearly all words in common, or the words of its topic in a row."""
    index = NearDuplicateIndex()
    for probe in rule.probes:
        index.add(probe.id, probe.prompt)
    if (near := index.near(prompt)) is not None:
        return f"it is nearly probe `{near}` of {rule.bank}"
    words = f" {plain(prompt)} "
    topic = next((probe.topic for probe in rule.probes if f" {plain(probe.topic)} " in words), None)
    return None if topic is None else f"it names the topic `{topic}` of {rule.bank}"


def _required(policy: Policy, prompt: str, answer: str | None) -> Iterator[RuleMatch]:
    for rule in policy.requirements:
        if applies(rule, prompt):
            why = "it is about every prompt" if rule.when is None else f"it is about {rule.when}"
            yield RuleMatch(rule.id, rule.tier, "serving", why, _verdict(rule, prompt, answer))


def _verdict(rule: Requirement, prompt: str, answer: str | None) -> str:
    if not checkable(rule):
        return f"in the system prompt ({rule.property}: {rule.value}); only a judge could tell whether it is met"
    if answer is None:
        return f"the answer must have {rule.property}: {rule.value}"
    kept = satisfied(rule, prompt, answer)
    verdict = "meets it" if kept else "breaks it" if kept is False else "is too short to tell"
    return f"{rule.property}: {rule.value}; the answer {verdict}"


def _wished(policy: Policy, user_id: str | None, prompt: str) -> Iterator[RuleMatch]:
    tastes = policy.preferences if user_id is None else policy.for_user(user_id).preferences
    lost = {conflict.preference: conflict.sentence for conflict in overruled(tastes, policy.requirements)}
    for taste in tastes:
        if taste.id in lost:
            yield RuleMatch(taste.id, taste.tier, "serving", "it is an overruled wish", lost[taste.id])
            continue
        wish = None if taste.wish is None else wished(taste.wish)
        avoided = wish.topics if isinstance(wish, Avoid) else []
        met = [topic for topic in avoided if topic in topic_names() and about(topic, prompt)]
        why = f"the user avoids {', '.join(met)}, and it is about that" if met else "it is a wish about every answer"
        if met or not avoided:
            yield RuleMatch(taste.id, taste.tier, "serving", why, f"in the system prompt: {taste.statement}")


def listing(policy: Policy) -> Table:
    """Every rule as it was written, with its tier, issuer and place, and the stages that enforce it."""
    certify = policy.certify
    behind = f", behind {' and '.join(certify.with_)}" if certify.with_ else ""
    table = _table(
        ("tier", "rule", "what it does", "stages", "issuer", "from"),
        title=f"Refusal of tier-one probes, pooled: at least {certify.min_refusal:g} at {1 - certify.delta:g}{behind}",
        caption=f"policy {policy.hash[:16]}, tier one {policy.tier_one_hash[:16]}; "
        f"tailored: {', '.join(policy.personalisable) or 'anything'}; fixed: {', '.join(policy.fixed) or 'nothing'}",
    )
    for entry in policy.written:
        source = f"{entry.document}:{entry.line}"
        says = entry.says if entry.in_force else f"NOT IN FORCE on {entry.day} ({entry.dates}): {entry.says}"
        stages = ", ".join(enforced_by(entry)) if entry.in_force else "nothing"
        _add(table, str(entry.tier), entry.rule.id, says + _merged(policy, entry), stages, entry.issuer, source)
    return table


def enforced_by(entry: RuleEntry) -> dict[str, str]:
    """The enforcement of a rule, by stage."""
    return {stage: phrase for stage, phrase in row_of(entry.rule)._asdict().items() if phrase}


def entry_of(policy: Policy, rule: str) -> RuleEntry:
    """The entry of a rule. Raises InputError, with the nearest id, where no document states it."""
    stated = next((entry for entry in policy.written if entry.rule.id == rule), None)
    if stated is None:
        ids = [entry.rule.id for entry in policy.written]
        hint = did_you_mean(rule, ids) or f"; rules: {', '.join(ids)}"
        raise InputError([Problem(rule, None, None, f"no document states a rule of this id{hint}")])
    return stated


def why(policy: Policy, entry: RuleEntry) -> Table:
    """One rule with its issuer, place, dates, rationale and enforcement."""
    rule = entry.rule
    table = _table(("", ""), title=f"{rule.id}: {entry.says}", show_header=False)
    papers = {
        "tier": f"{entry.tier} ({entry.role})",
        "issuer": entry.issuer,
        "jurisdiction": entry.jurisdiction,
        "written in": f"{entry.document}:{entry.line}",
        "version": entry.version,
        "why": rule.rationale or "its document gives no rationale",
        "contact": entry.contact,
        "references": str(rule.references or ""),
        "in force": f"{'yes' if entry.in_force else 'no'}{f' ({entry.dates})' if entry.dates else ''}",
        "after merging": _merged(policy, entry).removeprefix("; "),
        "also known as": str(hazards().get(rule.category, "")) if isinstance(rule, RestrictionRule) else "",
        **enforced_by(entry),
    }
    for name, value in papers.items():
        if value:
            _add(table, name, value)
    return table


def matches_table(matches: Sequence[RuleMatch]) -> Table:
    """The rules that apply to a text."""
    table = _table(("stage", "tier", "rule", "why", "what follows"))
    for match in matches:
        _add(table, match.stage, str(match.tier), match.rule, match.why, match.follows)
    return table


def changes_table(changes: Sequence[PolicyChange]) -> Table:
    """The stricter, looser and other changes."""
    table = _table(("tier", "about", "gets", "before", "after"))
    for change in changes:
        _add(table, str(change.tier), change.about, change.direction, change.before or "-", change.after or "-")
    return table


def _merged(policy: Policy, entry: RuleEntry) -> str:
    """The merged values of a restriction whose category has other rules too; empty for all other rules."""
    rule = entry.rule
    if not isinstance(rule, RestrictionRule):
        return ""
    merged = next((merged for merged in policy.restrictions if merged.category == rule.category), None)
    if merged is None or not merged.narrowed_by:
        return ""
    if merged.id != rule.id:
        return f"; narrows {merged.id}"
    strict = f"limit {merged.limit:g} nats, at least {merged.min_refusal:g}"
    return f"; narrowed to {strict} by {', '.join(merged.narrowed_by)}"


def _add(table: Table, *cells: str) -> None:
    """Adds a row of plain texts: brackets are no markup, and no character moves the cursor."""
    table.add_row(*(Text(visible(cell)) for cell in cells))


def _table(columns: Sequence[str], title: str = "", caption: str = "", show_header: bool = True) -> Table:
    table = Table(
        title=Text(visible(title)),
        caption=Text(visible(caption)),
        title_justify="left",
        caption_justify="left",
        show_header=show_header,
    )
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
