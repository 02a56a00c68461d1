"""Users who keep the population's adapter: which adapter a look is at, and what a second look spends."""

import pytest
import torch

from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.gate import GateTest, Verdict
from persona_rlhf.evaluation.prior_gain import PriorGain
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.statistics import Count
from persona_rlhf.evaluation.still_base import SignTest, StillBase
from persona_rlhf.pipeline.looks import GateLooks, JudgedLook
from persona_rlhf.pipeline.prior import judge_beside_prior

PRIOR, LEVEL = torch.tensor([9.0, 9.0]), 0.05
COUNT = Count(10, 10, 10, 0.9, 0.8)
RUINED = StillBase(pairs=SignTest(20, 1, 1e-5, 0.05))


class Looks(GateLooks):
    """A gate that holds back the adapters in `ruined` for harm, and those in `complying` by their refusals."""

    def __init__(self, ruined=(), complying=()) -> None:
        self.ruined, self.complying, self.taken = ruined, complying, []

    def judge(self, users, flat, rows=(), recorded=()):
        self.taken.append([(user, adapter.tolist()) for user, adapter in zip(users, flat, strict=True)])
        assert [row.user_id for row in rows] == list(users)
        number = len(self.taken)
        return [JudgedLook(self.verdict(one.tolist()), Spending(number, 0.1, 0.005, 0.05, 0.05)) for one in flat]

    def verdict(self, adapter):
        ruined = adapter in self.ruined
        if ruined or adapter in self.complying:
            likeness = RUINED if ruined else StillBase()
            tests = [GateTest(alpha, False, COUNT, {}, still_base=likeness) for alpha in (1.0, 0.5)]
            return Verdict(0.0, False, "held back: why", tests, COUNT, {})
        return Verdict(1.0, True, "passed", [GateTest(1.0, True, COUNT, {})], COUNT, {})


def gain_of(p_value):
    return PriorGain("population", "held-out pairs", 40, 0.2, 0.1, 0.3, p_value)


def judged(looks, *gains):
    flat = torch.arange(2.0 * len(gains)).reshape(-1, 2)
    rows = [UserRows(f"user {n}", [], []) for n in range(len(gains))]
    return judge_beside_prior(looks, rows, flat, gains, PRIOR, LEVEL)


def test_only_users_whose_pairs_show_a_gain_bring_an_adapter_of_theirs():
    looks = Looks()
    ends = judged(looks, gain_of(0.05), gain_of(0.051), None)
    assert [end.prior for end in ends] == [False, True, True]
    assert looks.taken == [[("user 0", [0.0, 1.0]), ("user 1", [9.0, 9.0]), ("user 2", [9.0, 9.0])]]
    assert [end.adapter.tolist() for end in ends] == [[0.0, 1.0], [9.0, 9.0], [9.0, 9.0]]
    assert [end.look.verdict.reason for end in ends] == [
        "passed",
        "passed (of the population's adapter: the gain over it is +0.20 (+0.10 to +0.30) by the held-out pairs of 40 "
        "prompts, p = 0.051, and level 0.05 asks for more)",
        "passed (of the population's adapter: no pair tells a gain, and level 0.05 asks for more)",
    ]


def test_a_user_whose_adapter_is_ruined_keeps_the_prior_by_one_more_look():
    looks = Looks(ruined=[[0.0, 1.0]])
    ruined, whole = judged(looks, gain_of(0.01), gain_of(0.01))
    assert looks.taken[1:] == [[("user 0", [9.0, 9.0])]]
    assert (ruined.prior, whole.prior) == (True, False)
    assert ruined.adapter.tolist() == [9.0, 9.0]
    assert (ruined.look.spending.look, whole.look.spending.look) == (2, 1)
    assert ruined.other is not None
    assert not ruined.other.admitted
    assert "the user's adapter was held back: why" in ruined.look.verdict.reason


@pytest.mark.parametrize(
    "failing", [{"ruined": [[0.0, 1.0], [9.0, 9.0]]}, {"ruined": [[0.0, 1.0]], "complying": [[9.0, 9.0]]}]
)
def test_where_the_prior_fails_too_the_user_is_held_back_and_both_looks_are_spent(failing):
    [end] = judged(Looks(**failing), gain_of(0.01))
    assert not end.prior
    assert not end.look.verdict.admitted
    assert end.look.verdict.still_base == RUINED
    assert end.look.spending.look == 2
    assert end.other is not None
    assert "of the population's adapter: held back: why" in end.look.verdict.reason


def test_an_adapter_that_stops_refusing_is_held_back_without_a_second_look():
    looks = Looks(complying=[[0.0, 1.0]])
    [end] = judged(looks, gain_of(0.01))
    assert (len(looks.taken), end.prior, end.look.verdict.admitted) == (1, False, False)


def test_a_prior_that_is_held_back_leaves_the_user_with_the_base():
    looks = Looks(complying=[[9.0, 9.0]])
    [end] = judged(looks, gain_of(0.5))
    assert (len(looks.taken), end.prior, end.look.verdict.admitted) == (1, True, False)
