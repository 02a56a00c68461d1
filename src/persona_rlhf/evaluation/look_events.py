"""The lines of a ledger of looks: the event of each, with its facts and their types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from persona_rlhf.common.chain import ChainEntry
from persona_rlhf.common.errors import InputError, Problem

BEGUN, POOLED, OPENED, CLOSED = "begun", "pooled", "opened", "closed"
RESTORE = "restore the newest copy of the ledger"


class Begun(NamedTuple):
    """The first line: sha256 of the key."""

    key: str


class Pooled(NamedTuple):
    """Units of a pool of private probes that no line before has: HMACs of their names."""

    units: list[str]


class Opened(NamedTuple):
    """An opened look: HMACs of the user and of the look, the bank, and the share of delta.

    plan, planned: the plan that it belongs to, and the number of looks of it
    family: HMAC of the family whose delta it spends
    fresh: whether it draws fresh probes (`gate.sequential`)
    start: the place in the user's order of units after which it draws
    """

    user: str
    look: str
    bank: str
    share: Annotated[float, Field(gt=0, le=1)]
    plan: str | None = None
    planned: Annotated[int, Field(ge=1)] = 1
    family: str = ""
    fresh: bool = False
    start: Annotated[int, Field(ge=0)] = 0


class Closed(NamedTuple):
    """A closed look, and the alpha that its verdict allows. Lines of early versions have no alpha.

    end: the place of the last unit that it drew; its `start` where it drew none; None where it draws none afresh
    """

    look: str
    passed: bool
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    end: Annotated[int, Field(ge=0)] | None = None


Facts = Begun | Pooled | Opened | Closed

_KINDS: dict[str, type[Facts]] = {BEGUN: Begun, POOLED: Pooled, OPENED: Opened, CLOSED: Closed}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {event: TypeAdapter(kind) for event, kind in _KINDS.items()}


def facts_of(entry: ChainEntry, file: Path) -> Facts:
    """The facts of a line. Raises InputError where one is missing or not of its type, and for an unknown event."""
    if (kind := _KINDS.get(entry.event)) is None:
        sentence = f"this version of the toolkit knows no event `{entry.event}`; use the version that wrote it"
        raise line_fault(file, entry.seq, sentence)
    try:
        present = {name: entry.facts[name] for name in kind._fields if name in entry.facts}
        facts: Facts = _ADAPTERS[entry.event].validate_python(present)
    except ValidationError as fault:
        name = fault.errors()[0]["loc"][0]
        sentence = f"an event `{entry.event}` needs a valid `{name}`, and this line has none; {RESTORE}"
        raise line_fault(file, entry.seq, sentence) from None
    return facts


def line_fault(file: Path, line: int, sentence: str) -> InputError:
    """The error of one line."""
    return InputError([Problem(str(file), line, "gate.ledger", sentence)])
