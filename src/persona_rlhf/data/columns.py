"""Checks of the columns of a preference row: required and optional ones, and user ids that print alike."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import NamedTuple

from persona_rlhf.common.errors import Problem, did_you_mean

REQUIRED = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = ("id", "created_at", "source", "weight", "split", "clean_choice", "place", "tie")
KNOWN = REQUIRED + OPTIONAL
LONGEST_USER_ID = 128  # characters

_ALIASES: Mapping[str, tuple[str, ...]] = {  # names in other files; did_you_mean catches misspellings
    "user_id": ("user", "uid", "annotator", "annotator_id", "worker", "worker_id", "username", "author"),
    "prompt": ("query", "context", "question", "instruction", "input", "messages", "conversations"),
    "chosen": ("accepted", "accept", "preferred", "winner", "better", "response_chosen", "chosen_response"),
    "rejected": ("reject", "declined", "dispreferred", "loser", "worse", "response_rejected", "rejected_response"),
}

COLUMN_NAMES = frozenset({*KNOWN, *(alias for aliases in _ALIASES.values() for alias in aliases)})


class ColumnFault(NamedTuple):
    """A mistake in one column; the row's reader adds the file and the line."""

    key: str
    sentence: str


def shown(value: object) -> str:
    """A value as an error message shows it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def columns_of(row: object) -> Mapping[str, object]:
    """A row as named columns. Raises ValueError if it is something else."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with named columns, not {shown(row)}")
    return row


def missing(column: str, present: Iterable[str]) -> ColumnFault:
    """The fault of a missing required column, with the column that is probably meant."""
    unknown = [name for name in present if name not in KNOWN]
    alias = next((name for name in unknown if name.casefold() in _ALIASES[column]), None)
    if alias is None:
        alias = next((name for name in unknown if did_you_mean(name, KNOWN) == f" (did you mean `{column}`?)"), None)
    if alias is not None:
        return ColumnFault(column, f"the column is missing, but there is `{alias}`: rename it to `{column}`")
    return ColumnFault(column, f"the column is missing; a row needs {', '.join(f'`{name}`' for name in REQUIRED)}")


def text_fault(column: str, value: object) -> ColumnFault | None:
    """The fault of a value that is no text, or one that cannot be encoded."""
    if not isinstance(value, str):
        return ColumnFault(column, f"must be a text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        return ColumnFault(
            column, f"holds half a character (a lone surrogate): {shown(value)}; write the whole character"
        )
    return None


def user_id_fault(value: object) -> ColumnFault | None:
    """The fault of a user id that is not a text of 1 to 128 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return ColumnFault("user_id", f'must be a text, not the number {value}: write "{value}"')
    if (fault := text_fault("user_id", value)) is not None:
        return fault
    assert isinstance(value, str)
    if not 1 <= len(value) <= LONGEST_USER_ID:
        return ColumnFault("user_id", f"has {len(value)} characters; an id has 1 to {LONGEST_USER_ID}")
    return None


def _weight_fault(value: object) -> ColumnFault | None:
    """The fault of a weight that is not a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ColumnFault("weight", f"must be a number, not {shown(value)}")
    if not 0 < value < math.inf:  # false for NaN too
        return ColumnFault("weight", f"is {value}; a weight is a finite number above 0 (remove the row to ignore it)")
    return None


def moment(value: str | date) -> str:
    """A time in the extended form of ISO 8601, from any form of it or a Parquet timestamp; raises ValueError.

    A text in that form stays as it is: weeks, days without dashes and the like become `YYYY-MM-DD`.
    """
    if not isinstance(value, str):
        return value.isoformat()
    written = datetime.fromisoformat(value)
    return value if value.startswith(str(written.date())) else written.isoformat()


def _created_at_fault(value: object) -> ColumnFault | None:
    if isinstance(value, str | date):  # a datetime is a date
        try:
            moment(value)
            return None
        except ValueError:
            pass
    return ColumnFault("created_at", f"is {shown(value)}; write ISO 8601, such as 2026-11-01T12:30:00Z")


def _split_fault(value: object) -> ColumnFault | None:
    """The fault of a split that is not `train` or `heldout`."""
    if value in ("train", "heldout"):
        return None
    hint = " (did you mean `heldout`?)" if value in ("test", "eval", "validation", "held_out", "dev") else ""
    return ColumnFault("split", f"is {shown(value)}; it must be `train` or `heldout`{hint}")


def place_of(text: str) -> tuple[int, int]:
    """The place of the chosen answer among those that were shown, from `2/4`. Raises ValueError for another text."""
    place, slash, shown = text.partition("/")
    if not (slash and place.isdecimal() and shown.isdecimal() and 1 <= int(place) <= int(shown)):
        raise ValueError(text)
    return int(place), int(shown)


def _place_fault(value: object) -> ColumnFault | None:
    """The fault of a place that is not written as `2/4`."""
    if isinstance(value, str):
        try:
            place_of(value)
            return None
        except ValueError:
            pass
    return ColumnFault("place", f"is {shown(value)}; write the place of `chosen` among the answers shown, such as 1/2")


def _id_fault(value: object) -> ColumnFault | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else text_fault("id", value)


def _source_fault(value: object) -> ColumnFault | None:
    return text_fault("source", value)


def _truth_fault(column: str) -> Callable[[object], ColumnFault | None]:
    """The check of a column of truth values."""

    def fault(value: object) -> ColumnFault | None:
        return None if isinstance(value, bool) else ColumnFault(column, f"must be true or false, not {shown(value)}")

    return fault


CHECKS: Mapping[str, Callable[[object], ColumnFault | None]] = {  # of the optional columns
    "id": _id_fault,
    "created_at": _created_at_fault,
    "source": _source_fault,
    "weight": _weight_fault,
    "split": _split_fault,
    "clean_choice": _truth_fault("clean_choice"),
    "place": _place_fault,
    "tie": _truth_fault("tie"),
}


class UserSpellings:
    """The user ids of one or several files, to find two that print alike."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str, int]] = {}
        self._reported: set[str] = set()

    def problem(self, user_id: str, file: str, line: int) -> Problem | None:
        """The problem of an id that differs from an earlier one only in ways that no reader sees; once per id.

        These are Unicode forms (NFC, NFD), spaces at the ends or repeated, and invisible characters.
        """
        form = unicodedata.normalize("NFC", user_id)
        visible_form = " ".join("".join(c for c in form if unicodedata.category(c) != "Cf").split())
        earlier, at, number = self._first.setdefault(visible_form, (user_id, file, line))
        if earlier == user_id or user_id in self._reported:
            return None
        self._reported.add(user_id)
        sentence = f"{user_id!a} prints alike with {earlier!a} at {at}:{number}, and each would be a user"
        return Problem(file, line, "user_id", f"{sentence}; write one spelling for one person")
