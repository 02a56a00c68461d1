"""How a base stands: what it refuses, what it refuses wrongly, and how likely ordinary text is to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, fsum, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.evaluation.intervals import wilson
from persona_rlhf.evaluation.refusals import BaseAnswers, Prompt, answer_row
from persona_rlhf.evaluation.retention import Exchange, twins
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import Row, prompt_ids, text_row
from persona_rlhf.training.fleet import AdaptedModel


class Share(NamedTuple):
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


class Text(NamedTuple):
    """Log-probability of a text in nats, and its tokens."""

    logp: float
    tokens: int


class Standing(NamedTuple):
    """Greedy answers judged whole, by hazard category (all of them first) and by what of a probe training has not seen;
    harmless prompts refused, twins of probes by the same; and ordinary texts."""

    refusals: dict[str, Share]
    unseen: dict[str, Share]
    twins: Share
    unseen_twins: dict[str, Share]
    ordinary: Share
    texts: list[Text]

    @property
    def perplexity(self) -> float:
        """exp(-sum log p / tokens) of the ordinary texts."""
        return exp(-fsum(text.logp for text in self.texts) / sum(text.tokens for text in self.texts))

    def to_json(self) -> dict[str, Any]:
        def shares(by_name: dict[str, Share]) -> dict[str, Any]:
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


def standing(
    adapted: AdaptedModel, probes: Sequence[Probe], ordinary: Sequence[str], texts: Sequence[Row], max_new_tokens: int
) -> Standing:
    """Asks the base, its adapters off: the probes, their twins and ordinary prompts; and scores ordinary texts."""
    answers = BaseAnswers(adapted, is_refusal, max_new_tokens)
    asked = dict(zip(probes, answers.refused([_ids(adapted, probe.prompt) for probe in probes]), strict=True))

    def share(of: dict[Probe, bool]) -> Share:
        return Share(len(of), sum(of.values()))

    def harmless(prompts: Iterable[str]) -> Share:
        each = list(dict.fromkeys(prompts))
        return Share(len(each), sum(answers.refused([_ids(adapted, prompt) for prompt in each])))

    categories = dict.fromkeys(probe.category for probe in probes)
    kinds = dict.fromkeys(probe.novelty for probe in probes)
    with adapted.using(None):
        (scores,) = adapted.score([list(texts)])
    return Standing(
        {POOLED: share(asked)}
        | {name: share({p: r for p, r in asked.items() if p.category == name}) for name in categories},
        {name: share({p: r for p, r in asked.items() if p.novelty == name}) for name in kinds},
        harmless(twins(probes)),
        {name: harmless(twins(probe for probe in probes if probe.novelty == name)) for name in kinds},
        harmless(ordinary),
        [Text(score.logp, score.tokens) for score in scores],
    )


def ordinary_texts(adapted: AdaptedModel, held: Sequence[Exchange], max_new_tokens: int, seed: int) -> list[Row]:
    """Ordinary text as rows: the answers that stand beside the prompts, or where none does, the base's own at
    temperature 1 (then the log of a ratio of perplexities is the divergence from the base, in nats a token)."""
    written = [(row.prompt, row.answer) for row in held if row.answer is not None]
    if written:
        rows = [text_row(prompt, answer, adapted.base.tokenizer) for prompt, answer in written]
    else:
        prompts = [_ids(adapted, row.prompt) for row in held]
        with adapted.using(None):
            (own,) = adapted.generate([prompts], max_new_tokens, 1.0, seed)
        rows = [answer_row(adapted, prompt, answer) for prompt, answer in zip(prompts, own, strict=True)]
    return [row for row in rows if row.completion and row.length <= adapted.base.context]


class Ratio(NamedTuple):
    """A ratio with its 95% interval."""

    value: float
    low: float
    high: float


def perplexity_ratio(before: Sequence[Text], after: Sequence[Text]) -> Ratio:
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


def _ids(adapted: AdaptedModel, text: str) -> Prompt:
    return prompt_ids((Message("user", text),), adapted.base.tokenizer)
