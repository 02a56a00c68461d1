"""`evaluate --base MODEL`: what a base does before anyone personalises it, from the base and a policy alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_rlhf.config import checked
from persona_rlhf.evaluation.gate import POOLED, Count, demands_of, shortfalls
from persona_rlhf.evaluation.power import chance_of_passing
from persona_rlhf.evaluation.refusals import BaseAnswers, Prompt, answer_text
from persona_rlhf.evaluation.retention import read_ordinary, some, twins
from persona_rlhf.evaluation.settings import EvaluationSettings, GateSettings
from persona_rlhf.evaluation.standing import Share
from persona_rlhf.inputs.section import Section
from persona_rlhf.inputs.yaml_text import parse_yaml
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.settings import PolicySettings
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.pairs import Message
from persona_rlhf.preferences.tokens import prompt_ids
from persona_rlhf.training.base import Base, load_base
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import BaseSettings, LoraSettings

REAL = Path("configs/policy/real/tier_one.yaml")
"""What a base is asked where no policy is named: tier one with the bank for real models."""
UNKNOWN = "unknown (say it with base.aligned_by=...)"


class CardSettings(Section):
    """What can be set of a base's page: the sections of a config that speak of the base alone."""

    seed: int = Field(0, ge=0, description="Seed of the sampled answers.")
    base: BaseSettings
    policy: PolicySettings = Field(default_factory=lambda: PolicySettings(documents=[REAL]))
    gate: GateSettings = GateSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


class BaseCard(NamedTuple):
    """Greedy answers to `certify` probes with the gate's bounds, answers at temperature 1 to `dev` probes, and refusals
    of harmless prompts. `chance`: that an adapter which refuses just as the base does passes a look of the gate."""

    base: Base
    aligned_by: str | None
    policy_hash: str
    level: float
    certify: dict[str, Count]
    sampled: dict[str, Share]
    twins: Share
    ordinary: Share
    chance: float
    shortfalls: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "base": {"name": self.base.name, "sha256": self.base.weights_hash, "aligned_by": self.aligned_by},
            "policy_hash": self.policy_hash,
            "confidence": 1 - self.level,
            "certify": {name: count._asdict() | {"passes": count.passes} for name, count in self.certify.items()},
            "sampled": {name: share.to_json() for name, share in self.sampled.items()},
            "over_refusal": {"twins": self.twins.to_json(), "ordinary": self.ordinary.to_json()},
            "chance_of_passing": round(self.chance, 6),
            "certifiable": not self.shortfalls,
            "shortfalls": self.shortfalls,
        }


def base_card(model: str, overrides: Sequence[str]) -> BaseCard:
    """Asks a base what a run would ask of it, and trains nothing. Raises InputError for whatever is wrong."""
    settings = checked(CardSettings, parse_yaml("{}", "--base"), [f"base.model={json.dumps(model)}", *overrides])
    policy = Policy.read(settings.policy.documents)
    ordinary = read_ordinary(settings.evaluation.ordinary) if settings.evaluation.ordinary else []
    base = load_base(settings.base)
    adapted = AdaptedModel(base, LoraSettings())
    try:
        return _asked(adapted, policy, ordinary, settings)
    finally:
        adapted.close()


def _asked(adapted: AdaptedModel, policy: Policy, ordinary: Sequence[str], settings: CardSettings) -> BaseCard:
    def ids(text: str) -> Prompt:
        return prompt_ids((Message("user", text),), adapted.base.tokenizer)

    demands, tokens = demands_of(policy, settings.gate), settings.gate.max_new_tokens
    answers = BaseAnswers(adapted, is_refusal, tokens)

    def refused(texts: Sequence[str]) -> list[bool]:
        return answers.refused([ids(text) for text in texts])

    def of(split: str) -> dict[str, list[str]]:
        probes = policy.probes(split)  # type: ignore[arg-type]
        return {name: [p.prompt for p in probes if p.category == name] for name in demands.categories}

    outcomes = {name: refused(prompts) for name, prompts in of("certify").items()}
    pooled, counts = demands.count(outcomes, outcomes)
    sizes = {name: len(own) for name, own in outcomes.items()}
    rates = {name: sum(own) / len(own) if own else 0.0 for name, own in outcomes.items()}
    sampled = {}
    with adapted.using(None):
        for name, prompts in of("dev").items():
            [written] = adapted.generate([[ids(prompt) for prompt in prompts]], tokens, 1.0, settings.seed)
            sampled[name] = Share(len(prompts), sum(is_refusal(answer_text(adapted, answer)) for answer in written))
    most = settings.evaluation.harmless_prompts
    near = some(twins([*policy.probes("dev"), *policy.probes("certify")]), most)
    plain = some(ordinary, most)
    return BaseCard(
        adapted.base,
        settings.base.aligned_by,
        policy.hash,
        demands.level,
        {POOLED: pooled, **counts},
        sampled,
        Share(len(near), sum(refused(near))),
        Share(len(plain), sum(refused(plain))),
        chance_of_passing(demands, sizes, rates),
        [f"{problem.key}: {problem.sentence}" for problem in shortfalls(demands, outcomes)],
    )


def render(card: BaseCard) -> Group:
    """The page for people."""
    heads = ("probes", "refused, greedy", "lower bound", "asked", "refused at temperature 1 (dev)")
    table = Table(*heads, title=f"{card.base.name}, before anyone personalises it")
    for name, count in card.certify.items():
        bound = f"{count.lower_bound:.3f}"
        table.add_row(
            "all of tier one" if name == POOLED else name,
            str(Share(count.n, count.refused)),
            bound if count.passes else f"[red]{bound}[/]",
            f"{count.min_refusal:g}",
            str(card.sampled.get(name, "")),
            end_section=name == POOLED,
        )
    lines = [
        f"Bounds hold at confidence {1 - card.level:.4g}. Harmless prompts refused: twins of probes {card.twins}; "
        f"ordinary {card.ordinary}.",
        f"An adapter that refuses just as this base does passes a look of the gate with a chance of {card.chance:.1%}.",
        f"Whose preferences aligned it: {card.aligned_by or UNKNOWN}.",
        *(f"Not certifiable: {sentence}" for sentence in card.shortfalls),
    ]
    return Group(table, *(Text(line) for line in lines))
