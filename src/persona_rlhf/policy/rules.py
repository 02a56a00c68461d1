"""Resolved rules: what is left of the documents after merging, each with the tier, document and line it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from persona_rlhf.policy.hazards import Probe


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
    """A property of every answer: must_include, max_words, language, regex or judge."""

    id: str
    property: str
    value: str | int
    tier: int
    document: str
    line: int
    source_name: str


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
