"""What a prompt is about: topics told by their words, from a table."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from persona_rlhf.inputs.section import Section, read_section
from persona_rlhf.inputs.yaml_text import read_yaml
from persona_rlhf.policy.likeness import plain


class _Table(Section):
    topics: dict[str, list[str]]


def topic_names() -> tuple[str, ...]:
    """The topics that can be told."""
    return tuple(_patterns())


def about(topic: str, text: str) -> bool:
    """Whether a word of the topic is found in a text, in any case and without accents. Raises KeyError for another."""
    return _patterns()[topic].search(plain(text)) is not None


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    table = read_section(_Table, read_yaml(Path(__file__).with_suffix(".yaml")))
    return {name: re.compile(rf"\b(?:{'|'.join(words)})\b") for name, words in table.topics.items()}
