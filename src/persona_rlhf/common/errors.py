"""Mistakes in the user's input: one sentence each, all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

_LONGEST_KEY = 120


class Problem(NamedTuple):
    """One mistake: the file, its line or None, the dotted key or column, and a sentence with the remedy."""

    file: str
    line: int | None
    key: str | None
    sentence: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return visible(f"{place}: {_cut(self.key)}: {self.sentence}" if self.key else f"{place}: {self.sentence}")


class InputError(ValueError):
    """Input that cannot be used, with every problem of it, not only the first; the CLI prints them and exits 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)))


@contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Adds the problems of an InputError inside to a list, so that all inputs are read before one is raised."""
    try:
        yield
    except InputError as fault:
        problems += fault.problems


def visible(text: str) -> str:
    """A text with every unprintable character escaped, so that none moves the cursor or stays hidden."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 user`, `2,000 users`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _cut(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}..."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean `x`?)`, or an empty text where no choice is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean `{near[0]}`?)" if near else ""
