"""Config section of the release floor: where a run is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from persona_rlhf.inputs.section import Section


class RunSettings(Section):
    """`run`: the folder of a run."""

    dir: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="Folder that the run is written to; runs/NAME by default, and --run goes before it."
    )
