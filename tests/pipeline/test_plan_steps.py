from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.plan_steps import SampledTime, fit, timed
from tests.models.tiny import tiny_base


@given(fixed=st.floats(0.0, 5.0), each=st.floats(1e-6, 1e-2), sizes=st.sets(st.integers(1, 10**5), min_size=2))
def test_the_fit_finds_a_step_s_fixed_cost_and_its_cost_a_token(fixed, each, sizes):
    found = fit(sorted(sizes), [fixed + each * size for size in sorted(sizes)])
    for size in sizes:
        assert found.of(size) == pytest.approx(fixed + each * size, rel=1e-3)


def test_no_part_of_a_step_s_cost_is_negative():
    assert fit([100, 200], [1.0, 3.0]).fixed == 0  # the line would start below zero
    assert fit([100, 200], [1.0, 3.0]).of(150) == pytest.approx(2.0)
    assert fit([100, 200], [3.0, 1.0]).each == 0  # larger was faster: noise
    assert fit([100, 200], [3.0, 1.0]).of(10**6) == 2.0
    assert fit([100, 100], [1.0, 2.0]).of(200) == pytest.approx(3.0)


@given(fixed=st.floats(1e-3, 1.0), each=st.floats(1e-4, 1e-2), every=st.integers(1, 64), rest=st.floats(0.0, 5.0))
def test_the_steps_of_a_small_sample_are_not_multiplied(fixed, each, every, rest):
    """A sample of 4 rows of 24 tokens, one of which ends after half of them; steps of all prompts have 100 rows."""
    rows = [4] * 12 + [3] * 12
    sampled = SampledTime(rows, [fixed + each * size for size in rows], rest)
    tokens = sum(rows) * every
    steps = 24 + (tokens - sum(rows)) / 100
    assert sampled.of_all(1 / every, 100) == pytest.approx(rest * every + fixed * steps + each * tokens, rel=1e-3)


def test_all_time_is_in_the_steps_or_beside_them():
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    step = adapted.step

    def work() -> None:
        time.sleep(0.05)
        adapted.generate([[(3, 4, 5), (6, 7)]], 6)

    clock = time.perf_counter()
    sampled = timed(adapted, work)
    whole = time.perf_counter() - clock
    assert sampled.rows == [2] * 5  # the first token comes from the pass over the prompts
    assert 0.05 <= sampled.rest <= whole - sum(sampled.seconds)
    assert all(seconds > 0 for seconds in sampled.seconds)
    assert adapted.step == step
