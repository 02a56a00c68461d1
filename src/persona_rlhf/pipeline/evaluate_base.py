"""`evaluate --base`: refusals, over-refusals and perplexity of a base alone, before any run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import exp, fsum, sqrt
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_rlhf.config.evaluation import EvaluationSettings, GateSettings
from persona_rlhf.config.experiment import Config, PolicySettings, checked
from persona_rlhf.config.loader import Section, parse_yaml
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids, text_row
from persona_rlhf.evaluation.answer_judge import judges_of
from persona_rlhf.evaluation.gate import POOLED, demands_of, shortfalls
from persona_rlhf.evaluation.power import chance_of_passing
from persona_rlhf.evaluation.prompt_sets import OrdinaryExample, read_ordinary, some, twins
from persona_rlhf.evaluation.refusals import OPENING_TOKENS, BaseAnswers, PromptIds, answer_row, answer_text
from persona_rlhf.evaluation.spending import next_share
from persona_rlhf.evaluation.statistics import Count, wilson
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.pipeline.inputs import REAL_POLICY
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent, watched
from persona_rlhf.policy.composition import Composition
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy


class RefusalShare(NamedTuple):
    """Refusals among n answers, with a 95% Wilson interval."""

    n: int
    refused: int

    def to_json(self) -> dict[str, Any]:
        low, high = wilson(self.refused, self.n) if self.n else (0.0, 1.0)
        return {"n": self.n, "refused": self.refused, "low": round(low, 6), "high": round(high, 6)}

    def __str__(self) -> str:
        if not self.n:
            return "nothing asked"
        low, high = wilson(self.refused, self.n)
        return f"{self.refused} of {self.n}: {self.refused / self.n:.1%} ({low:.1%} to {high:.1%})"


class TextScore(NamedTuple):
    """Log-probability of a text in nats, and its tokens."""

    logp: float
    tokens: int


class BaseEvaluation(NamedTuple):
    """Refusals of a base in greedy answers, by hazard category (pooled first) and by novelty of the probe; refusals of
    harmless prompts, with twins by novelty; log-probabilities of ordinary texts."""

    refusals: dict[str, RefusalShare]
    unseen: dict[str, RefusalShare]
    twins: RefusalShare
    unseen_twins: dict[str, RefusalShare]
    ordinary: RefusalShare
    texts: list[TextScore]

    @property
    def perplexity(self) -> float:
        """exp(-sum log p / tokens) of the ordinary texts."""
        return exp(-fsum(text.logp for text in self.texts) / sum(text.tokens for text in self.texts))

    def to_json(self) -> dict[str, Any]:
        def shares(by_name: dict[str, RefusalShare]) -> dict[str, Any]:
            return {name: share.to_json() for name, share in by_name.items()}

        return {
            "refusals": shares(self.refusals),
            "unseen": shares(self.unseen),
            "over_refusal": {
                "twins": self.twins.to_json(),
                "unseen": shares(self.unseen_twins),
                "ordinary": self.ordinary.to_json(),
            },
            "perplexity": round(self.perplexity, 6),
            "texts": {"n": len(self.texts), "tokens": sum(text.tokens for text in self.texts)},
        }


def measure_base(
    adapted: AdaptedModel, probes: Sequence[Probe], ordinary: Sequence[str], texts: Sequence[Row], max_new_tokens: int
) -> BaseEvaluation:
    """Measures the base, adapters off, on probes, their twins, ordinary prompts and ordinary texts."""
    answers, to_harmless = (BaseAnswers(adapted, is_refusal, max_new_tokens, harmless=kind) for kind in (False, True))
    refused = dict(zip(probes, answers.refused([_ids(adapted, probe.prompt) for probe in probes]), strict=True))

    def share(of: dict[Probe, bool]) -> RefusalShare:
        return RefusalShare(len(of), sum(of.values()))

    def harmless(prompts: Iterable[str]) -> RefusalShare:
        each = list(dict.fromkeys(prompts))
        return RefusalShare(len(each), sum(to_harmless.refused([_ids(adapted, prompt) for prompt in each])))

    categories = dict.fromkeys(probe.category for probe in probes)
    kinds = dict.fromkeys(probe.novelty for probe in probes)
    with adapted.using(None):
        (scores,) = adapted.score([list(texts)])
    return BaseEvaluation(
        {POOLED: share(refused)}
        | {name: share({p: r for p, r in refused.items() if p.category == name}) for name in categories},
        {name: share({p: r for p, r in refused.items() if p.novelty == name}) for name in kinds},
        harmless(twins(probes)),
        {name: harmless(twins(probe for probe in probes if probe.novelty == name)) for name in kinds},
        harmless(ordinary),
        [TextScore(score.logp, score.tokens) for score in scores],
    )


def ordinary_texts(adapted: AdaptedModel, held: Sequence[OrdinaryExample], max_new_tokens: int, seed: int) -> list[Row]:
    """Ordinary text as rows: the written answers of the prompts, or else answers of the base at temperature 1.

    With answers of the base, the log of a ratio of perplexities is the divergence from the base, in nats a token.
    """
    written = [(row.prompt, row.answer) for row in held if row.answer is not None]
    if written:
        rows = [text_row(prompt, answer, adapted.base.tokenizer) for prompt, answer in written]
    else:
        prompts = [_ids(adapted, row.prompt) for row in held]
        with adapted.using(None):
            (sampled,) = adapted.generate([prompts], max_new_tokens, 1.0, seed)
        rows = [answer_row(adapted, prompt, answer) for prompt, answer in zip(prompts, sampled, strict=True)]
    return [row for row in rows if row.completion and row.length <= adapted.base.context]


class Ratio(NamedTuple):
    """A ratio with its 95% interval."""

    value: float
    low: float
    high: float


def perplexity_ratio(before: Sequence[TextScore], after: Sequence[TextScore]) -> Ratio:
    """Perplexity after over before on the same texts, each of them an independent draw.

    The log of it is a ratio of sums, sum of differences over sum of tokens; its variance is that of the linearised
    ratio (Cochran 1977, eq. 6.13).
    """
    tokens = [text.tokens for text in before]
    risen = [old.logp - new.logp for old, new in zip(before, after, strict=True)]
    log_ratio, n = fsum(risen) / sum(tokens), len(tokens)
    spread = fsum((rise - log_ratio * count) ** 2 for rise, count in zip(risen, tokens, strict=True))
    half = NormalDist().inv_cdf(0.975) * sqrt(spread * n / max(1, n - 1)) / sum(tokens)
    return Ratio(exp(log_ratio), exp(log_ratio - half), exp(log_ratio + half))


def _ids(adapted: AdaptedModel, text: str, system: str = "") -> PromptIds:
    before = (Message("system", system),) if system else ()
    return prompt_ids((*before, Message("user", text)), adapted.base.tokenizer)


UNKNOWN = "unknown (say it with base.aligned_by=...)"


class CardSettings(Section):
    """Settings of `evaluate --base`: the sections of a config that concern the base alone."""

    seed: int = Field(0, ge=0, description="Seed of the sampled answers.")
    base: BaseSettings
    policy: PolicySettings = Field(default_factory=lambda: PolicySettings(documents=[REAL_POLICY]))
    gate: GateSettings = GateSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


class BaseCard(NamedTuple):
    """Measurements of a base: greedy answers to `certify` probes with the gate's bounds, answers at temperature 1 to
    `dev` probes, refusals of harmless prompts.

    `chance` is the probability that an adapter with the base's refusal rates passes one test of the gate.
    """

    base: Base
    aligned_by: str | None
    policy_hash: str
    level: float
    certify: dict[str, Count]
    sampled: dict[str, RefusalShare]
    twins: RefusalShare
    ordinary: RefusalShare
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


def base_card(model: str, overrides: Sequence[str], on_progress: OnProgress = silent) -> BaseCard:
    """Measures a base as a run would, without training. Raises InputError with the problems of the inputs."""
    settings = checked(CardSettings, parse_yaml("{}", "--base"), [f"base.model={json.dumps(model)}", *overrides])
    policy = Policy.of(settings.policy, sequential=settings.gate.sequential)
    ordinary = read_ordinary(settings.evaluation.ordinary) if settings.evaluation.ordinary else []
    base = load_base(settings.base)
    adapted = AdaptedModel(base, LoraSettings())
    try:
        return _measured(adapted, policy, ordinary, settings, on_progress)
    finally:
        adapted.close()


def base_refuses(config: Config, request: str) -> bool:
    """Whether the base of a config refuses a request, by the opening of its greedy answer, as screening asks it."""
    base = load_base(config.base)
    adapted = AdaptedModel(base, config.lora)
    try:
        prompt = prompt_ids((Message("user", request),), base.tokenizer)
        with adapted.using(None):
            [[opening]] = adapted.generate([[prompt]], min(OPENING_TOKENS, config.gate.max_new_tokens))
        return is_refusal(answer_text(adapted, opening))
    finally:
        adapted.close()


def _measured(
    adapted: AdaptedModel, policy: Policy, ordinary: Sequence[str], settings: CardSettings, on_progress: OnProgress
) -> BaseCard:
    demands, tokens = demands_of(policy, settings.gate).at_look(next_share([])), settings.gate.max_new_tokens
    judges, texts = judges_of(settings.gate, adapted.base.device), dict[PromptIds, str]()
    answers, to_harmless = (
        BaseAnswers(adapted, judges.first, tokens, judges.second, texts, harmless=kind) for kind in (False, True)
    )

    def refused(prompts: Sequence[str], of: BaseAnswers) -> list[bool]:
        texts.update((_ids(adapted, prompt), prompt) for prompt in prompts)
        return of.refused([_ids(adapted, prompt) for prompt in prompts])

    composition = Composition(policy, settings.seed)

    def composed(probe: Probe) -> PromptIds:
        ids = _ids(adapted, probe.prompt, composition.message(composition.system_prompt(""), probe))
        texts[ids] = probe.prompt
        return ids

    def of(split: str) -> dict[str, list[str]]:
        probes = policy.probes(split)  # type: ignore[arg-type]
        return {name: [p.prompt for p in probes if p.category == name] for name in demands.categories}

    most, probes = settings.evaluation.harmless_prompts, of("certify")
    near = some(twins([*policy.probes("dev"), *policy.probes("certify")]), most)
    plain = some(ordinary, most)
    texts_to_write = sum(map(len, [*probes.values(), *of("dev").values(), near, plain]))
    with watched([adapted], ProgressEvent("measuring"), on_progress, texts_to_write):
        outcomes = {
            name: answers.refused([composed(probe) for probe in policy.probes("certify") if probe.category == name])
            for name in probes
        }
        sampled, text_judge = {}, judges.text_judge()
        with adapted.using(None):
            for name, prompts in of("dev").items():
                [sampled_answers] = adapted.generate(
                    [[_ids(adapted, prompt) for prompt in prompts]], tokens, 1.0, settings.seed
                )
                sampled[name] = RefusalShare(
                    len(prompts), sum(a.finished and text_judge(answer_text(adapted, a)) for a in sampled_answers)
                )
        near_refused, plain_refused = sum(refused(near, to_harmless)), sum(refused(plain, to_harmless))
    pooled, counts, _ = demands.count_units(outcomes, outcomes)
    sizes = {name: len(refusals) for name, refusals in outcomes.items()}
    whole = demands.clusters.by_topic(outcomes)
    rates = {name: fmean(refusals) if refusals else 0.0 for name, refusals in whole.items()}
    return BaseCard(
        adapted.base,
        settings.base.aligned_by,
        policy.hash,
        demands.level,
        {POOLED: pooled, **counts},
        sampled,
        RefusalShare(len(near), near_refused),
        RefusalShare(len(plain), plain_refused),
        chance_of_passing(demands, sizes, rates),
        [f"{problem.key}: {problem.sentence}" for problem in shortfalls(demands, outcomes)],
    )


def render(card: BaseCard) -> Group:
    """The measurements as tables."""
    heads = ("probes", "refused, greedy", "lower bound", "asked", "refused at temperature 1 (dev)")
    table = Table(*heads, title=f"{card.base.name}, before anyone personalises it")
    for name, count in card.certify.items():
        bound = f"{count.lower_bound:.3f}"
        table.add_row(
            "all of tier one" if name == POOLED else name,
            str(RefusalShare(count.n, count.refused)),
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
