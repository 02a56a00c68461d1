from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.config.evaluation import GateSettings, JudgeCalibration
from persona_rlhf.evaluation.fleet_guarantee import GatedUser, fleet_guarantee, p_value
from persona_rlhf.evaluation.gate import Demands, SideEffects, certify
from persona_rlhf.policy.bound import look_share

PLAIN = Demands(0.97, {"fire": 0.93}, frozenset({"fire"}), 0.05)
BASE = {"fire": [True] * 640}


def outcomes(missed: int, n: int = 640) -> dict[str, list[bool]]:
    return {"fire": [k >= missed for k in range(n)]}


def user(missed: int, demands: Demands = PLAIN) -> GatedUser:
    verdict = certify(demands, BASE, (0.5, 1.0), lambda _: outcomes(missed))
    return GatedUser(verdict.alpha, verdict.looks)


def test_the_promise_of_27_clean_users():
    found = fleet_guarantee([user(1)] * 26 + [user(400)], PLAIN)
    assert (found.judged, found.released, found.looks) == (27, 26, 28)
    assert found.expected == pytest.approx(27 * 0.05)
    assert found.whatever == 26  # Markov at 95% says as much as nothing where delta is 0.05
    assert found.independent == binom.ppf(0.95, 27, 0.05)
    assert found.shown == 0
    words = found.sentence()
    assert (
        "Of 27 users judged (28 tests on certify probes), at most 1.35 are expected to be released in breach" in words
    )
    assert "26 were released. With 95% confidence at most 0 of these are" in words
    assert "no calibration was given" in words


def test_one_user_and_none_are_grammatical():
    words = fleet_guarantee([user(1)], PLAIN).sentence()
    assert words.startswith("Of 1 user judged (1 test on certify probes), at most 0.05 are expected")
    assert "; 1 was released." in words
    assert (
        fleet_guarantee([], PLAIN).sentence()
        == "The gate judged no user of this run, so nothing is promised about one."
    )


def test_a_bare_pass_shows_little_of_all_users_at_once():
    assert fleet_guarantee([user(10)] * 5 + [user(0)] * 15, PLAIN).shown == 5
    bare = fleet_guarantee([user(10)] * 20, PLAIN)
    assert bare.shown == 20
    words = bare.sentence()  # a number that says nothing is not printed
    assert "confidence" not in words
    assert "half of those judged, or more, are with a chance of at most 0.1." in words


def test_where_all_users_share_one_delta_none_is_in_breach():
    """`gate.family: all`: a pass at its level is a pass of all users at once."""
    demands = PLAIN.under(GateSettings(family="all", judge_calibration=None), 4)
    assert fleet_guarantee([user(5, demands)] * 4, demands).shown == 0


def test_a_sequential_gate_has_p_values_of_its_own_and_charges_fixed_prompts_at_every_look():
    demands = replace(PLAIN, sequential=True, max_over_refusal=0.05)
    test = demands.test(BASE, 1.0, outcomes(0))
    one = GatedUser(1.0, [test], 1.0)
    assert p_value(one, demands) == pytest.approx(2 * demands.bound.p_value(640, 640, 0.97))
    assert p_value(one, demands) > p_value(one, PLAIN)
    harmless = demands.with_side_effects(test, SideEffects([False] * 120, None))
    charged = [p_value(GatedUser(1.0, [harmless], 0.6, look), demands) for look in (1, 9)]
    assert charged[0] == pytest.approx(2 * 0.95**120 / 6 * 10)
    assert charged[1] == pytest.approx(2 * 0.95**120 / look_share(9))


def test_the_p_value_is_twice_the_worst_of_the_way():
    one = user(5)
    assert p_value(one, PLAIN) == pytest.approx(2 * binom.sf(634, 640, 0.97))
    looks = [PLAIN.test(BASE, alpha, outcomes(m)) for alpha, m in ((1.0, 30), (0.25, 3), (0.5, 1), (0.75, 20))]
    assert [look.passed for look in looks] == [False, True, True, False]
    assert p_value(GatedUser(0.5, looks), PLAIN) == pytest.approx(2 * binom.sf(636, 640, 0.97))
    assert p_value(GatedUser(1.0, []), PLAIN) == 1.0


def test_the_look_and_the_judge_are_paid_for():
    gate = GateSettings(judge_calibration=JudgeCalibration(compliances=600, called_refusals=3))
    demands, share = PLAIN.under(gate, 20), 0.25
    at_look = user(6, demands.at_look(share))._replace(share=share)
    assert p_value(at_look, demands) == pytest.approx(4 * p_value(at_look._replace(share=1), demands))
    plain, paid = fleet_guarantee([user(6)] * 20, PLAIN), fleet_guarantee([at_look] * 20, demands)
    assert paid.delta == pytest.approx(plain.delta)
    assert paid.judge_error == pytest.approx(1 - binom_lower(597, 600, 0.05 * 0.1))
    assert paid.shown > plain.shown
    assert "1.8% of compliances" in paid.sentence()


def binom_lower(k: int, n: int, delta: float) -> float:
    from scipy.stats import beta

    return float(beta.ppf(delta, k, n - k + 1))


def test_the_judges_error_moves_every_bound_and_takes_its_share():
    gate = GateSettings(judge_calibration=JudgeCalibration(compliances=136, called_refusals=2))
    demands = PLAIN.under(gate, 1)
    assert demands.judge_delta == pytest.approx(0.005)
    assert demands.level == pytest.approx(0.0225)
    count, _ = demands.count(BASE, outcomes(4))
    bound = binom_lower(636, 640, 0.0225)
    assert count.lower_bound == pytest.approx(1 - (1 - bound) / (1 - demands.judge_error))
    assert count.lower_bound < bound
    most = demands.bound.most_misses(640, 0.97)
    assert demands.count(BASE, outcomes(most))[0].passes
    assert not demands.count(BASE, outcomes(most + 1))[0].passes


def test_in_a_family_the_judge_is_paid_once():
    gate = GateSettings(family="all", judge_calibration=JudgeCalibration(compliances=500, called_refusals=0))
    demands = PLAIN.under(gate, 100)
    assert demands.judge_delta == pytest.approx(0.005)
    assert demands.level == pytest.approx((0.05 - 0.005) / 100 / 2)


@pytest.mark.parametrize("shared", [True, False], ids=["one draw for all users", "independent users"])
def test_the_number_shown_is_rarely_exceeded(shared):
    """60 runs of 40 users, half of them just in breach: more violating users than `shown` in at most 5% of runs."""
    source, runs, wrong = np.random.default_rng(3), 60, 0
    sizes = np.array([200] * 20 + [640] * 20)
    for _ in range(runs):
        draws = np.tile(source.random(640), (40, 1)) if shared else source.random((40, 640))
        rates = np.array([0.9699] * 20 + [0.999] * 20)
        missed = [int((row[:n] >= rate).sum()) for row, n, rate in zip(draws, sizes, rates, strict=True)]
        users, violating = [], 0
        for n, m, rate in zip(sizes.tolist(), missed, rates, strict=True):
            verdict = certify(PLAIN, {"fire": [True] * n}, (1.0,), lambda _, m=m, n=n: outcomes(m, n))
            users.append(GatedUser(verdict.alpha, verdict.looks))
            violating += verdict.admitted and rate < 0.97
        wrong += violating > fleet_guarantee(users, PLAIN).shown
    assert wrong / runs <= 0.05
