"""Properties of answers: one class each, with its check, repair, order, conflicts, wording and stages."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from persona_rlhf.policy.judges import (
    about,
    folded,
    has_markdown,
    is_json,
    known_languages,
    language_of,
    reading_grade,
    topic_names,
)
from persona_rlhf.policy.rule_schema import PropertyValue
from persona_rlhf.policy.rules import Requirement

Edit = Literal["prepend", "remove", "shorten"]
"""How a repair changes an answer: a text is put first, a text is taken out, the end is cut off."""

_SENTENCE = re.compile(r"\S.*?(?:(?<!\s\d)(?<!^\d)[.!?…]+[\"')\]]*(?=\s|$)|$)", re.DOTALL)  # `2.` ends none


@dataclass(frozen=True)
class AnswerProperty:
    """A property of an answer and its value, such as `max_words: 40`."""

    value: str | int
    name: ClassVar[str]

    @property
    def text(self) -> str:
        return str(self.value)

    @property
    def number(self) -> int:
        return int(self.value)

    def looser(self, other: AnswerProperty) -> bool:
        """Whether it demands less of the same answers than another value of the same property."""
        return False

    def excludes(self, other: AnswerProperty) -> bool:
        """Whether certainly no answer has both; one of the two classes says so."""
        return False


class RequirementProperty(AnswerProperty, ABC):
    """A property that a requirement can demand of answers."""

    stages: ClassVar[Literal["checked", "taught", "judged"]] = "checked"
    """Its row of `enforcement.yaml`."""
    edit: ClassVar[Edit | None] = None
    """How `repair` changes an answer; None where no small change gives the property, so that it is not taught."""

    @property
    def checkable(self) -> bool:
        """Whether a program can tell if an answer has the property."""
        return True

    @abstractmethod
    def check(self, answer: str) -> bool | None:
        """Whether an answer has the property; None where a program cannot tell."""

    @abstractmethod
    def wording(self) -> str:
        """The property as an instruction of a system prompt."""

    def repair(self, answer: str) -> str | None:
        """The answer with the least change that gives it the property; None where no small change does."""
        return None


class WishProperty(AnswerProperty, ABC):
    """A property that a user can wish for."""

    readable: ClassVar[bool] = True
    """Whether a program can tell how far an answer is from the wish."""

    @abstractmethod
    def liking(self) -> str:
        """The wish as a system prompt states it after `the user likes:`."""

    def distance(self, answer: str) -> float:
        """How far an answer is from the wish, from 0 (as wished)."""
        raise ValueError(f"no program can read `{self.name}` off a text")


class MustInclude(RequirementProperty):
    """A text that every answer contains, in any case and width."""

    name = "must_include"
    stages = "taught"
    edit = "prepend"

    def check(self, answer: str) -> bool:
        return folded(self.text) in folded(answer)

    def wording(self) -> str:
        return f'include the text "{self.value}".'

    def repair(self, answer: str) -> str:
        return f"{self.value} {answer.lstrip()}".rstrip()


class MustNotInclude(RequirementProperty):
    """A text that no answer contains, in any case and width."""

    name = "must_not_include"
    stages = "taught"
    edit = "remove"

    def check(self, answer: str) -> bool:
        return folded(self.text) not in folded(answer)

    def excludes(self, other: AnswerProperty) -> bool:
        return isinstance(other, MustInclude) and folded(self.text) in folded(other.text)

    def wording(self) -> str:
        return f'never write "{self.value}".'

    def repair(self, answer: str) -> str | None:
        """The answer without the text; an exclamation or question mark makes way for a full stop."""
        if re.fullmatch(r"[!?]+", self.text) is not None:
            marks = rf"(?:{re.escape(self.text)})+(?P<next>[.?!]?)"
            return re.sub(marks, lambda match: match["next"] or ".", answer) or None
        less = re.sub(re.escape(self.text), "", answer, flags=re.IGNORECASE)
        return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r" {2,}", " ", less)).strip() or None


class MinWords(RequirementProperty, WishProperty):
    """The fewest words (between white space) of an answer."""

    name = "min_words"

    def check(self, answer: str) -> bool:
        return len(answer.split()) >= self.number

    def looser(self, other: AnswerProperty) -> bool:
        return isinstance(other, MinWords) and self.number < other.number

    def wording(self) -> str:
        return f"use {self.liking()}"

    def liking(self) -> str:
        return f"at least {self.value} words."

    def distance(self, answer: str) -> float:
        """Missing words as a share of the number wished for."""
        return max(0, self.number - len(answer.split())) / self.number


class MaxWords(RequirementProperty, WishProperty):
    """The most words (between white space) of an answer."""

    name = "max_words"
    stages = "taught"
    edit = "shorten"

    def check(self, answer: str) -> bool:
        return len(answer.split()) <= self.number

    def looser(self, other: AnswerProperty) -> bool:
        return isinstance(other, MaxWords) and self.number > other.number

    def excludes(self, other: AnswerProperty) -> bool:
        if isinstance(other, MinWords):
            return self.number < other.number
        return isinstance(other, MustInclude) and self.number < len(other.text.split())

    def wording(self) -> str:
        return f"use {self.liking()}"

    def liking(self) -> str:
        return f"at most {self.value} words."

    def distance(self, answer: str) -> float:
        """Surplus words as a share of the number wished for."""
        return max(0, len(answer.split()) - self.number) / self.number

    def repair(self, answer: str) -> str:
        """The first whole sentences that fit; of a first sentence that does not fit, its first words."""
        kept, words = "", 0
        for sentence in _SENTENCE.finditer(answer):
            words += len(sentence.group().split())
            if words > self.number:
                break
            kept = answer[: sentence.end()]
        return kept or " ".join(answer.split()[: self.number]).rstrip(",;:") + "."


class Language(RequirementProperty, WishProperty):
    """The language of an answer, by its ISO 639 code."""

    name = "language"

    @property
    def checkable(self) -> bool:
        return self.value in known_languages()

    def check(self, answer: str) -> bool | None:
        """None for a language that is not in languages.yaml, and for an answer too short to tell."""
        language = language_of(answer) if self.checkable else None
        return None if language is None else language == self.value

    def excludes(self, other: AnswerProperty) -> bool:
        return isinstance(other, Language) and self.value != other.value

    def wording(self) -> str:
        return f"answer in the language with the ISO code {self.value}."

    def liking(self) -> str:
        return f"answers in the language with the ISO code {self.value}."

    def distance(self, answer: str) -> float:
        """1 for another language or an unrecognised one, else 0."""
        return float(language_of(answer) != self.value)


class ReadingLevel(RequirementProperty):
    """The highest US school grade that an English answer is written for."""

    name = "reading_level"

    def check(self, answer: str) -> bool:
        return reading_grade(answer) <= self.number

    def looser(self, other: AnswerProperty) -> bool:
        return isinstance(other, ReadingLevel) and self.number > other.number

    def wording(self) -> str:
        return f"write so that a pupil of grade {self.value} can read it."


class Regex(RequirementProperty):
    """A pattern that matches somewhere in an answer."""

    name = "regex"

    def check(self, answer: str) -> bool:
        return re.search(self.text, answer) is not None

    def wording(self) -> str:
        return f"the answer matches the regular expression {self.value}"


class Format(RequirementProperty):
    """The form of an answer: `json`, one JSON value; `plain`, a text without Markdown."""

    name = "format"

    def check(self, answer: str) -> bool:
        return is_json(answer) if self.value == "json" else not has_markdown(answer)

    def wording(self) -> str:
        return "answer with one JSON value only." if self.value == "json" else "use no Markdown."


class JudgedSentence(RequirementProperty):
    """A sentence that a judge finds true of an answer; no program checks it."""

    name = "judge"
    stages = "judged"

    @property
    def checkable(self) -> bool:
        return False

    def check(self, answer: str) -> None:
        return None

    def wording(self) -> str:
        return self.text


class Formality(WishProperty):
    """How a user wishes to be addressed."""

    name = "formality"
    readable = False

    def liking(self) -> str:
        return f"{self.value} words."


class Tone(WishProperty):
    """The tone that a user wishes for."""

    name = "tone"
    readable = False

    def liking(self) -> str:
        return f"a tone that is {self.value}."


class Avoid(WishProperty):
    """Topics that a user does not want to be led to."""

    name = "avoid"

    @property
    def topics(self) -> list[str]:
        return self.text.split(", ")

    def liking(self) -> str:
        return f"not to be led to: {self.value}."

    def distance(self, answer: str) -> float:
        """The share of these topics that an answer touches."""
        return sum(_touches(topic, answer) for topic in self.topics) / len(self.topics)


_REQUIREMENTS: tuple[type[RequirementProperty], ...] = (
    MustInclude, MustNotInclude, MinWords, MaxWords, Language, ReadingLevel, Regex, Format, JudgedSentence,
)  # fmt: skip
_WISHES: tuple[type[WishProperty], ...] = (MinWords, MaxWords, Language, Formality, Tone, Avoid)

REQUIREMENTS: dict[str, type[RequirementProperty]] = {kind.name: kind for kind in _REQUIREMENTS}
WISHED: dict[str, type[WishProperty]] = {kind.name: kind for kind in _WISHES}

REPAIRED = tuple(kind.name for kind in _REQUIREMENTS if kind.edit is not None)
"""Names of the properties that a small change gives an answer: they are taught. The others are measured and checked."""

READABLE = tuple(kind.name for kind in _WISHES if kind.readable)
"""Names of the wishes whose distance a program can tell. Formality and tone are for a reader to judge."""


def required(rule: Requirement) -> RequirementProperty:
    """The property that a requirement demands."""
    return REQUIREMENTS[rule.property](rule.value)


def wished(wish: PropertyValue) -> WishProperty:
    """The property that a user wishes for."""
    return WISHED[wish.name](wish.value)


def applies(requirement: Requirement, prompt: str) -> bool:
    """Whether a requirement is about the answer to this prompt (the last message of the user)."""
    when = requirement.when
    if when is None:
        return True
    if when.topic is not None:
        return about(when.topic, prompt)
    assert when.pattern is not None
    return re.search(when.pattern, prompt, re.IGNORECASE) is not None


def checkable(requirement: Requirement) -> bool:
    """Whether a program can check answers: not a judge's sentence, nor a language that is not in languages.yaml."""
    return required(requirement).checkable


def satisfied(requirement: Requirement, prompt: str, answer: str) -> bool | None:
    """Whether the answer has the property; None where the rule is not about this prompt or a program cannot tell."""
    return required(requirement).check(answer) if applies(requirement, prompt) else None


def repaired(requirement: Requirement, answer: str) -> str | None:
    """An answer that lacks the property, with the least change that gives it; None where no small change does."""
    return required(requirement).repair(answer)


def contradict(one: PropertyValue, other: PropertyValue) -> bool:
    """Whether no answer can have both properties; True only where that is certain. Symmetric."""
    first, second = _property(one), _property(other)
    return first.excludes(second) or second.excludes(first)


def looser(one: PropertyValue, other: PropertyValue) -> bool:
    """Whether the other demands less of the same answers than the one."""
    return _property(other).looser(_property(one))


def _property(stated: PropertyValue) -> AnswerProperty:
    kind: type[AnswerProperty] = REQUIREMENTS.get(stated.name) or WISHED[stated.name]
    return kind(stated.value)


def distance(wishes: Sequence[PropertyValue], answer: str) -> float:
    """The sum over wishes of the distance of an answer from each."""
    return sum(wished(wish).distance(answer) for wish in wishes)


def _touches(topic: str, answer: str) -> bool:
    return about(topic, answer) if topic in topic_names() else folded(topic) in folded(answer)
