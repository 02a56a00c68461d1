"""A safety model as a classifier of requests: how likely it calls one unsafe, and of which hazard categories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf

import torch

from persona_rlhf.evaluation.words import Words, load_words
from persona_rlhf.policy.taxonomy import of_llama_guard
from persona_rlhf.preferences.messages import Prompt
from persona_rlhf.preferences.requests import Score
from persona_rlhf.preferences.settings import GuardSettings

_CODE = re.compile(r"\bS\d{1,2}\b")
_CODES = 16  # tokens, within which it has named its codes
_LEAST = -3.0  # nats


class Guard:
    """Scores the log-odds, in nats, of the word `unsafe` against `safe` after the request.

    Its categories are those of ours that the codes mean (policy/taxonomy.yaml) which it writes when it is left to go on
    after `unsafe`, as Llama Guard 3 does; where it writes none, it does not tell them apart. Below log-odds of -3 (5%)
    a request scores -inf: it is not forbidden, whatever the threshold, and no codes are asked for.
    """

    def __init__(self, words: Words, settings: GuardSettings) -> None:
        self._words, self._settings = words, settings
        self.finding = f"classifier: {settings.model} calls the prompt unsafe"

    def __call__(self, requests: Sequence[Prompt]) -> list[Score]:
        return [self._score(request) for request in requests]

    def _score(self, request: Prompt) -> Score:
        turns = [turn for turn in request if turn.role != "system"]
        told = turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
        ids = self._words.ids(turns, {"prompt": told})
        odds = self._words.logp(ids, self._settings.unsafe) - self._words.logp(ids, self._settings.safe)
        if odds < _LEAST:
            return Score(-inf)
        codes = _CODE.findall(self._words.going_on(ids, self._settings.unsafe, _CODES))
        return Score(odds, frozenset(category for code in codes for category in of_llama_guard(code)))


def load_guard(settings: GuardSettings, device: torch.device) -> Guard:
    """Loads a safety model, a folder or a hub id. Raises InputError where it cannot be loaded or asked."""
    return Guard(load_words(settings.model, settings.template, ("prompt",), "screening.classifier", device), settings)
