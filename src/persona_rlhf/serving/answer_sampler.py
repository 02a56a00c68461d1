"""Samples the answers of the feedback page, from a user's own adapter or from the base."""

from __future__ import annotations

import secrets
from functools import partial

from persona_rlhf.common.files import slug
from persona_rlhf.data.choice_ledger import BASE, POLICY
from persona_rlhf.data.pairs import Message
from persona_rlhf.release.results import Result
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.comparisons import AnswerPair, SampledAnswer
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, TextGenerator
from persona_rlhf.serving.pair_writing import Candidate, PairWriting
from persona_rlhf.serving.policy_filter import PolicyFilter

_TEMPERATURE = 0.8  # greedy answers would be the same
_SEEDS = 1 << 31


class AnswerSampler:
    """Samples answers from a user's released adapter, or from the base for a user without one."""

    def __init__(
        self,
        generator: TextGenerator,
        access: AdapterAccess,
        policy_filter: PolicyFilter,
        base: str,
        max_tokens: int,
        candidates: int = 4,
    ) -> None:
        """`base` is the hash of the base's weights; `candidates` answers are sampled, of which two are shown."""
        self._generator, self._access, self._policy_filter = generator, access, policy_filter
        self._base, self._most, self._candidates = base, max_tokens, candidates

    def result(self, user_id: str) -> Result | None:
        """The user's line in the run's results; None for a user that the run has not."""
        self._access.refresh()
        result: Result | None = self._access.results.get(slug(user_id))
        return result if result is not None and result.user_id == user_id else None

    def adapter(self, user_id: str) -> AdmittedAdapter | None:
        """The user's adapter that may be served at present; None where there is none, which means the base."""
        result = self.result(user_id)
        if result is None or not result.has_adapter:
            return None
        try:
            return self._access.admit(result.slug)
        except APIError:  # `access` logs the reason
            return None

    def begin(self, user_id: str, prompt: str) -> PairWriting:
        """A pair of answers, which is to be written: of several the two whose first words are least alike.

        Like answers teach little. The order is random. Raises APIError where the engine cannot answer the prompt.
        """
        adapter = self.adapter(user_id)
        candidates = self._candidates_of(user_id, adapter, prompt)
        empty = SampledAnswer("", "", 0)
        pair = AnswerPair(user_id, prompt, empty, empty, self._base, finished=False)
        return PairWriting(pair, candidates, partial(_author, adapter=adapter), secrets.randbelow(2))

    def _candidates_of(self, user_id: str, adapter: AdmittedAdapter | None, prompt: str) -> list[Candidate]:
        """Answers that are all started before the first is read, so that they are generated together."""
        messages = (Message("user", prompt),)
        seeds = [secrets.randbelow(_SEEDS) for _ in range(self._candidates)]
        sampling = [SamplingParams(self._most, _TEMPERATURE, seed=seed, stream=True) for seed in seeds]
        answer = partial(self._policy_filter.answer, self._generator, user_id, adapter, messages)
        return [Candidate(answer(params), seed) for params, seed in zip(sampling, seeds, strict=True)]


def _author(answer: TextChunk, adapter: AdmittedAdapter | None) -> str:
    if answer.filtered in ("redirect", "fallback"):
        return POLICY
    return BASE if adapter is None or answer.filtered == "base" else adapter.weights_sha256
