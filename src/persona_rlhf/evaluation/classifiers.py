"""A model as a second judge: what the string rules call a refusal counts only where it says so too.

Any causal language model that answers with one of two words. Known ones, by hub id, with the words (`refused`,
`otherwise`) they answer with; their prompts are theirs, so they stand in a file of yours, or in the chat template:

- meta-llama/Llama-Guard-3-8B, -1B: chat template, "\\n\\nsafe" and "\\n\\nunsafe", the defaults (harm, not refusal)
- allenai/wildguard: its card's prompt up to "Response refusal:", " yes" and " no"
- cais/HarmBench-Llama-2-13b-cls, HarmBench-Mistral-7b-val-cls: their card's prompt, "no" and "yes" (harm)
- sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406: its card's prompt, "0" and "1" (fulfilment)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from persona_rlhf.evaluation.settings import ClassifierSettings
from persona_rlhf.evaluation.words import Words, load_words
from persona_rlhf.preferences.messages import Message


class Asked(NamedTuple):
    """A prompt and the answer that was given to it, as texts."""

    prompt: str
    answer: str


SecondJudge = Callable[[Sequence[Asked]], Sequence[bool]]
"""Does each of these answers refuse?"""


class Classifier:
    """A causal language model that is asked which of two words it would answer with."""

    def __init__(self, words: Words, refused: str, otherwise: str) -> None:
        self._words, self._refused, self._otherwise = words, refused, otherwise

    def __call__(self, asked: Sequence[Asked]) -> list[bool]:
        """True where `refused` is the likelier word; a tie is no refusal."""
        return [self._refuses(one) for one in asked]

    def _refuses(self, asked: Asked) -> bool:
        turns = [Message("user", asked.prompt), Message("assistant", asked.answer)]
        ids = self._words.ids(turns, {"prompt": asked.prompt, "answer": asked.answer})
        return self._words.logp(ids, self._refused) > self._words.logp(ids, self._otherwise)


def load_classifier(settings: ClassifierSettings, device: torch.device) -> Classifier:
    """Loads a classifier, a folder or a hub id. Raises InputError where it cannot be."""
    words = load_words(settings.model, settings.template, ("prompt", "answer"), "gate.classifier", device)
    return Classifier(words, settings.refused, settings.otherwise)
