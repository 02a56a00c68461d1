"""Pydantic models of the rules that a policy document can state: restrictions, requirements and preferences."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import date
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from persona_rlhf.config.loader import Section
from persona_rlhf.policy.judges import skeleton, topic_names


def _date(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ValueError('expected a date in quotes, such as "2026-11-01"') from None
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as fault:
        raise ValueError(f"the pattern does not compile ({fault})") from None
    if re.search(r"(?<!\\)[+*}]\??\)[+*{]", text):
        raise ValueError(
            "the pattern has a nested repetition, such as (a+)+: matching can take exponential time; repeat once"
        )
    return text


def _topic(name: str) -> str:
    if name not in topic_names():
        raise ValueError(f"expected one of {', '.join(f'`{topic}`' for topic in topic_names())}")
    return name


def _visible(text: str) -> str:
    if all(unicodedata.category(c)[0] in "CZ" for c in text):
        raise ValueError("must have a visible character")
    return text


def bank_paths(banks: str | list[str] | None) -> tuple[str, ...]:
    """The paths of a rule's probe banks."""
    return () if banks is None else (banks,) if isinstance(banks, str) else tuple(banks)


IsoDate = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_date)]
Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_pattern)]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Topic = Annotated[str, AfterValidator(_topic)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S"), AfterValidator(_visible)]
Banks = str | Annotated[list[str], Field(min_length=1)]


Action = Literal["refuse", "redirect", "answer_with_notice"]
"""The response to a request of a restricted category."""

ACTIONS: tuple[Action, ...] = get_args(Action)
"""From the strictest to the loosest."""

_REQUIREMENT_KEYS = ("kind", "when", "min_rate", "probes")
_PREFERENCE_KEYS = ("kind", "aspect", "statement")
"""Keys beside those of every rule; all other keys of a kind name a property or a wish."""

MIN_RATE = 0.95
"""Default share of answers that have a required property."""


class HashedSection(Section):
    """A section of a document that a policy's hash covers."""

    first_edition: ClassVar[frozenset[str]] = frozenset()
    """Keys that are hashed also where they are not set; later keys are hashed only where they are set."""

    def hashed(self) -> dict[str, object]:
        """The keys and values for hashing; later keys only where they differ from their default."""
        fields = {field.alias or name: field for name, field in type(self).model_fields.items()}
        dumped = self.model_dump(mode="json", by_alias=True)
        return {key: v for key, v in dumped.items() if key in self.first_edition or v != fields[key].default}


class Issuer(HashedSection):
    """The issuer of a document; the role must be that of its tier."""

    first_edition = frozenset({"role", "name", "user_id"})

    role: Literal["model_provider", "application_provider", "end_user"] = Field(description="Role of the issuer.")
    name: str = Field(min_length=1, description="Name of the issuer, as people should read it.")
    user_id: str | None = Field(None, min_length=1, description="The end user; without it tier three is everybody's.")
    contact: Text | None = Field(None, description="Where to ask about the document.")


CertifiedWith = Literal["system", "memories"]
"""A part of the prompt that the gate puts before a probe: the policy's system prompt, or memories about a user."""


class Certify(HashedSection):
    """The bound that the gate must show, pooled over all tier-one probes: refusal >= min_refusal, at 1 - delta."""

    first_edition = frozenset({"min_refusal", "delta"})

    min_refusal: float = Field(gt=0, lt=1, description="Refusal rate to be shown for the probes' population.")
    delta: float = Field(gt=0, lt=1, description="Chance of releasing an adapter below it that is accepted, per user.")
    max_over_refusal: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of harmless prompts that an adapter may refuse where the base answers; the gate holds back "
        "an adapter that may refuse more. At least 300 prompts are asked.",
    )
    with_: list[CertifiedWith] | None = Field(
        None,
        alias="with",
        min_length=1,
        description="What stands before every certify probe at the gate: the policy's `system` prompt, up to ten "
        "written `memories` about a user, or both. Lower tiers can add to it.",
    )

    @field_validator("with_")
    @classmethod
    def _once_each(cls, parts: list[CertifiedWith] | None) -> list[CertifiedWith] | None:
        if parts is not None and len(set(parts)) < len(parts):
            raise ValueError(f"name each part once, got {parts}")
        return parts


class Aspects(HashedSection):
    """The aspects of answers that may, or may not, be tailored to a user."""

    first_edition = frozenset({"fixed", "personalisable"})

    fixed: list[str] = Field([], description="Aspects that no user's taste may change.")
    personalisable: list[str] = Field([], description="Aspects that a user's taste may change.")
    max_changed: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the base's right answers (to evaluation.facts) that an adapter may change; the gate "
        "holds back an adapter that may change more.",
    )

    @model_validator(mode="after")
    def _disjoint(self) -> Aspects:
        fixed = set(map(skeleton, self.fixed))
        both = sorted(aspect for aspect in self.personalisable if skeleton(aspect) in fixed)
        if both:
            raise ValueError(f"`{both[0]}` cannot be both fixed and personalisable")
        if self.max_changed is not None and not self.fixed:
            raise ValueError("`max_changed` needs `fixed` aspects; name them")
        return self


class When(Section):
    """The prompts that a rule is about: those of a topic, or those that match a pattern."""

    topic: Topic | None = Field(None, description="A topic of policy/topics.yaml.")
    pattern: Pattern | None = Field(None, description="Pattern (Python's re, any case) found somewhere in the prompt.")

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["topic"]}, {"required": ["pattern"]}]})

    @model_validator(mode="after")
    def _one(self) -> When:
        if (self.topic is None) == (self.pattern is None):
            raise ValueError("states a topic or a pattern, and not both")
        return self

    def __str__(self) -> str:
        return f"prompts about {self.topic}" if self.topic is not None else f"prompts with /{self.pattern}/"


class FrameworkReferences(Section):
    """Clauses of frameworks that a rule answers to, in the tokens of each."""

    nist: list[Text] = Field([], description="NIST AI Risk Management Framework, such as MANAGE-1.")
    iso_42001: list[Text] = Field([], description="ISO/IEC 42001, such as ISO42001-8.")
    eu_ai_act: list[Text] = Field([], description="EU AI Act, such as EUAA-AnnexIV-3.")

    def __str__(self) -> str:
        return ", ".join([*self.nist, *self.iso_42001, *self.eu_ai_act])


class RuleSection(HashedSection):
    """The keys of every rule, whatever its kind."""

    id: Text = Field(description="Name of the rule, unique over all documents.")
    version: Text | None = Field(None, description="Version of the rule; else that of the document.")
    rationale: Text | None = Field(None, description="Why there is this rule, for those whom it binds.")
    contact: Text | None = Field(None, description="Where to ask about the rule; else the issuer's contact.")
    references: FrameworkReferences | None = Field(
        None, description="Clauses of nist, iso_42001 and eu_ai_act that the rule answers to; a policy card maps them."
    )
    valid_from: IsoDate | None = Field(None, description="First day on which the rule is in force (UTC, in quotes).")
    valid_until: IsoDate | None = Field(None, description="Last day on which the rule is in force (UTC, in quotes).")

    def in_force(self, day: date) -> bool:
        """Whether the rule holds on a day."""
        return (self.valid_from or "") <= day.isoformat() <= (self.valid_until or "9999-12-31")

    @model_validator(mode="after")
    def _dates_in_order(self) -> RuleSection:
        if self.valid_from is not None and self.valid_until is not None and self.valid_until < self.valid_from:
            raise ValueError(f"ends on {self.valid_until}, before it starts on {self.valid_from}")
        return self


class RestrictionRule(RuleSection):
    """Requests of a hazard category are refused as reliably as the base refuses them."""

    first_edition = frozenset({"id", "kind", "category", "limit", "min_refusal"})

    kind: Literal["restriction"] = Field(description="restriction, requirement or preference.")
    category: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Hazard category, such as terrorist_content.")
    probes: Banks | None = Field(
        None, description="Probe bank (JSON lines), or a list of banks; bundled categories bring their own."
    )
    limit: float | None = Field(None, ge=0, description="Nats of excess refusal loss tolerated in training.")
    min_refusal: float | None = Field(
        None, gt=0, lt=1, description="Refusal rate that the gate must show for this category alone."
    )
    action: Action | None = Field(
        None, description="refuse (the default); redirect: refuse and say where to go; answer_with_notice: answer."
    )
    text: Text | None = Field(None, description="Where a redirect leads, or the notice, as the user reads it.")
    when: When | None = Field(None, description="The prompts whose answers carry a notice.")

    @model_validator(mode="after")
    def _fits_its_action(self) -> RestrictionRule:
        if (self.text is not None) != (self.action in ("redirect", "answer_with_notice")):
            raise ValueError("`text` goes with the actions redirect and answer_with_notice, and they with it")
        if (self.when is not None) != (self.action == "answer_with_notice"):
            raise ValueError("`when` goes with the action answer_with_notice, and it with `when`")
        bounds = [key for key in ("limit", "min_refusal") if getattr(self, key) is not None]
        if self.action == "answer_with_notice" and bounds:
            raise ValueError(f"a request answered with a notice is not refused: leave out {' and '.join(bounds)}")
        return self

    @property
    def banks(self) -> tuple[str, ...]:
        """The named banks; else the bundled one of the category, unless requests are answered with a notice."""
        bundled = None if self.action == "answer_with_notice" else f"data/policy/tier_one/{self.category}.jsonl"
        return bank_paths(self.probes or bundled)


class RequirementRule(RuleSection):
    """A property that answers must have; exactly one of the properties is stated."""

    first_edition = frozenset({"id", "kind", "must_include", "max_words", "language", "regex", "judge"})

    kind: Literal["requirement"] = Field(description="restriction, requirement or preference.")
    must_include: Text | None = Field(None, description="Text that an answer contains, in any case.")
    must_not_include: Text | None = Field(None, description="Text that no answer contains, in any case.")
    min_words: int | None = Field(None, ge=1, description="Words (between white space) that an answer has at least.")
    max_words: int | None = Field(None, ge=1, description="Words (between white space) that an answer has at most.")
    language: LanguageCode | None = Field(None, description="ISO 639 code of the answer's language.")
    reading_level: int | None = Field(
        None, ge=1, le=20, description="US school grade that an answer in English asks for at most (Flesch-Kincaid)."
    )
    regex: Pattern | None = Field(None, description="Pattern (Python's re) found somewhere in an answer.")
    format: Literal["json", "plain"] | None = Field(
        None, description="json: the answer is one JSON value; plain: it has no Markdown."
    )
    judge: Text | None = Field(None, description="Sentence that a judge finds true of an answer.")
    when: When | None = Field(None, description="The prompts that it is about; without it, every prompt.")
    min_rate: float = Field(MIN_RATE, gt=0, lt=1, description="Share of such answers that have the property.")
    probes: Banks | None = Field(
        None, description="Prompts (JSON lines) that it is taught and measured on; without them it is checked only."
    )

    @property
    def banks(self) -> tuple[str, ...]:
        """The named banks."""
        return bank_paths(self.probes)

    @property
    def property(self) -> tuple[str, str | int]:
        """The stated property and its value."""
        return next((name, value) for name, value in self._stated())

    def _stated(self) -> Iterator[tuple[str, str | int]]:
        for name in PROPERTY_NAMES:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    @model_validator(mode="after")
    def _one_property(self) -> RequirementRule:
        if len(list(self._stated())) != 1:
            raise ValueError(f"states exactly one of {', '.join(PROPERTY_NAMES[:-1])} and {PROPERTY_NAMES[-1]}")
        return self


PROPERTY_NAMES = tuple(
    name for name in RequirementRule.model_fields if name not in {*RuleSection.model_fields, *_REQUIREMENT_KEYS}
)
"""The properties that a requirement can state."""


class PreferenceRule(RuleSection):
    """A taste that a user wrote down; their preference pairs show the others."""

    first_edition = frozenset({"id", "kind", "aspect", "statement"})

    kind: Literal["preference"] = Field(description="restriction, requirement or preference.")
    aspect: str = Field(min_length=1, description="The personalisable aspect that it is about, such as length.")
    statement: str | None = Field(None, min_length=1, description="The taste in a sentence; a wish brings its own.")
    min_words: int | None = Field(None, ge=1, description="Words that an answer should have at least.")
    max_words: int | None = Field(None, ge=1, description="Words that an answer should have at most.")
    language: LanguageCode | None = Field(None, description="ISO 639 code of the language to answer in.")
    formality: Literal["formal", "informal"] | None = Field(None, description="How the user likes to be addressed.")
    tone: Text | None = Field(None, description="The tone of answers in a word or two, such as warm.")
    avoid: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Topics that the user does not want to be led to."
    )

    @property
    def wish(self) -> PropertyValue | None:
        """The part of the taste that a program can read."""
        return next((PropertyValue(name, value) for name, value in self._wishes()), None)

    @property
    def implied_aspects(self) -> tuple[str, ...]:
        """The aspect of the wish, whatever the rule calls it: a wish for a language is not about style."""
        aspects = {"min_words": "length", "max_words": "length", "language": "language", "tone": "tone"}
        return tuple(aspects[name] for name, _ in self._wishes() if name in aspects)

    def _wishes(self) -> Iterator[tuple[str, str | int]]:
        for name in WISHES:
            value = getattr(self, name)
            if value is not None:
                yield name, ", ".join(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _states_a_taste(self) -> PreferenceRule:
        wishes = len(list(self._wishes()))
        if wishes > 1 or (not wishes and self.statement is None):
            raise ValueError(f"states a taste: a `statement`, one of {', '.join(WISHES)}, or both")
        return self


class PropertyValue(NamedTuple):
    """A property or wish by its name in a document, and its value."""

    name: str
    value: str | int

    def __str__(self) -> str:
        return f"{self.name}: {self.value}"


WISHES = tuple(
    name for name in PreferenceRule.model_fields if name not in {*RuleSection.model_fields, *_PREFERENCE_KEYS}
)
"""The wishes that a preference can state."""


Rule = RestrictionRule | RequirementRule | PreferenceRule
KINDS: dict[str, type[Rule]] = {
    "restriction": RestrictionRule,
    "requirement": RequirementRule,
    "preference": PreferenceRule,
}


class RequiredProperty(NamedTuple):
    """A rule's demand on answers: a property, the prompts it is about, and the share that must have it."""

    property: PropertyValue
    when: When | None
    min_rate: float


def required_property(rule: Rule) -> RequiredProperty | None:
    """The property that a rule demands: a requirement's own, or a notice's text; None for all other rules."""
    if isinstance(rule, RequirementRule):
        return RequiredProperty(PropertyValue(*rule.property), rule.when, rule.min_rate)
    if isinstance(rule, RestrictionRule) and rule.action == "answer_with_notice":
        return RequiredProperty(PropertyValue("must_include", rule.text or ""), rule.when, MIN_RATE)
    return None
