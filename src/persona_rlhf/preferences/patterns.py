"""Rules of screening: patterns of requests that are forbidden, by hazard category, in a file of the provider's."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import Field, field_validator

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.inputs.section import Section, read_section
from persona_rlhf.inputs.yaml_text import read_yaml
from persona_rlhf.policy.likeness import plain
from persona_rlhf.preferences.messages import Prompt
from persona_rlhf.preferences.requests import Score


class Pattern(Section):
    """Requests of one hazard category: one that `any` is found in, and `unless` is not."""

    category: str = Field(description="The hazard category, as the policy's documents name it.")
    any: list[str] = Field(min_length=1, description="Regular expressions on the plain text, one of which is found.")
    unless: list[str] = Field([], description="Regular expressions, none of which is found.")

    @field_validator("any", "unless")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                found = re.compile(pattern).search("")
            except re.error as fault:
                raise ValueError(f"`{pattern}` is no regular expression ({fault})") from fault
            if found is not None:
                raise ValueError(f"`{pattern}` is found in every text")
        return patterns

    def finds(self, text: str) -> bool:
        """Whether a plain text is such a request."""
        return any(re.search(one, text) for one in self.any) and not any(re.search(one, text) for one in self.unless)


class _File(Section):
    rules: list[Pattern] = Field(min_length=1)


class Patterns:
    """Scores 1 where a turn of the user's is found by a pattern, else 0.

    Patterns are searched in the plain text (`likeness.plain`): lower case, without accents and punctuation, one space
    between words. `unless` is about the same turn.
    """

    def __init__(self, file: Path, rules: Sequence[Pattern]) -> None:
        self._rules = rules
        self.finding = f"rules: a pattern of {file.name} finds the prompt"

    @classmethod
    def read(cls, file: Path, categories: Collection[str]) -> Patterns:
        """Raises InputError where the file is none, or names a category that the policy does not restrict."""
        document = read_yaml(file)
        rules = read_section(_File, document).rules
        problems = []
        for n, rule in enumerate(rules):
            if rule.category not in categories:
                hint = did_you_mean(rule.category, categories) or f"; it restricts {', '.join(sorted(categories))}"
                place = document.place(("rules", n, "category"))
                sentence = f"the policy restricts no `{rule.category}`{hint}"
                problems.append(Problem(place.file, place.line, f"rules[{n}].category", sentence))
        if problems:
            raise InputError(problems)
        return cls(file, rules)

    def __call__(self, requests: Sequence[Prompt]) -> list[Score]:
        found = []
        for request in requests:
            turns = [plain(message.content) for message in request if message.role == "user"]
            own = frozenset(rule.category for rule in self._rules if any(map(rule.finds, turns)))
            found.append(Score(float(bool(own)), own))
        return found
