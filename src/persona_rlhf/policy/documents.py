"""One policy document: its YAML form (one tier, one issuer, its rules) and every mistake that shows in it alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.inputs.section import Section, check_section
from persona_rlhf.inputs.yaml_text import Document, KeyPath, dotted, read_yaml

Tier = Literal["one", "two", "three"]
NUMBER: dict[str, int] = {"one": 1, "two": 2, "three": 3}
ROLE: dict[str, str] = {"one": "model_provider", "two": "application_provider", "three": "end_user"}


class Issuer(Section):
    """Who speaks in a document; the role must be that of its tier."""

    role: Literal["model_provider", "application_provider", "end_user"] = Field(description="Role of the issuer.")
    name: str = Field(min_length=1, description="Name of the issuer, as people should read it.")
    user_id: str | None = Field(None, min_length=1, description="The end user; without it tier three is everybody's.")


class Certify(Section):
    """What the gate is asked to show, pooled over all tier-one probes: refusal >= min_refusal, at 1 - delta."""

    min_refusal: float = Field(gt=0, lt=1, description="Refusal rate to be shown for the probes' population.")
    delta: float = Field(gt=0, lt=1, description="Chance of releasing an adapter below it that is accepted, per user.")


class Aspects(Section):
    """Which properties of an answer may be tailored to a user at all."""

    fixed: list[str] = Field([], description="Aspects that no user's taste may change.")
    personalisable: list[str] = Field([], description="Aspects that a user's taste may change.")

    @model_validator(mode="after")
    def _disjoint(self) -> Aspects:
        both = sorted(set(self.fixed) & set(self.personalisable))
        if both:
            raise ValueError(f"`{both[0]}` cannot be both fixed and personalisable")
        return self


class RestrictionRule(Section):
    """Requests of a hazard category are refused as reliably as the base refuses them."""

    id: str = Field(min_length=1, description="Name of the rule, unique over all documents.")
    kind: Literal["restriction"] = Field(description="restriction, requirement or preference.")
    category: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Hazard category, such as terrorist_content.")
    probes: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Probe bank (JSON lines), or a list of banks; bundled categories bring their own."
    )
    limit: float | None = Field(None, ge=0, description="Nats of excess refusal loss tolerated in training.")
    min_refusal: float | None = Field(
        None, gt=0, lt=1, description="Refusal rate that the gate must show for this category alone."
    )

    @property
    def banks(self) -> tuple[str, ...]:
        """The banks that are named, else the bundled one of the category."""
        named = self.probes or f"data/policy/tier_one/{self.category}.jsonl"
        return (named,) if isinstance(named, str) else tuple(named)


class RequirementRule(Section):
    """A property that every answer has; exactly one of the properties is stated."""

    id: str = Field(min_length=1, description="Name of the rule, unique over all documents.")
    kind: Literal["requirement"] = Field(description="restriction, requirement or preference.")
    must_include: str | None = Field(None, min_length=1, description="Text that an answer contains.")
    max_words: int | None = Field(None, ge=1, description="Words that an answer has at most.")
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$", description="ISO 639 code of the answer's language.")
    regex: str | None = Field(None, min_length=1, description="Pattern (Python's re) found somewhere in an answer.")
    judge: str | None = Field(None, min_length=1, description="Sentence that a judge finds true of an answer.")

    @property
    def property(self) -> tuple[str, str | int]:
        """The stated property and its value."""
        return next((name, value) for name, value in self._stated())

    def _stated(self) -> Iterator[tuple[str, str | int]]:
        for name in ("must_include", "max_words", "language", "regex", "judge"):
            value = getattr(self, name)
            if value is not None:
                yield name, value

    @model_validator(mode="after")
    def _one_property(self) -> RequirementRule:
        if len(list(self._stated())) != 1:
            raise ValueError("states exactly one of must_include, max_words, language, regex and judge")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as fault:
                raise ValueError(f"the regex does not compile ({fault})") from None
        return self


class PreferenceRule(Section):
    """A user's written-down taste; his pairs say the rest."""

    id: str = Field(min_length=1, description="Name of the rule, unique over all documents.")
    kind: Literal["preference"] = Field(description="restriction, requirement or preference.")
    aspect: str = Field(min_length=1, description="The personalisable aspect that it is about, such as length.")
    statement: str = Field(min_length=1, description="The taste in a sentence.")


Rule = RestrictionRule | RequirementRule | PreferenceRule
_KINDS: dict[str, type[Rule]] = {
    "restriction": RestrictionRule,
    "requirement": RequirementRule,
    "preference": PreferenceRule,
}


class _Head(Section):
    """A document but for its rules, which are checked one by one, each by its kind."""

    tier: Tier = Field(description="one, two or three: whose rules these are.")
    issuer: Issuer = Field(description="Who speaks, such as {role: model_provider, name: Example Lab}.")
    version: str = Field(min_length=1, description="Version of the document.")
    certify: Certify | None = Field(None, description="The bound asked of the gate; tier one states it.")
    aspects: Aspects | None = Field(None, description="What may be tailored at all.")
    rules: list[dict[str, object]] = Field(description="The rules: restriction, requirement or preference.")


class PlacedRule(NamedTuple):
    """A rule and its index among the written ones."""

    at: int
    rule: Rule


@dataclass(frozen=True)
class PolicyDocument:
    """A document whose head is right; `rules` are those that read well, `yaml` knows where each was written."""

    path: str
    tier: int
    issuer: Issuer
    version: str
    certify: Certify | None
    aspects: Aspects
    rules: tuple[PlacedRule, ...]
    sha256: str
    yaml: Document

    def problem(self, path: KeyPath, sentence: str) -> Problem:
        """A problem with what stands at a key path of this document."""
        place = self.yaml.place(path)
        return Problem(place.file, place.line, dotted(path), sentence)

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key path, for messages about two documents."""
        place = self.yaml.place(path)
        return place.file if place.line is None else f"{place.file}:{place.line}"

    def line(self, index: int) -> int:
        """The line on which a rule starts."""
        return self.yaml.place(("rules", index)).line or 0


def read_document(path: Path | str) -> tuple[PolicyDocument | None, list[Problem]]:
    """Reads a policy document, and every problem in it; there is none to return where its head cannot be read.

    A document with problems is returned too, so that what it says against a tier above shows in the same go.
    """
    try:
        file = find(path)
        document = read_yaml(file)
    except InputError as fault:
        return None, fault.problems
    head, problems = check_section(_Head, document)
    problems = [*document.problems, *problems]
    tree = document.tree
    assert isinstance(tree, dict)
    written = tree.get("rules")
    written = written if isinstance(written, list) else []
    rules: list[PlacedRule] = []
    for index, raw in enumerate(written):
        if isinstance(raw, dict):
            rule, faults = _rule(document, index, raw.get("kind"))
            problems += faults
            rules += [PlacedRule(index, rule)] if rule else []
    tier = tree.get("tier")
    if isinstance(tier, str) and tier in ROLE:
        problems += _tier_problems(document, tier, tree)
    problems += _twice(document, written)
    if head is None:
        return None, problems
    return PolicyDocument(
        path=str(path),
        tier=NUMBER[head.tier],
        issuer=head.issuer,
        version=head.version,
        certify=head.certify,
        aspects=head.aspects or Aspects(),
        rules=tuple(rules),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        yaml=document,
    ), problems


def _rule(document: Document, index: int, kind: object) -> tuple[Rule | None, list[Problem]]:
    at: KeyPath = ("rules", index)
    if isinstance(kind, str) and kind in _KINDS:
        return check_section(_KINDS[kind], document, at)
    place = document.place((*at, "kind"))
    hint = did_you_mean(kind, _KINDS) if isinstance(kind, str) else ""
    sentence = f"a rule has a kind: restriction, requirement or preference{hint}"
    return None, [Problem(place.file, place.line, dotted((*at, "kind")), sentence)]


def _tier_problems(document: Document, tier: str, tree: Mapping[str, object]) -> Iterator[Problem]:
    """What is well formed but not this tier's to say."""
    number = NUMBER[tier]

    def problem(path: KeyPath, sentence: str) -> Problem:
        place = document.place(path)
        return Problem(place.file, place.line, dotted(path), sentence)

    issuer = tree.get("issuer")
    if isinstance(issuer, dict):
        role = issuer.get("role")
        if role in ROLE.values() and role != ROLE[tier]:
            yield problem(("issuer", "role"), f"a tier-{tier} document is issued by `{ROLE[tier]}`, got `{role}`")
        if issuer.get("user_id") is not None and number != 3:
            yield problem(("issuer", "user_id"), "only the end user of a tier-three document has a user_id")
    if number == 1 and "certify" not in tree:
        sentence = "tier one states the bound it asks of the gate, such as certify: {min_refusal: 0.97, delta: 0.05}"
        yield problem((), sentence)
    rules = tree.get("rules")
    for index, raw in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(raw, dict):
            continue
        kind, path = raw.get("kind"), ("rules", index, "kind")
        if kind == "preference" and number != 3:
            yield problem(path, "preferences belong to tier three; state a restriction or a requirement here")
        if kind in ("restriction", "requirement") and number == 3:
            yield problem(path, f"tier three holds preferences only; a {kind} belongs to tier one or two")


def _twice(document: Document, rules: Sequence[object]) -> Iterator[Problem]:
    """Rules that share an id, and restrictions that share a category."""
    seen: dict[tuple[str, object], int] = {}
    for index, raw in enumerate(rules):
        if not isinstance(raw, dict):
            continue
        for key in ("id", "category"):
            value = raw.get(key)
            if not isinstance(value, str) or (key == "category" and raw.get("kind") != "restriction"):
                continue
            first = seen.setdefault((key, value), index)
            if first != index:
                place = document.place(("rules", index, key))
                line = document.place(("rules", first, key)).line
                sentence = f"`{value}` stands in a rule on line {line} already; each {key} has one rule"
                yield Problem(place.file, place.line, dotted(("rules", index, key)), sentence)
