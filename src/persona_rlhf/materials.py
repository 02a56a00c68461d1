"""What a config names that can be read without a tokenizer: mistakes in it show at once, before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.config import Config
from persona_rlhf.evaluation.facts import Fact, bundled_facts, read_facts
from persona_rlhf.evaluation.retention import read_ordinary
from persona_rlhf.evaluation.utility import Utility, read_utilities
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.patterns import Patterns
from persona_rlhf.preferences.review import Review, read_reviews
from persona_rlhf.preferences.store import PairStore, Roll


class Materials(NamedTuple):
    """The policy and the preference pairs; for the measurements, written-down tastes, ordinary prompts and facts;
    what was decided about quarantined pairs; patterns of forbidden requests."""

    policy: Policy
    pairs: PairStore
    utilities: Mapping[str, Utility]
    ordinary: list[str]
    facts: list[Fact]
    reviews: Mapping[str, Review]
    rules: Patterns | None


def read_materials(config: Config, roll: Roll | None = None) -> Materials:
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
    return Materials(policy, pairs, utilities, ordinary, facts, reviews, rules)


def facts_of(config: Config) -> list[Fact]:
    """The questions of knowledge that a config names. Raises InputError where they cannot be read."""
    named = config.evaluation.facts
    if named is None:
        return []
    return bundled_facts() if named == "bundled" else read_facts(Path(named))
