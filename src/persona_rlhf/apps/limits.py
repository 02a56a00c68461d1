"""How much one user, and all together, may ask of a server."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from persona_rlhf.apps.writing import Declined


class Limits(NamedTuple):
    """`body` in bytes, `tokens` of an answer, requests of one user a minute (`rate`), and answers written at the same
    time, of all users (`concurrent`) and of one (`concurrent_each`)."""

    body: int = 1 << 20
    tokens: int = 512
    rate: int = 60
    concurrent: int = 32
    concurrent_each: int = 4


class Turnstile:
    """Lets requests in, as far as the limits go. The rate is a bucket: a minute's worth at once, then as it refills."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, at this moment
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, slug: str) -> None:
        """One more request of a user. Raises Declined (429), with the seconds to wait, where he asks too often."""
        with self._lock:
            now, rate = self._clock(), self._limits.rate
            left, moment = self._buckets.get(slug, (float(rate), now))
            left = min(float(rate), left + (now - moment) * rate / 60)
            fine = left >= 1
            self._buckets[slug] = (left - fine, now)
        if not fine:
            wait = math.ceil((1 - left) * 60 / rate)
            raise Declined(429, f"At most {rate} requests a minute.", "rate_limit_exceeded", retry_after=max(1, wait))

    @contextmanager
    def inside(self, slug: str) -> Iterator[None]:
        """Holds a place while an answer is written. Raises Declined (429) where there is none."""
        with self._lock:
            if self._running[slug] >= self._limits.concurrent_each:
                sentence = f"At most {self._limits.concurrent_each} requests of one user at a time."
                raise Declined(429, sentence, "rate_limit_exceeded", retry_after=1)
            if self._running.total() >= self._limits.concurrent:
                raise Declined(429, "The server is busy.", "rate_limit_exceeded", retry_after=1)
            self._running[slug] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[slug] -= 1
                self._running += Counter()  # those who have left are forgotten
