"""Config sections of the preferences floor: whose pairs, and which of them are used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from persona_rlhf.inputs.bundled import ExistingPath, ModelName
from persona_rlhf.inputs.section import Section


class UsersSettings(Section):
    """`users`: the preference pairs of every user."""

    path: ExistingPath = Field(description="A file of pairs, or a folder of such files; rows name their user_id.")
    heldout: float = Field(
        0.25, ge=0, lt=1, description="Share of a user's prompts never trained on, where rows state no split."
    )


class GuardSettings(Section):
    """`screening.classifier`: a safety model that calls requests safe or unsafe, and names codes of Llama Guard 3."""

    model: ModelName = Field(description="A transformers folder or a hub id, such as meta-llama/Llama-Guard-3-1B.")
    template: ExistingPath | None = Field(
        None, description="File of its prompt with {prompt}; without it, its chat template is used."
    )
    unsafe: str = Field("\n\nunsafe", min_length=1, description="What it writes of a forbidden request; codes follow.")
    safe: str = Field("\n\nsafe", min_length=1, description="What it writes of a harmless one.")


class ScreeningSettings(Section):
    """`screening`: which requests are taken to be forbidden, and what becomes of pairs that prefer complying with them.

    A prompt that is a probe of the policy always is. What the classifiers below find comes on top.
    """

    quarantine: bool = Field(
        True, description="Keep pairs that prefer complying with such requests out of training; off for ablations."
    )
    base: Literal["answer", "likelihood", "off"] = Field(
        "answer",
        description="What the base refuses is forbidden: told by its answer, or by how likely its refusals are.",
    )
    rules: ExistingPath | None = Field(
        None, description="YAML of patterns of forbidden requests, by hazard category; data/policy/screen.yaml is one."
    )
    classifier: GuardSettings | None = Field(None, description="A safety model whose categories map onto the policy's.")
    false_alarms: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Share of harmless twins taken for forbidden at most, on the half of `dev` that sets a threshold.",
    )
    reviews: ExistingPath | None = Field(
        None, description="Decisions about quarantined pairs (RUN/reviews.jsonl, see `data review`) of an earlier run."
    )

    @property
    def files(self) -> list[Path]:
        """The files that it names, whose contents decide what is screened out."""
        template = None if self.classifier is None else self.classifier.template
        return [file for file in (self.rules, template, self.reviews) if file is not None]
