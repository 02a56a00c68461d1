"""The columns of a preference row: their names, the names other files give them, and what each may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import NamedTuple

from persona_rlhf.inputs.problems import did_you_mean

REQUIRED = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = ("id", "created_at", "source", "weight", "split", "clean_choice")
KNOWN = REQUIRED + OPTIONAL
LONGEST_USER_ID = 128  # characters

_ALIASES: Mapping[str, tuple[str, ...]] = {  # what other files call it; did_you_mean finds plain misspellings
    "user_id": ("user", "uid", "annotator", "annotator_id", "worker", "worker_id", "username", "author"),
    "prompt": ("question", "query", "instruction", "input", "messages", "context"),
    "chosen": ("accepted", "accept", "preferred", "winner", "better", "response_chosen", "chosen_response"),
    "rejected": ("reject", "declined", "dispreferred", "loser", "worse", "response_rejected", "rejected_response"),
}


class Fault(NamedTuple):
    """What is wrong in one column; the row's reader adds the file and the line."""

    key: str
    sentence: str


def shown(value: object) -> str:
    """A value as an error message shows it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def columns_of(row: object) -> Mapping[str, object]:
    """A row as named columns. Raises ValueError where it is something else."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with named columns, not {shown(row)}")
    return row


def missing(column: str, present: Iterable[str]) -> Fault:
    """A required column is not there: names the one that is probably meant."""
    unknown = [name for name in present if name not in KNOWN]
    alias = next((name for name in unknown if name.casefold() in _ALIASES[column]), None)
    if alias is None:
        alias = next((name for name in unknown if did_you_mean(name, KNOWN) == f" (did you mean `{column}`?)"), None)
    if alias is not None:
        return Fault(column, f"the column is missing, but there is `{alias}`: rename it to `{column}`")
    return Fault(column, f"the column is missing; a row needs {', '.join(f'`{name}`' for name in REQUIRED)}")


def text_fault(column: str, value: object) -> Fault | None:
    """Whether a value is a text that can be stored and tokenized."""
    if not isinstance(value, str):
        return Fault(column, f"must be a text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Fault(column, f"holds half a character (a lone surrogate): {shown(value)}; write the whole character")
    return None


def user_id_fault(value: object) -> Fault | None:
    """A user id is any text of 1 to 128 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Fault("user_id", f'must be a text, not the number {value}: write "{value}"')
    if (fault := text_fault("user_id", value)) is not None:
        return fault
    assert isinstance(value, str)
    if not 1 <= len(value) <= LONGEST_USER_ID:
        return Fault("user_id", f"has {len(value)} characters; an id has 1 to {LONGEST_USER_ID}")
    return None


def _weight_fault(value: object) -> Fault | None:
    """A weight is a positive finite number: a pair of weight 0 would teach nothing and divide by nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Fault("weight", f"must be a number, not {shown(value)}")
    if not 0 < value < math.inf:  # false for NaN too
        return Fault("weight", f"is {value}; a weight is a finite number above 0 (leave the row out to give it none)")
    return None


def moment(value: str | date) -> str:
    """A time as ISO 8601 text; raises ValueError where it is none. Parquet's own time stamps are understood too."""
    if isinstance(value, str):
        datetime.fromisoformat(value)
        return value
    return value.isoformat()


def _created_at_fault(value: object) -> Fault | None:
    if isinstance(value, str | date):  # a datetime is a date
        try:
            moment(value)
            return None
        except ValueError:
            pass
    return Fault("created_at", f"is {shown(value)}; write ISO 8601, such as 2026-11-01T12:30:00Z")


def _split_fault(value: object) -> Fault | None:
    """A split is `train` or `heldout`."""
    if value in ("train", "heldout"):
        return None
    hint = " (did you mean `heldout`?)" if value in ("test", "eval", "validation", "held_out", "dev") else ""
    return Fault("split", f"is {shown(value)}; it must be `train` or `heldout`{hint}")


def _id_fault(value: object) -> Fault | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else text_fault("id", value)


def _source_fault(value: object) -> Fault | None:
    return text_fault("source", value)


def _clean_choice_fault(value: object) -> Fault | None:
    return None if isinstance(value, bool) else Fault("clean_choice", f"must be true or false, not {shown(value)}")


CHECKS: Mapping[str, Callable[[object], Fault | None]] = {  # of the optional columns
    "id": _id_fault,
    "created_at": _created_at_fault,
    "source": _source_fault,
    "weight": _weight_fault,
    "split": _split_fault,
    "clean_choice": _clean_choice_fault,
}
