"""Config section of the release floor: where a run is written, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from persona_rlhf.inputs.section import Section


class RunSettings(Section):
    """`run`: the folder of a run, and who is told of its progress."""

    dir: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="Folder that the run is written to; runs/NAME by default, and --run goes before it."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [], description="Experiment trackers that get the curves of a run in one process; their packages are not ours."
    )
