import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.training.records import DualTrace
from persona_rlhf.training.user_state import Duals

CPU = torch.device("cpu")
ALL = torch.tensor([[True]])
MOVES = torch.tensor([True])


def test_a_dual_integrates_the_smoothed_violation_by_hand():
    duals = Duals(1, 1, gain=2.0, smoothing=0.5, ceiling=1.5, device=CPU)
    # smoothed: 0.2, 0.4, -0.3, -0.65, 1.675; times 2, added up, between 0 and 1.5
    for violation, value in ((0.4, 0.4), (0.6, 1.2), (-1.0, 0.6), (-1.0, 0.0), (4.0, 1.5)):
        duals.update(torch.tensor([[violation]]), ALL, MOVES)
        assert duals.values.item() == pytest.approx(value, abs=1e-6)
    [trace] = duals.traces(0)
    assert trace == DualTrace(*map(pytest.approx, (1.5, 1.5, (0.4 + 1.2 + 0.6 + 0.0 + 1.5) / 5)))


def test_a_category_that_was_not_seen_keeps_its_estimate_and_pulls_on():
    duals = Duals(1, 2, gain=1.0, smoothing=0.0, ceiling=10.0, device=CPU)
    duals.update(torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]), MOVES)
    duals.update(torch.tensor([[0.5, -9.0]]), torch.tensor([[True, False]]), MOVES)
    assert duals.values.tolist() == [[1.0, 0.5]]
    assert duals.violations.tolist() == [[0.5, 0.25]]


def test_a_user_that_does_not_move_keeps_its_duals():
    duals = Duals(2, 1, gain=1.0, smoothing=0.0, ceiling=10.0, device=CPU)
    seen = torch.tensor([[True], [True]])
    duals.update(torch.tensor([[1.0], [1.0]]), seen, torch.tensor([True, True]))
    duals.update(torch.tensor([[1.0], [float("nan")]]), seen, torch.tensor([True, False]))
    assert duals.values.tolist() == [[2.0], [1.0]]
    assert [trace.mean for user in range(2) for trace in duals.traces(user)] == [1.5, 1.0]


def test_a_new_user_in_the_slot_starts_at_zero():
    duals = Duals(2, 2, gain=1.0, smoothing=0.5, ceiling=10.0, device=CPU)
    duals.update(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), torch.tensor([True, True]))
    other = duals.traces(1)
    duals.reset(0)
    assert duals.traces(0) == [DualTrace(0, 0, 0)] * 2
    assert duals.traces(1) == other
    assert duals.violations[0].tolist() == [0, 0]


@given(st.lists(st.floats(-50, 50, width=32), max_size=30), st.floats(0.1, 5), st.floats(0, 0.95))
def test_a_dual_is_never_negative_nor_over_its_ceiling(violations, gain, smoothing):
    duals = Duals(1, 1, gain, smoothing, ceiling=3.0, device=CPU)
    for violation in violations:
        duals.update(torch.tensor([[violation]]), ALL, MOVES)
        assert 0 <= duals.values.item() <= 3
    [trace] = duals.traces(0)
    assert trace.peak >= trace.final >= 0
    assert trace.peak >= trace.mean >= 0
