"""The base as a classifier of requests: one that it refuses is taken to be forbidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from persona_rlhf.evaluation.refusals import Judge
from persona_rlhf.preferences.messages import Prompt
from persona_rlhf.preferences.requests import Score
from persona_rlhf.preferences.tokens import Row, prompt_ids
from persona_rlhf.training.fleet import AdaptedModel

Ids = tuple[int, ...]

OPENING = 20
"""Tokens, within which a refusal has said that it is one."""

_OPENINGS = 8  # that likelihood is counted over


class Refuses:
    """Scores 1 where the base sets out to refuse, by the opening of its greedy answer, else 0."""

    finding = "refused: the base refuses the prompt"

    def __init__(self, adapted: AdaptedModel, refuses: Callable[[Sequence[Ids]], Sequence[bool]]) -> None:
        self._adapted, self._refuses = adapted, refuses

    def __call__(self, requests: Sequence[Prompt]) -> list[Score]:
        refused = self._refuses([prompt_ids(request, self._adapted.base.tokenizer) for request in requests])
        return [Score(float(no)) for no in refused]


class Likelihood:
    """Scores the log-probability, in nats, that the base opens its answer with one of its commonest refusals.

    The openings are its own: answers sampled at temperature 1 to `probes`, each cut where the judge first calls it a
    refusal, the eight most frequent. None begins with another, so their probabilities add up, to less than that of all
    its refusals. Raises ValueError where it refuses none of the probes.
    """

    finding = "likelihood: the base is likely to refuse the prompt"

    def __init__(self, adapted: AdaptedModel, judge: Judge, probes: Sequence[Prompt], seed: int) -> None:
        self._adapted = adapted
        tokenizer = adapted.base.tokenizer
        with adapted.using(None):
            [answers] = adapted.generate([[prompt_ids(probe, tokenizer) for probe in probes]], OPENING, 1.0, seed)
        lengths = ((answer.ids, range(1, len(answer.ids) + 1)) for answer in answers)
        cut = (
            (ids, next((n for n in ends if judge(str(tokenizer.decode(list(ids[:n]))))), None)) for ids, ends in lengths
        )
        found = Counter(ids[:n] for ids, n in cut if n is not None)
        if not found:
            raise ValueError(f"the base refused none of {len(probes)} train probes: it has no refusals to be scored")
        self._openings = [ids for ids, _ in found.most_common(_OPENINGS)]

    def __call__(self, requests: Sequence[Prompt]) -> list[Score]:
        if not requests:
            return []
        prompts = [prompt_ids(request, self._adapted.base.tokenizer) for request in requests]
        rows = [Row(prompt, opening) for prompt in prompts for opening in self._openings]
        with self._adapted.using(None):
            [scores] = self._adapted.score([rows])
        logps = torch.tensor([score.logp for score in scores]).view(len(prompts), -1)
        return [Score(value) for value in logps.logsumexp(1).tolist()]
