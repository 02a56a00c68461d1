"""Config sections of the preferences floor: whose pairs, and which of them are used."""

from __future__ import annotations

from pydantic import Field

from persona_rlhf.inputs.bundled import ExistingPath
from persona_rlhf.inputs.section import Section


class UsersSettings(Section):
    """`users`: the preference pairs of every user."""

    path: ExistingPath = Field(description="A file of pairs, or a folder of such files; rows name their user_id.")
    heldout: float = Field(
        0.25, ge=0, lt=1, description="Share of a user's prompts never trained on, where rows state no split."
    )


class ScreeningSettings(Section):
    """`screening`: what becomes of pairs that touch tier one."""

    quarantine: bool = Field(
        True, description="Keep pairs that prefer complying with tier-one requests out of training; off for ablations."
    )
    reviews: ExistingPath | None = Field(
        None, description="Decisions about quarantined pairs (RUN/reviews.jsonl, see `data review`) of an earlier run."
    )
