"""The sections of a Policy Card: a provider's rules for a deployed system, as JSON (Mavračić 2025, arXiv 2510.24383).

Written after the published JSON Schema of the format (2020-12). Its `uri` and date formats are checked by patterns.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from persona_rlhf.config.loader import Section
from persona_rlhf.policy.rule_schema import IsoDate

Semver = Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
DateTime = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})$")]
Uri = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+$")]
Span = Annotated[str, Field(pattern=r"^[0-9]+[mhdy]$")]
Token = Annotated[str, Field(min_length=1)]


class CardMeta(Section):
    """Name, version and accountable owner of a card."""

    name: str = Field(description="name of the card")
    version: Semver = Field(description="such as 1.0.0")
    owner: str = Field(description="the accountable organisation")
    created_at: DateTime = Field(description="such as 2026-12-01T10:00:00Z")
    last_reviewed_at: DateTime | None = None
    valid_from: IsoDate | None = None
    valid_to: IsoDate | None = None


class CardScope(Section):
    """The deployment that a card is about."""

    application: str = Field(description="the deployment in words")
    stakeholders: list[str] = Field(description="roles that it concerns")
    jurisdictions: list[str] = Field(description="where it applies")
    system_refs: list[Uri] | None = None
    model_refs: list[Uri] | None = None


class PolicyReference(Section):
    """A law or document that a card carries out."""

    name: str
    jurisdiction: str
    citation: str | None = None
    uri: Uri | None = None
    version: str | None = None


class ActionException(Section):
    """A time-bound exception from an action rule."""

    id: Annotated[str, Field(pattern=r"^EX-[A-Z0-9-]+$")]
    reason: str
    approved_by: str
    time_bound: Span
    evidence_required: list[Token] | None = None


class ActionRule(Section):
    """An effect on an action: allowed, denied, or escalated."""

    id: Annotated[str, Field(pattern=r"^AR-[A-Z0-9-]+$")]
    subject: str
    action: str
    resource: str
    condition: str
    effect: Literal["allow", "deny", "require_escalation"]
    evidence_required: list[Token] | None = None
    exceptions: list[ActionException] | None = None


class Controls(Section):
    """The action rules."""

    action_rules: Annotated[list[ActionRule], Field(min_length=1)]


class Obligation(Section):
    """A commitment, with its trigger and the role that answers for it."""

    id: str
    description: str
    when: str | None = None
    responsible_role: str
    evidence_required: list[Token] | None = None
    legal_basis: str | None = None


class Detector(Section):
    """A measured figure and the threshold at which it is reported."""

    name: str
    description: str
    uri: Uri
    operator: Literal["<", "<=", "==", ">=", ">"]
    threshold: float


class Logging(Section):
    """Logged events and fields, and the days for which they are kept."""

    events: list[str] = Field(description="logged events")
    fields: list[str] = Field(description="logged fields")
    retention_days: int = Field(ge=1, description="days for which logs are kept")


class CardReview(Section):
    """The regular review."""

    owner: str = Field(description="the reviewer")
    cadence_days: int = Field(ge=7, description="days between reviews")
    method: str = Field(description="such as an external audit")


class Monitoring(Section):
    """Logs, detectors and reviews."""

    logging: Logging = Field(description="logged events and fields, and days of retention")
    detectors: list[Detector]
    review: CardReview = Field(description="owner, days between reviews, and method")


class Kpi(Section):
    """A figure with a target over a window of time."""

    id: str
    metric: str
    target: float
    window: Span


class Thresholds(Section):
    """Targets and red lines."""

    kpis: list[Kpi]
    critical_auto_fail: Annotated[list[Token], Field(min_length=1)]


class ChangeManagement(Section):
    """Approvals of a change, and the way back."""

    approvals: list[str] = Field(description="roles that approve a change")
    diff_notes: str | None = None
    rollback_conditions: str | None = None
    backout_plan: str = Field(description="the way back to the card before")


class AssuranceMapping(Section):
    """Tokens of the frameworks that a card answers to."""

    nist: Annotated[list[Token], Field(min_length=1)]
    iso_42001: Annotated[list[Token], Field(min_length=1)]
    eu_ai_act: Annotated[list[Token], Field(min_length=1)]


class CardReferences(Section):
    """Documentation, and notes in free text."""

    documentation: list[Uri] = Field(description="addresses of documentation")
    notes: str | None = None


class PolicyCard(Section):
    """A whole card."""

    meta: CardMeta = Field(description="name, version and created_at of the card")
    scope: CardScope = Field(description="application, stakeholders and jurisdictions of the deployment")
    applicable_policies: list[PolicyReference]
    controls: Controls
    obligations: list[Obligation]
    monitoring: Monitoring = Field(description="logging and review of the deployment")
    kpis_thresholds: Thresholds
    change_management: ChangeManagement = Field(description="approvals and backout_plan")
    assurance_mapping: AssuranceMapping
    references: CardReferences = Field(description="documentation of the deployment")
