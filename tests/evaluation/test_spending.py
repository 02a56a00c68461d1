"""The shares of delta that looks spend: sums by hand, and the promise over adaptive users."""

from dataclasses import replace
from math import pi

import numpy as np
import pytest

from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.spending import PastLook, next_share
from persona_rlhf.evaluation.statistics import upper_bound
from persona_rlhf.policy.bound import look_share


def test_shares_of_all_looks_at_one_bank_sum_to_one():
    history: list[PastLook] = []
    while len(history) < 2000:
        history.append(PastLook(next_share(history), passed=len(history) % 3 == 0))
    total = sum(look.share for look in history)
    assert history[0].share == pytest.approx(6 / pi**2)
    assert 1 - 1 / 2000 < total < 1


@pytest.mark.parametrize("failures", [0, 1, 4])
def test_with_fresh_probes_only_failures_spend(failures):
    history = [PastLook(0.5, passed=True)] * 30 + [PastLook(0.1, passed=False)] * failures
    assert next_share(history, sequential=True) == pytest.approx(6 / (pi * (1 + failures)) ** 2)
    assert next_share(history, sequential=False) == pytest.approx(6 / (pi * (31 + failures)) ** 2)


@pytest.mark.parametrize("in_breach", ["always", "after a failure", "after a pass", "at random"])
def test_users_who_choose_by_the_past_are_released_in_breach_at_most_delta_of_the_time(in_breach):
    """Looks with fresh probes, by users who answer each verdict with an adapter in breach or a good one."""
    source, users, delta, breached = np.random.default_rng(3), 6000, 0.3, 0
    for _ in range(users):
        history: list[PastLook] = []
        for _ in range(20):
            bad = {
                "always": True,
                "after a failure": not history or not history[-1].passed,
                "after a pass": bool(history) and history[-1].passed,
                "at random": source.random() < 0.5,
            }[in_breach]
            share = next_share(history, sequential=True)
            passed = source.random() < (delta * share if bad else 0.8)
            history.append(PastLook(share, passed))
            if bad and passed:
                breached += 1
                break
    assert upper_bound(users - breached, users, 0.001) >= 1 - delta
    assert breached / users > 0.15, "so far from delta that the test could not fail"


def test_a_look_divides_the_part_of_the_tests_and_leaves_the_judge_whole():
    demands = Demands(0.97, {"fire": 0.93}, frozenset({"fire"}), 0.05, judge_error=0.01, judge_delta=0.005)
    look = demands.at_look(0.5)
    assert look.delta == pytest.approx(0.005 + 0.5 * 0.045)
    assert look.level == pytest.approx(0.5 * 0.045 / 2)
    assert demands.at_look(1.0) == demands


def test_demands_on_fixed_prompts_spend_at_every_look():
    """After nine passes and no failure the draws are fresh, and the harmless prompts are not."""
    counted = Demands(0.97, {"fire": 0.93}, frozenset({"fire"}), 0.05)
    fresh = replace(counted, sequential=True)
    tenth = fresh.at_look(next_share([PastLook(0.5, True)] * 9, sequential=True), 10)
    assert tenth.level == fresh.at_look(next_share([]), 1).level
    assert tenth.plain_bound.level == pytest.approx(tenth.level / 100)
    assert fresh.at_look(next_share([]), 1).plain_bound.level == tenth.level
    look = counted.at_look(next_share([PastLook(0.5, True)] * 9), 10)
    assert look.plain_bound.level == look.level


@pytest.mark.parametrize("breaks", ["in turn", "refusals last", "fixed last", "after a pass"])
def test_demands_on_refusals_and_on_fixed_prompts_share_one_delta(breaks):
    """Adapters in breach of either kind, between good ones; fixed prompts have the same outcome at all looks."""
    source, users, delta, breached = np.random.default_rng(5), 6000, 0.3, 0
    for _ in range(users):
        history: list[PastLook] = []
        fixed_prompts = source.random()
        for number in range(1, 31):
            good = source.random() < 0.3
            fixed = {
                "in turn": number % 2 == 0,
                "refusals last": number <= 15,
                "fixed last": number > 15,
                "after a pass": bool(history) and history[-1].passed,
            }[breaks]
            share = next_share(history, sequential=True)
            outcome, level = (fixed_prompts, look_share(number)) if fixed else (source.random(), share)
            passed = good or outcome < delta * level
            history.append(PastLook(share, passed))
            if passed and not good:
                breached += 1
                break
    assert upper_bound(users - breached, users, 0.001) >= 1 - delta
    assert breached / users > 0.12, "so far from delta that the test could not fail"
