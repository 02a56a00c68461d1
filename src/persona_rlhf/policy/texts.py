"""The kinds of text that a policy document holds: dates, patterns, languages, topics, words for people, banks."""

from __future__ import annotations

import re
import unicodedata
from datetime import date
from typing import Annotated

from pydantic import AfterValidator, Field

from persona_rlhf.policy.topics import topic_names


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
        raise ValueError("the pattern repeats a repetition, such as (a+)+, and might never end; say it once")
    return text


def _topic(name: str) -> str:
    if name not in topic_names():
        raise ValueError(f"expected one of {', '.join(f'`{known}`' for known in topic_names())}")
    return name


def _seen(text: str) -> str:
    if all(unicodedata.category(c)[0] in "CZ" for c in text):
        raise ValueError("must hold something that can be seen")
    return text


def listed(banks: str | list[str] | None) -> tuple[str, ...]:
    """The banks that a rule names."""
    return () if banks is None else (banks,) if isinstance(banks, str) else tuple(banks)


IsoDate = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_date)]
Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_pattern)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Topic = Annotated[str, AfterValidator(_topic)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S"), AfterValidator(_seen)]
Banks = str | Annotated[list[str], Field(min_length=1)]
