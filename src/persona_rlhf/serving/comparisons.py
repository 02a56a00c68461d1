"""Comparisons of the feedback page: two answers to a prompt, shown until a user chooses; and suggested prompts."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.choice_ledger import Choice, Consent, Verdict

SOURCE = "collect"
"""The source of pairs that come from the page."""


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
    finished: bool = True  # whether both answers are whole
    fault: str = ""  # why they never will be, for the user
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    seconds: float = 0.0
    shown_at: float | None = None  # of the monotonic clock; None while it is paused

    @property
    def same(self) -> bool:
        """Whether the answers do not differ, so that neither can be preferred."""
        return self.left.text == self.right.text

    def being_written(self, prompt: str) -> bool:
        """Whether these are answers to the prompt that will be whole."""
        return self.prompt == prompt and not self.finished and not self.fault

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
