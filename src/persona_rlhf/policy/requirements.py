"""Has an answer the property that a rule requires? Text in, verdict out; what only a judge can tell is left open."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import assert_never, cast

from persona_rlhf.policy.languages import known_languages, language_of
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.policy.statements import Property
from persona_rlhf.policy.topics import about

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
    name, value = cast(Property, requirement.property), requirement.value
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
