"""The register: every rule as it was written, who stands behind it and why, and whether it is in force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from typing import NamedTuple

from persona_rlhf.inputs.problems import Problem
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.rules import Preference
from persona_rlhf.policy.statements import PreferenceRule, RequirementRule, RestrictionRule, Rule


class Entry(NamedTuple):
    """A rule of a document. `version` and `contact` are the rule's own, else the document's and the issuer's."""

    rule: Rule
    tier: int
    issuer: str
    role: str
    user_id: str | None
    document: str
    line: int
    version: str
    contact: str | None
    jurisdiction: str | None
    day: date

    @property
    def in_force(self) -> bool:
        return self.rule.in_force(self.day)

    @property
    def says(self) -> str:
        """What the rule asks, in a phrase."""
        rule = self.rule
        if isinstance(rule, RequirementRule):
            name, value = rule.property
            rate = f", in at least {rule.min_rate:g} of answers"
            return f"{name}: {value}{f', for {rule.when}' if rule.when is not None else ''}{rate}"
        if isinstance(rule, PreferenceRule):
            whose = f"user {self.user_id}" if self.user_id is not None else "every user"
            return f"{rule.aspect}, {whose}: {'; '.join(str(part) for part in (rule.wish, rule.statement) if part)}"
        return _restricted(rule)

    @property
    def dates(self) -> str:
        """Its dates in words; nothing where it has none."""
        since = f"from {self.rule.valid_from}" if self.rule.valid_from is not None else ""
        until = f"until {self.rule.valid_until}" if self.rule.valid_until is not None else ""
        return " ".join(part for part in (since, until) if part)

    def preference(self) -> Preference | None:
        """The rule as a preference; a wish without a statement is its own."""
        rule, source = self.rule, (self.tier, self.document, self.line, self.issuer)
        if not isinstance(rule, PreferenceRule):
            return None
        statement = rule.statement or str(rule.wish)
        return Preference(rule.id, self.user_id, rule.aspect, statement, *source, wish=rule.wish)

    def to_json(self) -> dict[str, object]:
        said = self.rule.model_dump(mode="json", exclude_none=True)
        rest = {k: v for k, v in self._asdict().items() if k not in ("rule", "day")}
        return {**said, **rest, "says": self.says, "in_force": self.in_force}


def _restricted(rule: RestrictionRule) -> str:
    if rule.action == "answer_with_notice":
        return f"answer {rule.category} ({rule.when}) with the notice: {rule.text}"
    demands = [f"limit {rule.limit:g} nats" if rule.limit is not None else ""]
    demands += [f"at least {rule.min_refusal:g}" if rule.min_refusal is not None else ""]
    asked = ", ".join(part for part in demands if part)
    lead = f"; lead to: {rule.text}" if rule.action == "redirect" else ""
    return f"refuse {rule.category}{f': {asked}' if asked else ''}{lead}"


def register(documents: Sequence[PolicyDocument], day: date) -> tuple[Entry, ...]:
    """All rules of all documents, in their order, as of a day."""
    return tuple(
        Entry(
            rule=rule,
            tier=document.tier,
            issuer=document.issuer.name,
            role=document.issuer.role,
            user_id=document.issuer.user_id,
            document=document.path,
            line=document.line(index),
            version=rule.version or document.version,
            contact=rule.contact or document.issuer.contact,
            jurisdiction=document.jurisdiction,
            day=day,
        )
        for document in documents
        for index, rule in document.rules
    )


def out_of_force(entries: Sequence[Entry]) -> Iterator[str]:
    """A sentence for every rule that is out of its dates; those of tier one first and louder."""
    for entry in sorted(entries, key=lambda entry: entry.tier):
        if not entry.in_force:
            where = f"{entry.document}:{entry.line}"
            warning = " Tier one does not hold it today; if it should, write another date." if entry.tier == 1 else ""
            yield f"{where}: rule `{entry.rule.id}` ({entry.dates}) is not in force on {entry.day}.{warning}"


def lapsed(documents: Sequence[PolicyDocument], day: date) -> Iterator[Problem]:
    """A tier one that stated restrictions, none of which is in force: such a policy would hold nothing."""
    highest = [document for document in documents if document.tier == 1]
    rules = [rule for document in highest for _, rule in document.rules if isinstance(rule, RestrictionRule)]
    if rules and not any(rule.in_force(day) for rule in rules):
        sentence = f"no restriction of tier one is in force on {day}; write other dates, or take the rules out"
        yield highest[-1].problem(("rules",), sentence)
