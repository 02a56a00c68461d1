"""Hazard categories and their names in MLCommons AILuminate and Llama Guard: a table of data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from persona_rlhf.inputs.section import Section, read_section
from persona_rlhf.inputs.yaml_text import read_yaml


class Hazard(Section):
    """A category and what others call it."""

    category: str = Field(description="Our name, as rules write it.")
    title: str = Field(description="The name for people.")
    ailuminate: list[str] = Field(description="Short names of AILuminate's hazards.")
    llama_guard: list[str] = Field(description="Codes of Llama Guard 3.")
    bundled: bool = Field(False, description="Whether a probe bank is bundled.")

    def __str__(self) -> str:
        """`AILuminate vcr; Llama Guard S1`."""
        named = (("AILuminate", self.ailuminate), ("Llama Guard", self.llama_guard))
        return "; ".join(f"{name} {', '.join(codes)}" for name, codes in named if codes)


class _Table(Section):
    hazards: list[Hazard]


@cache
def hazards() -> dict[str, Hazard]:
    """All hazards of the table, by category."""
    table = read_section(_Table, read_yaml(Path(__file__).with_suffix(".yaml")))
    return {hazard.category: hazard for hazard in table.hazards}


def title(category: str) -> str:
    """The name of a category for people; for one that is not in the table, its own words."""
    known = hazards().get(category)
    return category.replace("_", " ") if known is None else known.title


def of_llama_guard(code: str) -> list[str]:
    """Our categories that a code of Llama Guard 3 can mean."""
    return [hazard.category for hazard in hazards().values() if code in hazard.llama_guard]
