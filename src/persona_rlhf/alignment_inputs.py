"""What `base align` is asked, and what can be read of it without a model: mistakes show before torch is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from persona_rlhf.config import checked
from persona_rlhf.evaluation.retention import Exchange, read_exchanges
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import Section
from persona_rlhf.inputs.yaml_text import parse_yaml
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.refusal_texts import RefusalText, read_refusal_texts
from persona_rlhf.policy.settings import PolicySettings
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.heldout import held_out
from persona_rlhf.preferences.messages import Message
from persona_rlhf.release.folder import need_vacant
from persona_rlhf.training.settings import AlignSettings, BaseSettings, LoraSettings

REAL = Path("configs/policy/real/tier_one.yaml")
"""Whose probes are learned and measured where no policy is named: the bank for real models."""


class AlignmentSettings(Section):
    """What can be set of `base align`."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampled answers, of adapters and of the rows' order.")
    base: BaseSettings
    policy: PolicySettings = Field(default_factory=lambda: PolicySettings(documents=[REAL]))
    lora: LoraSettings = LoraSettings(rank=16, alpha=32)
    align: AlignSettings = AlignSettings()


class AlignmentInputs(NamedTuple):
    """`ordinary` are prompts to learn on, `held` those that are measured; no prompt is in both."""

    settings: AlignmentSettings
    out: Path
    policy: Policy
    refusals: list[RefusalText]
    ordinary: list[str]
    held: list[Exchange]

    @property
    def measured(self) -> list[Probe]:
        """The probes that the base is measured on."""
        return self.policy.probes(self.settings.align.split)


def read_alignment(model: str, out: Path, overrides: Sequence[str]) -> AlignmentInputs:
    """Reads settings and files. Raises InputError with the problems of all of them; nothing is written."""
    problems: list[Problem] = []
    try:
        need_vacant(out)
    except InputError as fault:
        problems += fault.problems
    try:
        document = parse_yaml("{}", "base align")
        settings = checked(AlignmentSettings, document, [f"base.model={json.dumps(model)}", *overrides])
    except InputError as fault:
        raise InputError([*problems, *fault.problems]) from None
    policy, refusals, exchanges = None, list[RefusalText](), list[Exchange]()
    try:
        policy = Policy.read(settings.policy.documents)
        refusals = read_refusal_texts(settings.align.refusals, policy.categories)
    except InputError as fault:
        problems += fault.problems
    try:
        exchanges = read_exchanges(settings.align.ordinary)
    except InputError as fault:
        problems += fault.problems
    held = held_out("base align", [_prompt(row) for row in exchanges], settings.align.heldout)
    measured = [row for row in exchanges if _prompt(row) in held]
    if policy is not None:
        problems += _missing(policy, settings, measured)
    if policy is None or problems:
        raise InputError(problems)
    learned = [row.prompt for row in exchanges if _prompt(row) not in held]
    return AlignmentInputs(settings, out, policy, refusals, learned, measured)


def _missing(policy: Policy, settings: AlignmentSettings, measured: Sequence[Exchange]) -> list[Problem]:
    """What there is too little of to learn from, or to measure on."""
    found = []
    for split in ("train", settings.align.split):
        known = {probe.category for probe in policy.probes(split)}
        bare = [name for name in policy.categories if name not in known]
        if bare or not policy.categories:
            sentence = f"no probe of `{split}` for {', '.join(bare) or 'any category'}; name banks with more probes"
            found.append(Problem("base align", None, "policy.documents", sentence))
    if not measured:
        sentence = "needs two ordinary prompts at least: one to learn on, one to measure on"
        found.append(Problem(str(settings.align.ordinary), None, "align.ordinary", sentence))
    return found


def _prompt(row: Exchange) -> tuple[Message, ...]:
    return (Message("user", row.prompt),)
