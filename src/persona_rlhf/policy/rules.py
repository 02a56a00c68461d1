"""Resolved rules: the restrictions, requirements and preferences after merging, each with its tier and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.rule_schema import MIN_RATE, Action, PropertyValue, When


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

    Stricter values of lower tiers are merged in; `narrowed_by` names their rules (`document:line id`).
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
    action: Action = "refuse"
    text: str | None = None

    def hashed(self) -> tuple[object, ...]:
        """Its content for hashing."""
        later = () if self.action == "refuse" else (self.action, self.text)
        return (self.id, self.category, self.limit, self.min_refusal, self.bank_sha256, *later)


def split_sizes(probes: Sequence[Probe]) -> dict[str, int]:
    """The number of probes by split, for policy.json."""
    splits = [probe.split for probe in probes]
    return {split: splits.count(split) for split in sorted(set(splits))}


@dataclass(frozen=True)
class Requirement:
    """A property of all answers, or of those to the prompts of `when`, and the share that must have it.

    `property` is a key of `properties.REQUIREMENTS`.
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
    probes: tuple[Probe, ...] = ()
    bank_sha256: str = ""

    def aim(self) -> float:
        """The share that training aims at: a quarter of the allowed failures, as a margin for new prompts."""
        return (3 + self.min_rate) / 4

    def hashed(self) -> tuple[object, ...]:
        """Its content for hashing; fields that came later count only where they are set."""
        when = None if self.when is None else self.when.model_dump()
        later = when, self.min_rate, self.bank_sha256
        return (self.id, self.property, self.value, *(() if later == (None, MIN_RATE, "") else later))

    def to_json(self) -> dict[str, object]:
        """Its fields, for policy.json."""
        when = None if self.when is None else self.when.model_dump(exclude_none=True)
        return {**vars(self), "when": when, "probes": split_sizes(self.probes)}

    def __str__(self) -> str:
        """`max_words: 40, for prompts about medical`."""
        return f"{self.property}: {self.value}" + (f", for {self.when}" if self.when is not None else "")


@dataclass(frozen=True)
class Preference:
    """A taste stated by an end user; `user_id` is None for all users, `wish` is the part that a program reads."""

    id: str
    user_id: str | None
    aspect: str
    statement: str
    tier: int
    document: str
    line: int
    source_name: str
    wish: PropertyValue | None = None

    def hashed(self) -> tuple[object, ...]:
        """Its content for hashing."""
        later = () if self.wish is None else (*self.wish,)
        return (self.id, self.user_id, self.aspect, self.statement, *later)

    def to_json(self) -> dict[str, object]:
        """Its fields, for policy.json."""
        return {**vars(self), "wish": None if self.wish is None else self.wish._asdict()}
