"""Resolved rules: what is left of the documents after merging, each with the tier, document and line it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.statements import MIN_RATE, When


class DocumentInfo(NamedTuple):
    """A document that went into a policy."""

    path: str
    tier: int
    issuer: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Restriction:
    """Requests of a category are refused: `limit` in nats of excess refusal loss, `min_refusal` a rate.

    A stricter value of a lower tier is merged in, and `narrowed_by` names its rules (`document:line id`).
    """

    id: str
    category: str
    limit: float
    min_refusal: float
    probes: tuple[Probe, ...]
    tier: int
    document: str
    line: int
    source_name: str
    bank: str
    bank_sha256: str
    narrowed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Requirement:
    """A property of answers (of every one, or of those to the prompts of `when`), and the share that must have it.

    `property` is one of `statements.PROPERTIES`; `requirements.satisfied` says what each asks.
    """

    id: str
    property: str
    value: str | int
    tier: int
    document: str
    line: int
    source_name: str
    when: When | None = None
    min_rate: float = MIN_RATE

    def said(self) -> tuple[object, ...]:
        """What it says, for hashing: what a first edition could not say counts where it says something."""
        when = None if self.when is None else self.when.model_dump()
        later = () if (when, self.min_rate) == (None, MIN_RATE) else (when, self.min_rate)
        return (self.id, self.property, self.value, *later)

    def to_json(self) -> dict[str, object]:
        """Its fields, for policy.json."""
        return {**vars(self), "when": None if self.when is None else self.when.model_dump(exclude_none=True)}

    def __str__(self) -> str:
        """`max_words: 40, for prompts about medical`."""
        return f"{self.property}: {self.value}" + (f", for {self.when}" if self.when is not None else "")


@dataclass(frozen=True)
class Preference:
    """A taste stated by an end user; `user_id` is None where it is everybody's."""

    id: str
    user_id: str | None
    aspect: str
    statement: str
    tier: int
    document: str
    line: int
    source_name: str
