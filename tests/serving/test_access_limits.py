from __future__ import annotations

import pytest

from persona_rlhf.serving.access import Limits, RateLimiter
from persona_rlhf.serving.openai_api import APIError


def test_a_minutes_worth_at_once_then_as_it_refills():
    now = [100.0]
    turnstile = RateLimiter(Limits(rate=3), clock=lambda: now[0])
    for _ in range(3):
        turnstile.count("ann")
    with pytest.raises(APIError) as declined:
        turnstile.count("ann")
    assert (declined.value.status, declined.value.retry_after) == (429, 20)
    turnstile.count("bob")  # the one does not pay for the other
    now[0] += 19.9
    with pytest.raises(APIError) as declined:
        turnstile.count("ann")
    assert declined.value.retry_after == 1
    now[0] += 0.1
    turnstile.count("ann")
    now[0] += 3600
    for _ in range(3):
        turnstile.count("ann")
    with pytest.raises(APIError):
        turnstile.count("ann")


def test_places_are_limited_for_one_and_for_all_and_come_back():
    turnstile = RateLimiter(Limits(concurrent=3, concurrent_each=2))
    with turnstile.inside("ann"), turnstile.inside("ann"):
        with pytest.raises(APIError, match="one user"), turnstile.inside("ann"):
            pass
        with turnstile.inside("bob"), pytest.raises(APIError, match="busy"), turnstile.inside("cy"):
            pass
        with pytest.raises(ZeroDivisionError), turnstile.inside("cy"):
            raise ZeroDivisionError
        with turnstile.inside("cy"):
            pass
    for _ in range(5):
        with turnstile.inside("ann"):
            pass
