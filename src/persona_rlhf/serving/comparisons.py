"""Comparisons of the feedback page: two sampled answers to a prompt, shown in random order until a user chooses."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.data.choice_ledger import BASE, POLICY, Choice, Consent, Verdict
from persona_rlhf.data.pairs import Message
from persona_rlhf.policy.judges import shingles
from persona_rlhf.release.results import Result
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, TextGenerator
from persona_rlhf.serving.policy_filter import PolicyFilter, join_chunks

SOURCE = "collect"
"""The source of pairs that come from the page."""

_TEMPERATURE = 0.8  # greedy answers would be the same
_SEEDS = 1 << 31


class SampledAnswer(NamedTuple):
    """A text, its author (an adapter's weights by their sha256, BASE or POLICY), and the seed of its sampling."""

    text: str
    author: str
    seed: int


@dataclass
class AnswerPair:
    """A prompt and two answers in the order in which the page shows them, and the time that the user spends on it."""

    user_id: str
    prompt: str
    left: SampledAnswer
    right: SampledAnswer
    base: str  # hash of the base's weights
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    seconds: float = 0.0
    shown_at: float | None = None  # of the monotonic clock; None while it is paused

    @property
    def same(self) -> bool:
        """Whether the answers do not differ, so that neither can be preferred."""
        return self.left.text == self.right.text

    def show(self) -> None:
        """Starts the clock, if it stands."""
        if self.shown_at is None:
            self.shown_at = time.monotonic()

    def pause(self) -> None:
        """Stops the clock."""
        if self.shown_at is not None:
            self.seconds += time.monotonic() - self.shown_at
            self.shown_at = None

    def decided(self, verdict: Verdict, reason: str, consent: Consent) -> Choice:
        """The user's choice."""
        self.pause()
        return Choice(
            id=self.id,
            user_id=self.user_id,
            prompt=self.prompt,
            left=self.left.text,
            right=self.right.text,
            left_by=self.left.author,
            right_by=self.right.author,
            left_seed=self.left.seed,
            right_seed=self.right.seed,
            base=self.base,
            verdict=verdict,
            reason=reason,
            at=now(),
            seconds=round(self.seconds, 1),
            consent=consent,
            source=SOURCE,
        )

    @staticmethod
    def again(choice: Choice) -> AnswerPair:
        """The comparison of an undone choice, under a new id."""
        return AnswerPair(
            choice.user_id,
            choice.prompt,
            SampledAnswer(choice.left, choice.left_by, choice.left_seed),
            SampledAnswer(choice.right, choice.right_by, choice.right_seed),
            choice.base,
        )


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

    def adapter(self, user_id: str) -> AdmittedAdapter | None:
        """The user's adapter that may be served at present; None where there is none, which means the base."""
        self._access.refresh()
        result: Result | None = self._access.results.get(slug(user_id))
        if result is None or result.user_id != user_id or not result.has_adapter:
            return None
        try:
            return self._access.admit(result.slug)
        except APIError:  # `access` logs the reason
            return None

    def compare(self, user_id: str, prompt: str) -> AnswerPair:
        """The two of several sampled answers that have the fewest words in common, in random order.

        Like answers teach little. Both are equal only where all samples are. Raises APIError where the engine cannot
        answer the prompt.
        """
        adapter = self.adapter(user_id)
        seeds = [secrets.randbelow(_SEEDS) for _ in range(self._candidates)]
        answers = self._answers(user_id, adapter, prompt, seeds)
        first, second = min(combinations(answers, 2), key=lambda pair: _likeness(pair[0].text, pair[1].text))
        left, right = (first, second) if secrets.randbelow(2) else (second, first)
        return AnswerPair(user_id, prompt, left, right, self._base)

    def _answers(
        self, user_id: str, adapter: AdmittedAdapter | None, prompt: str, seeds: Sequence[int]
    ) -> list[SampledAnswer]:
        """Answers that are all started before the first is read, so that they are generated together."""
        messages = (Message("user", prompt),)
        started = [
            self._policy_filter.answer(
                self._generator, user_id, adapter, messages, SamplingParams(self._most, _TEMPERATURE, seed=seed)
            )
            for seed in seeds
        ]
        answers = [join_chunks(chunks) for chunks in started]
        return [
            SampledAnswer(answer.text, _author(answer, adapter), seed)
            for answer, seed in zip(answers, seeds, strict=True)
        ]


def _likeness(one: str, other: str) -> float:
    """The share of neighbouring words that two texts have in common; above 1 for equal texts."""
    if one == other:
        return 2.0
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def _author(answer: TextChunk, adapter: AdmittedAdapter | None) -> str:
    if answer.filtered in ("redirect", "fallback"):
        return POLICY
    return BASE if adapter is None or answer.filtered == "base" else adapter.weights_sha256


class OpenComparisons:
    """The comparison that each user has before them, in memory: one per user, however many pages are open."""

    def __init__(self, barred: Callable[[], Collection[str]]) -> None:
        """`barred` gives the pseudonyms of forgotten users, whose comparisons are dropped."""
        self._open: dict[str, AnswerPair] = {}
        self._barred = barred
        self._lock = threading.Lock()

    def of(self, user_id: str) -> AnswerPair | None:
        """The user's comparison."""
        return self._open.get(user_id)

    def put(self, comparison: AnswerPair) -> None:
        """Opens a comparison in place of the user's last one."""
        with self._lock:
            barred = self._barred()
            self._open = {user: one for user, one in self._open.items() if pseudonym(user) not in barred}
            self._open[comparison.user_id] = comparison

    def drop(self, user_id: str, comparison_id: str | None = None) -> AnswerPair | None:
        """Closes the user's comparison, or the one of this id only; returns it."""
        with self._lock:
            comparison = self._open.get(user_id)
            if comparison is None or comparison_id not in (None, comparison.id):
                return None
            return self._open.pop(user_id)


class Suggestions:
    """Prompts for users who have none in mind, for each user in another order."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = list(dict.fromkeys(prompts))

    def of(self, user_id: str, answered: Collection[str], page: int = 0, size: int = 3) -> list[str]:
        """Some prompts that the user has not answered; `page` leads to others."""
        order = sorted(set(self._prompts) - set(answered), key=lambda text: _position(user_id, text))
        start = page * size % max(1, len(order))
        return [*order[start:], *order[:start]][:size]


def _position(user_id: str, text: str) -> bytes:
    return hashlib.blake2b(f"{user_id}\x1f{text}".encode(), digest_size=8).digest()
