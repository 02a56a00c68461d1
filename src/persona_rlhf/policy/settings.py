"""Config section of the policy floor."""

from __future__ import annotations

from pydantic import Field

from persona_rlhf.inputs.bundled import ExistingPath
from persona_rlhf.inputs.section import Section


class PolicySettings(Section):
    """`policy`: the rules that training and the gate hold every user's adapter to."""

    documents: list[ExistingPath] = Field(
        min_length=1, description="Policy documents: exactly one of tier one, and those of tiers two and three."
    )
