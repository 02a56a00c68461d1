"""Everything a command needs read and checked before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import need_vacant
from persona_rlhf.config.experiment import Config, PolicySettings, checked
from persona_rlhf.config.loader import Section, parse_yaml
from persona_rlhf.config.training import AlignSettings, BaseSettings, LoraSettings
from persona_rlhf.data.feedback import Review, read_reviews
from persona_rlhf.data.pairs import Message, held_out
from persona_rlhf.data.screening import Patterns
from persona_rlhf.data.store import PairStore, UserSelection
from persona_rlhf.evaluation.prompt_sets import (
    Fact,
    OrdinaryExample,
    bundled_facts,
    read_examples,
    read_facts,
    read_ordinary,
)
from persona_rlhf.policy.hazards import Probe, RefusalText, read_refusal_texts
from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.users import Utility, read_utilities

# ----------------------------------------------------------------------------------------------------
# What `base align` is asked, and what can be read of it without a model: mistakes show before torch is loaded.
# ----------------------------------------------------------------------------------------------------

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
    held: list[OrdinaryExample]

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
    policy, refusals, exchanges = None, list[RefusalText](), list[OrdinaryExample]()
    try:
        policy = Policy.read(settings.policy.documents)
        refusals = read_refusal_texts(settings.align.refusals, policy.categories)
    except InputError as fault:
        problems += fault.problems
    try:
        exchanges = read_examples(settings.align.ordinary)
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


def _missing(policy: Policy, settings: AlignmentSettings, measured: Sequence[OrdinaryExample]) -> list[Problem]:
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


def _prompt(row: OrdinaryExample) -> tuple[Message, ...]:
    return (Message("user", row.prompt),)


# ----------------------------------------------------------------------------------------------------
# What a config names that can be read without a tokenizer: mistakes in it show at once, before torch is loaded.
# ----------------------------------------------------------------------------------------------------


class RunInputs(NamedTuple):
    """The policy and the preference pairs; for the measurements, written-down tastes, ordinary prompts and facts;
    what was decided about quarantined pairs; patterns of forbidden requests."""

    policy: Policy
    pairs: PairStore
    utilities: Mapping[str, Utility]
    ordinary: list[str]
    facts: list[Fact]
    reviews: Mapping[str, Review]
    rules: Patterns | None


def read_inputs(config: Config, roll: UserSelection | None = None) -> RunInputs:
    """Reads the files of a config; a run that has begun has a `roll` of its users.

    Raises InputError with the problems of all of them.
    """
    problems: list[Problem] = []
    policy, pairs, utilities, ordinary = None, None, dict[str, Utility](), list[str]()
    facts: list[Fact] = []
    reviews: dict[str, Review] = {}
    rules: Patterns | None = None
    try:
        policy = Policy.read(config.policy.documents)
    except InputError as fault:
        problems += fault.problems
    try:
        pairs = PairStore(config.users.path, config.users.heldout, roll)
    except InputError as fault:
        problems += fault.problems
    try:
        utilities = read_utilities(config.evaluation.utilities) if config.evaluation.utilities else {}
        ordinary = read_ordinary(config.evaluation.ordinary) if config.evaluation.ordinary else []
        facts = facts_of(config)
        reviews = read_reviews(config.screening.reviews) if config.screening.reviews else {}
    except InputError as fault:
        problems += fault.problems
    if policy is not None and config.screening.rules is not None:
        try:
            rules = Patterns.read(config.screening.rules, policy.categories)
        except InputError as fault:
            problems += fault.problems
    if policy is None or pairs is None or problems:
        raise InputError(problems)
    return RunInputs(policy, pairs, utilities, ordinary, facts, reviews, rules)


def facts_of(config: Config) -> list[Fact]:
    """The questions of knowledge that a config names. Raises InputError where they cannot be read."""
    named = config.evaluation.facts
    if named is None:
        return []
    return bundled_facts() if named == "bundled" else read_facts(Path(named))
