"""ONE table of requirement properties: check, repair, conflicts, ordering, prompt wording, enforcement stage."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple, assert_never, cast

from persona_rlhf.policy.judges import about, known_languages, language_of
from persona_rlhf.policy.rule_schema import PropertyName, PropertyValue
from persona_rlhf.policy.rules import Preference, Requirement

# ----------------------------------------------------------------------------------------------------
# Has an answer the property that a rule requires? Text in, verdict out; what only a judge can tell is left open.
# ----------------------------------------------------------------------------------------------------

_MARKDOWN = re.compile(
    r"^ {0,3}(?:#{1,6}\s|[-*+]\s+\S|\d{1,9}[.)]\s+\S|>\s?\S|```|~~~|\|.*\|\s*$)"  # block by block
    r"|\*\*\S|__\S.*\S__|`[^`\n]+`|!?\[[^\]\n]*\]\([^)\n]+\)",
    re.MULTILINE,
)
_VOWELS = re.compile(r"[aeiouy]+")


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
    """Whether a program can tell: a judge's sentence it cannot, nor a language that is not in languages.yaml."""
    if requirement.property == "language":
        return requirement.value in known_languages()
    return requirement.property != "judge"


def satisfied(requirement: Requirement, prompt: str, answer: str) -> bool | None:
    """Whether the answer has the property; None where the rule is not about this prompt, or only a judge could tell.

    An answer too short to tell its language by is None as well. Texts are compared in any case and width (NFKC,
    casefold), without invisible characters, white space as single spaces; words are what stands between white space.
    """
    if not applies(requirement, prompt) or not checkable(requirement):
        return None
    name, value = cast(PropertyName, requirement.property), requirement.value
    match name:
        case "must_include":
            return folded(str(value)) in folded(answer)
        case "must_not_include":
            return folded(str(value)) not in folded(answer)
        case "min_words":
            return len(answer.split()) >= int(value)
        case "max_words":
            return len(answer.split()) <= int(value)
        case "language":
            found = language_of(answer)
            return None if found is None else found == value
        case "reading_level":
            return reading_grade(answer) <= int(value)
        case "regex":
            return re.search(str(value), answer) is not None
        case "format":
            return _is_json(answer) if value == "json" else _MARKDOWN.search(answer) is None
        case "judge":
            return None
    assert_never(name)


def folded(text: str) -> str:
    """A text as it is compared: in any case and width, without invisible characters, white space as single spaces."""
    seen = "".join(c for c in text if unicodedata.category(c) != "Cf")  # a zero-width space hides no word
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold()).split())


def reading_grade(text: str) -> float:
    """US school grade of an English text: 0.39 words/sentence + 11.8 syllables/word - 15.59; 0 without words.

    Flesch-Kincaid (Kincaid et al. 1975), with vowel groups for syllables, a silent final e left out.
    """
    words = re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", text.casefold())
    if not words:
        return 0.0
    sentences = sum(1 for part in re.split(r"[.!?]+(?:\s|$)|\n{2,}", text) if re.search(r"[^\W\d_]", part))
    syllables = sum(max(1, len(_VOWELS.findall(re.sub(r"(?<![aeiouyl])e$", "", word)))) for word in words)
    return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ----------------------------------------------------------------------------------------------------
# Properties that no answer has together; and the users' wishes that a requirement above them overrules.
# ----------------------------------------------------------------------------------------------------


class Overruled(NamedTuple):
    """A user's wish that gives way to a requirement, and a sentence that tells him so."""

    preference: str
    requirement: str
    sentence: str


def contradict(one: PropertyValue, other: PropertyValue) -> bool:
    """Whether no answer can have both properties; True only where that is certain. Symmetric."""
    return _excludes(one, other) or _excludes(other, one)


def looser(one: PropertyValue, other: PropertyValue) -> bool:
    """Whether the other asks less of the same answers than the one does."""
    match one.name, other.name:
        case ("max_words", "max_words") | ("reading_level", "reading_level"):
            return int(other.value) > int(one.value)
        case "min_words", "min_words":
            return int(other.value) < int(one.value)
    return False


def _excludes(one: PropertyValue, other: PropertyValue) -> bool:
    match one.name, other.name:
        case "max_words", "min_words":
            return int(one.value) < int(other.value)
        case "max_words", "must_include":
            return int(one.value) < len(str(other.value).split())
        case "must_not_include", "must_include":
            return folded(str(one.value)) in folded(str(other.value))
        case "language", "language":
            return one.value != other.value
    return False


def standing(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> list[Preference]:
    """The tastes that no requirement overrules."""
    lost = {found.preference for found in overruled(preferences, requirements)}
    return [taste for taste in preferences if taste.id not in lost]


def overruled(preferences: Sequence[Preference], requirements: Sequence[Requirement]) -> Iterator[Overruled]:
    """Every wish that a requirement contradicts. The requirement holds; the user is told whose it is and where."""
    for taste in preferences:
        for rule in requirements:
            if taste.wish is None or not contradict(taste.wish, PropertyValue(rule.property, rule.value)):
                continue
            where = f" for {rule.when}" if rule.when is not None else ""
            sentence = (
                f"You wish for `{taste.wish.name}: {taste.wish.value}` ({taste.id}), but {rule.source_name} requires "
                f"`{rule.property}: {rule.value}`{where} ({rule.id}, {rule.document}:{rule.line}), which stands above "
                "a user's wish, so answers follow that."
            )
            yield Overruled(taste.id, rule.id, sentence)


# ----------------------------------------------------------------------------------------------------
# The least change that gives an answer a required property: what users' adapters are taught to say instead.
# ----------------------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"\S.*?(?:(?<!\s\d)(?<!^\d)[.!?…]+[\"')\]]*(?=\s|$)|$)", re.DOTALL)  # `2.` ends none
REPAIRED = ("must_include", "must_not_include", "max_words")
"""Properties that a small change of an answer gives it. The others are measured and checked, not taught."""


def repaired(requirement: Requirement, answer: str) -> str | None:
    """An answer that lacks the property, with it; None where no small change gives it.

    A text that must be there comes first; one that must not is left out (an exclamation or question mark makes way for
    a full stop); of too many words, the first whole sentences stay.
    """
    value = requirement.value
    match requirement.property:
        case "must_include":
            return f"{value} {answer.lstrip()}".rstrip()
        case "must_not_include":
            return _without(str(value), answer) or None
        case "max_words":
            return _first_sentences(answer, int(value))
    return None


def _without(text: str, answer: str) -> str:
    ends_sentence = re.fullmatch(r"[!?]+", text) is not None
    if ends_sentence:
        return re.sub(rf"(?:{re.escape(text)})+(?P<next>[.?!]?)", lambda found: found["next"] or ".", answer)
    less = re.sub(re.escape(text), "", answer, flags=re.IGNORECASE)
    return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r" {2,}", " ", less)).strip()


def _first_sentences(answer: str, words: int) -> str:
    kept, count = "", 0
    for found in _SENTENCE.finditer(answer):
        count += len(found.group().split())
        if count > words:
            break
        kept = answer[: found.end()]
    return kept or " ".join(answer.split()[:words]).rstrip(",;:") + "."
