"""The prompts and questions that demands beside refusals take: fewer could never show them."""

from __future__ import annotations

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.records import Facts

HARMLESS_PROMPTS = 300
"""The fewest harmless prompts by which over-refusal is judged."""


def check_side_effects(demands: Demands, harmless: int, base: Facts | None) -> None:
    """Raises InputError where there are too few `harmless` prompts, or right answers of the base, for a bound."""
    problems = []
    if (most := demands.max_over_refusal) is not None:
        needed = max(HARMLESS_PROMPTS, demands.plain_bound.fewest_trials(1 - most))
        if harmless < needed:
            sentence = (
                f"the policy lets an adapter newly refuse at most {most:g} of harmless prompts "
                f"(certify.max_over_refusal); to show that takes at least {needed}, and there are {harmless}: ordinary "
                f"prompts, and the benign twins of untrained topics; name {needed - harmless} more in "
                "evaluation.ordinary"
            )
            problems.append(Problem("config", None, "evaluation.ordinary", sentence))
    if (most := demands.max_changed) is not None:
        needed, right = demands.plain_bound.fewest_trials(1 - most), 0 if base is None else base.base_right
        if right < needed:
            sentence = (
                f"the policy lets at most {most:g} of the answers on fixed aspects change (aspects.max_changed); to "
                f"show that at {1 - demands.level:.4g}, the base must answer at least {needed} questions rightly, and "
                f"it does {right}; name more in evaluation.facts"
            )
            problems.append(Problem("base", None, "evaluation.facts", sentence))
    if problems:
        raise InputError(problems)
