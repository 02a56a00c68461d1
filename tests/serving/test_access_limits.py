from __future__ import annotations

import pytest

from persona_rlhf.serving.access import Limits, RateLimiter
from persona_rlhf.serving.openai_api import APIError


def test_a_minutes_worth_at_once_then_as_it_refills():
    now = [100.0]
    limiter = RateLimiter(Limits(rate=3), clock=lambda: now[0])
    for _ in range(3):
        limiter.count("ann")
    with pytest.raises(APIError) as error:
        limiter.count("ann")
    assert (error.value.status, error.value.retry_after) == (429, 20)
    limiter.count("bob")  # the one does not pay for the other
    now[0] += 19.9
    with pytest.raises(APIError) as error:
        limiter.count("ann")
    assert error.value.retry_after == 1
    now[0] += 0.1
    limiter.count("ann")
    now[0] += 3600
    for _ in range(3):
        limiter.count("ann")
    with pytest.raises(APIError):
        limiter.count("ann")


def test_places_are_limited_for_one_and_for_all_and_come_back():
    limiter = RateLimiter(Limits(concurrent=3, concurrent_each=2))
    with limiter.slot("ann"), limiter.slot("ann"):
        with pytest.raises(APIError, match="one user"), limiter.slot("ann"):
            pass
        with limiter.slot("bob"), pytest.raises(APIError, match="busy"), limiter.slot("cy"):
            pass
        with pytest.raises(ZeroDivisionError), limiter.slot("cy"):
            raise ZeroDivisionError
        with limiter.slot("cy"):
            pass
    for _ in range(5):
        with limiter.slot("ann"):
            pass
