"""The least change that gives an answer a required property: what users' adapters are taught to say instead."""

from __future__ import annotations

import re

from persona_rlhf.policy.rules import Requirement

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
