"""The table of preference sets that `data import` reads: the column of each role, in preference_sets.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.loader import Section, read_section, read_yaml

_ROLES = ("user", "id", "time", "each", "prompt", "choice", "score", "ranking", "chosen", "rejected", "text")


class PreferenceSet(Section):
    """The columns of a set; the head of preference_sets.yaml explains paths and keys."""

    name: str = Field(min_length=1, description="Name of the set on our command line.")
    title: str = Field(min_length=1, description="The name and authors of the set, or the program that wrote the file.")
    url: str | None = Field(None, description="Where it comes from.")
    licence: str = Field(min_length=1, description="The licence of its texts.")
    user: list[str] = Field([], description="Paths of the person's id: the first of these that a row has.")
    user_name: str | None = Field(None, description="The person's id as it stands, for all rows.")
    id: str | None = Field(None, description="Path of the row's id.")
    time: list[str] = Field([], description="Paths of the time: ISO 8601, or seconds since 1970.")
    split: str | None = Field(None, description="Path of the split.")
    splits: dict[str, Literal["train", "heldout"]] = Field({}, description="Their split -> ours.")
    each: list[str] | str | None = Field(None, description="Names of a row's judgements, or the path of their list.")
    thread: str | None = Field(None, description="Path of messages in which answers follow each user's message.")
    turns: bool = Field(False, description="Whether the judgements are the turns of one conversation.")
    prompt: str | None = Field(None, description="Path of the prompt; None if the answers are whole conversations.")
    template: str | None = Field(None, description="The prompt as a text with paths in braces.")
    answers: list[str] | str = Field([], description="Names of the answers, or the path of their list.")
    in_order: bool = Field(False, description="Whether `answers` are in the order in which people saw them.")
    text: str | None = Field(None, description="Path of an answer's text.")
    texts: dict[str, str] = Field({}, description="Name of an answer -> path of its text, in place of `text`.")
    choice: str | None = Field(None, description="Path of the preferred answer's name.")
    labels: dict[str, str | None] = Field({}, description="Value of `choice` -> name of an answer, or null for a tie.")
    score: str | None = Field(None, description="Path of an answer's score; higher is better.")
    continued: str | None = Field(None, description="Path that is true for the answer after which a thread goes on.")
    ranking: str | None = Field(None, description="Path of the names of the answers, the best one first.")
    chosen: str | None = Field(None, description="Path of the chosen answer.")
    rejected: str | None = Field(None, description="Path of the rejected answer.")
    transcript: bool = Field(False, description="Whether answers are texts with `Human:` and `Assistant:` turns.")
    roles: dict[str, str] = Field({}, description="Their role of a message -> ours.")
    gathered: bool = Field(False, description="Whether a row holds one answer, and rows belong together.")
    gap: float = Field(0.0, ge=0, description="The smallest difference of two scores that is a preference.")
    blank: list[str] = Field([], description="Texts that stand for an empty answer.")
    remove: list[str] = Field([], description="Texts that are cut out of answers.")
    strip: bool = Field(False, description="Whether spaces around answers are cut off.")

    def with_columns(self, columns: Mapping[str, str]) -> PreferenceSet:
        """The set with other columns for some roles, or for answers by name. Raises InputError for an unknown role."""
        names = self.answers if isinstance(self.answers, list) else []
        roles = [*(role for role in _ROLES if getattr(self, role)), *names]
        problems = [
            Problem("data import", None, "--column", f"`{self.name}` has no role `{role}`{hint}")
            for role in columns
            if role not in roles
            for hint in (did_you_mean(role, roles) or f"; its roles are {', '.join(roles)}",)
        ]
        if problems:
            raise InputError(problems)
        changed: dict[str, object] = {role: path for role, path in columns.items() if role not in names}
        changed |= {role: [columns[role]] for role in ("user", "time") if role in columns}
        texts = {name: path for name, path in columns.items() if name in names}
        return self.model_copy(update={**changed, "texts": {**self.texts, **texts}})

    @property
    def roles_of_columns(self) -> dict[str, str]:
        """Each role with its path, as the output names them."""
        roles = {role: getattr(self, role) for role in ("prompt", "template", "text", *_ROLES, "split", "thread")}
        named = {role: ", ".join(path) if isinstance(path, list) else path for role, path in roles.items() if path}
        return named | ({"user": self.user_name} if self.user_name else {}) | self.texts


class _PreferenceSets(Section):
    sets: list[PreferenceSet]


@cache
def preference_sets() -> Mapping[str, PreferenceSet]:
    """All sets of the table, by name."""
    table = read_section(_PreferenceSets, read_yaml(Path(__file__).with_name("preference_sets.yaml")))
    return {one.name: one for one in table.sets}


def value_at(row: object, path: str) -> object:
    """The value at a path of nested objects and lists; None where there is none.

    A step is a key, the index of a list's item, or `[key=value]`, the first item of a list with this value. A column
    whose name is the whole path comes first.
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list | tuple) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        elif isinstance(value, list | tuple) and step.startswith("["):
            key, _, wanted = step[1:-1].partition("=")
            value = next((item for item in value if isinstance(item, Mapping) and item.get(key) == wanted), None)
        else:
            return None
    return value
