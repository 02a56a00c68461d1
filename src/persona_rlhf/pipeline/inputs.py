"""Everything a command needs read and checked before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem, collecting
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
from persona_rlhf.policy.hazards import (
    Probe,
    RefusalText,
    WrittenDemonstration,
    read_demonstrations,
    read_refusal_texts,
)
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.foreign_adapter import ForeignAdapter, read_foreign
from persona_rlhf.simulation.users import Utility, read_utilities

REAL_POLICY = Path("configs/policy/real/tier_one.yaml")
"""The default policy for a base without a run: tier one with probes for real models."""


class AlignmentSettings(Section):
    """Settings of `base align`."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampled answers, of adapters and of the rows' order.")
    base: BaseSettings
    policy: PolicySettings = Field(default_factory=lambda: PolicySettings(documents=[REAL_POLICY]))
    lora: LoraSettings = LoraSettings(rank=16, alpha=32)
    align: AlignSettings = AlignSettings()


class AlignmentInputs(NamedTuple):
    """Inputs of `base align`: `ordinary` are prompts to train on, `held` are other prompts to measure on.

    `refusals` holds those of `written` too.
    """

    settings: AlignmentSettings
    out: Path
    policy: Policy
    refusals: list[RefusalText]
    ordinary: list[str]
    held: list[OrdinaryExample]
    written: list[WrittenDemonstration]

    @property
    def trained(self) -> list[Probe]:
        """The requests to train on: the policy's train probes, then the written ones that are no probes."""
        probes = self.policy.probes("train")
        prompts = {probe.prompt for probe in probes}
        return [*probes, *(row.probe for row in self.written if row.prompt not in prompts)]

    @property
    def measured(self) -> list[Probe]:
        """The probes to measure the base on."""
        return self.policy.probes(self.settings.align.split)


def read_alignment(model: str, out: Path, overrides: Sequence[str]) -> AlignmentInputs:
    """Reads settings and files. Raises InputError with the problems of all of them; nothing is written."""
    problems: list[Problem] = []
    with collecting(problems):
        need_vacant(out)
    try:
        document = parse_yaml("{}", "base align")
        settings = checked(AlignmentSettings, document, [f"base.model={json.dumps(model)}", *overrides])
    except InputError as fault:
        raise InputError([*problems, *fault.problems]) from None
    policy, refusals, exchanges = None, list[RefusalText](), list[OrdinaryExample]()
    written = list[WrittenDemonstration]()
    with collecting(problems):
        policy = Policy.of(settings.policy)
        refusals = read_refusal_texts(settings.align.refusals, policy.categories)
    probes = [] if policy is None else [probe for rule in policy.restrictions for probe in rule.probes]
    for file in settings.align.demonstrations if policy is not None else []:
        with collecting(problems):
            written += read_demonstrations(file, probes)
    refusals += [row.fitting for row in written]
    with collecting(problems):
        exchanges = read_examples(settings.align.ordinary)
    held = held_out("base align", [_prompt(row) for row in exchanges], settings.align.heldout)
    measured = [row for row in exchanges if _prompt(row) in held]
    if policy is not None:
        problems += _missing(policy, settings, measured)
    if policy is None or problems:
        raise InputError(problems)
    learned = [row.prompt for row in exchanges if _prompt(row) not in held]
    return AlignmentInputs(settings, out, policy, refusals, learned, measured, written)


def _missing(policy: Policy, settings: AlignmentSettings, measured: Sequence[OrdinaryExample]) -> list[Problem]:
    """Problems of a policy or of ordinary prompts with too little to train or to measure on."""
    problems = []
    for split in ("train", settings.align.split):
        with_probes = {probe.category for probe in policy.probes(split)}
        bare = [name for name in policy.categories if name not in with_probes]
        if bare or not policy.categories:
            sentence = f"no probe of `{split}` for {', '.join(bare) or 'any category'}; name banks with more probes"
            problems.append(Problem("base align", None, "policy.documents", sentence))
    if not measured:
        sentence = "needs two ordinary prompts at least: one to learn on, one to measure on"
        problems.append(Problem(str(settings.align.ordinary), None, "align.ordinary", sentence))
    return problems


def _prompt(row: OrdinaryExample) -> tuple[Message, ...]:
    return (Message("user", row.prompt),)


class RunInputs(NamedTuple):
    """Inputs of a run: policy and preference pairs; utilities, ordinary prompts and facts to measure by; decisions
    about quarantined pairs; patterns of forbidden requests; the adapter that users begin with."""

    policy: Policy
    pairs: PairStore
    utilities: Mapping[str, Utility]
    ordinary: list[str]
    facts: list[Fact]
    reviews: Mapping[str, Review]
    rules: Patterns | None
    start: ForeignAdapter | None = None


def read_inputs(config: Config, selection: UserSelection | None = None) -> RunInputs:
    """Reads the files of a config, without a tokenizer; a run that has begun has a `selection` of its users.

    Raises InputError with the problems of all of them.
    """
    problems: list[Problem] = []
    policy, pairs, utilities, ordinary = None, None, dict[str, Utility](), list[str]()
    facts: list[Fact] = []
    reviews: dict[str, Review] = {}
    rules: Patterns | None = None
    start: ForeignAdapter | None = None
    with collecting(problems):
        policy = Policy.of(config.policy, sequential=config.gate.sequential)
    with collecting(problems):
        pairs = PairStore(config.users.path, config.users.heldout, selection)
    with collecting(problems):
        utilities = read_utilities(config.evaluation.utilities) if config.evaluation.utilities else {}
    with collecting(problems):
        ordinary = ordinary_of(config)
    with collecting(problems):
        facts = facts_of(config)
    with collecting(problems):
        reviews = read_reviews(config.screening.reviews) if config.screening.reviews else {}
    if config.basis is not None:
        with collecting(problems):
            read_ordinary(config.basis.prompts)
    if policy is not None and config.screening.rules is not None:
        with collecting(problems):
            rules = Patterns.read(config.screening.rules, policy.categories)
    if config.users.start is not None:
        with collecting(problems):
            start = read_foreign(config.users.start, config.lora.rank)
    if policy is None or pairs is None or problems:
        raise InputError(problems)
    return RunInputs(policy, pairs, utilities, ordinary, facts, reviews, rules, start)


def ordinary_of(config: Config) -> list[str]:
    """The ordinary prompts that a config names. Raises InputError where they cannot be read."""
    return read_ordinary(config.evaluation.ordinary) if config.evaluation.ordinary else []


def facts_of(config: Config) -> list[Fact]:
    """The factual questions that a config names. Raises InputError where they cannot be read."""
    facts = config.evaluation.facts
    if facts is None:
        return []
    return bundled_facts() if facts == "bundled" else read_facts(Path(facts))
