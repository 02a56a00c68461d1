import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training import memory
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.memory import (
    StepCost,
    choose_slots,
    held_by,
    largest_step,
    machine_bytes,
    most_held,
    pair_tokens,
    step_passes,
    step_room,
    taken_by,
)
from persona_rlhf.training.user_state import UserSchedule, waves
from tests.models.tiny import constraint_bank, tiny_base, user_rows

CPU = torch.device("cpu")
GIB = 1 << 30


def _known(users, bank=None):
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=4, alpha=8))
    reference = Reference(adapted)
    reference.add(row for user in users for pair in user.train for row in (pair.chosen, pair.rejected))
    if bank is not None:
        reference.add(bank.rows())
    return adapted, reference


def _engine(users, fleet, state=None) -> Engine:
    adapted, reference = _known(users)
    return Engine(adapted, users, reference, None, DpoSettings(), fleet, seed=7, state=state)


def test_the_counter_sees_what_lives_at_once_and_not_what_was_freed():
    def one_after_another():
        for _ in range(5):
            torch.ones(1000, 1000)

    def together():
        kept = [torch.ones(1000, 1000) for _ in range(5)]
        kept[0].add_(1)
        kept[1].view(-1)

    assert taken_by(one_after_another, CPU) == pytest.approx(4e6, rel=0.01)
    assert taken_by(together, CPU) == pytest.approx(20e6, rel=0.01)


def test_the_counter_sees_what_a_backward_pass_keeps():
    given_ = torch.ones(1000, 1000, requires_grad=True)
    assert taken_by(lambda: given_.exp().sin().sum().backward(), CPU) == pytest.approx(16e6, rel=0.3)


def test_shared_storage_is_held_once():
    whole = torch.zeros(10)
    assert held_by([whole, whole[2:], whole.view(2, 5)]) == 40


def test_the_machine_has_more_than_this_process():
    assert most_held(CPU) < machine_bytes(CPU)


@given(
    tokens=st.integers(1, 100_000),
    memory=st.integers(1, 100 * GIB),
    machine=st.integers(GIB, 1000 * GIB),
    base=st.integers(0, 1000 * GIB),
    device=st.sampled_from(["cpu", "cuda"]),
    budget=st.one_of(st.just("auto"), st.integers(1, 1_000_000)),
    width=st.integers(1, 100_000),
)
def test_auto_keeps_to_memory_and_to_the_budget_or_is_one(tokens, memory, machine, base, device, budget, width):
    slots = choose_slots(FleetSettings(tokens_per_step=budget), StepCost(tokens, memory, width), device, machine, base)
    assert slots >= 1
    if slots > 1:
        assert slots * memory + base <= machine
        assert budget == "auto" or slots * tokens <= budget
        assert device != "cpu" or slots <= 8
        assert device != "cpu" or budget != "auto" or slots * tokens * width <= 2**21


@pytest.mark.parametrize(
    ("tokens", "width", "slots"), [(275, 576, 8), (827, 576, 4), (275, 768, 8), (275, 1536, 4), (900, 1536, 1)]
)
def test_auto_stacks_users_only_as_far_as_the_cost_per_token_falls(tokens, width, slots):
    """Cases of the table in docs/explanation/performance.md; the last is a step of SmolLM2-135M on real answers."""
    assert choose_slots(FleetSettings(), StepCost(tokens, 1 << 20, width), "cpu", 16 * GIB, GIB) == slots


def test_no_step_is_tried_where_the_tokens_leave_room_for_one_user_only(monkeypatch):
    monkeypatch.setattr(memory, "taken_by", lambda *_: pytest.fail("a step was measured"))
    assert _engine([user_rows(f"u{n}", 6, seed=n) for n in range(3)], FleetSettings(tokens_per_step=1)).count == 1


def test_a_number_is_taken_as_it_is():
    assert choose_slots(FleetSettings(slots=9), StepCost(10**9, 10**15, 10**5), "cpu", GIB, GIB) == 9


def test_long_rows_take_more_and_so_leave_fewer_slots():
    """A step of rows of 2,048 tokens takes about 600 MiB of the bundled base; eight short pairs take a few."""
    cheap, dear = StepCost(600, 60 << 20, 576), StepCost(12_000, 600 << 20, 576)
    auto = FleetSettings(tokens_per_step=1_000_000)
    assert choose_slots(auto, cheap, "cpu", 4 * GIB, 0) == 8
    assert choose_slots(auto, dear, "cpu", 4 * GIB, 0) == 3
    assert choose_slots(auto, dear, "cpu", GIB, 0) == 1


def test_no_step_of_the_run_is_larger_than_the_one_tried():
    """The largest step is the bound: what any step of any single user takes lies below it."""
    users, bank, dpo = [user_rows(f"u{n}", 5, seed=n) for n in range(3)], constraint_bank(), DpoSettings(epochs=1)
    adapted, reference = _known(users, bank)
    constraint = LagrangianConstraint(bank, ConstraintSettings(), seed=1)
    bound = largest_step(adapted, users, constraint, dpo)
    for user in users:
        engine = Engine(adapted, [user], reference, constraint, dpo, FleetSettings(slots=1), seed=1)
        assert engine._fill()
        for _ in range(engine.schedules[user.user_id].steps):
            assert taken_by(partial(engine._step, print), CPU) + held_by([engine.slots.flat]) * 3 <= bound.memory * 1.02
    longer = largest_step(adapted, users, constraint, dpo.model_copy(update={"pairs_per_step": 8}))
    assert longer.tokens > bound.tokens
    assert longer.memory > bound.memory


def test_trying_a_step_leaves_the_run_as_it_was():
    users = [user_rows(f"u{n}", 6, seed=n) for n in range(3)]
    auto = {user.user_id: user.adapter for user in _engine(users, FleetSettings()).run()}
    given_ = {user.user_id: user.adapter for user in _engine(users, FleetSettings(slots=3)).run()}
    assert all(torch.equal(auto[name], adapter) for name, adapter in given_.items())


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_keeps_its_slots_though_the_machine_has_changed(tmp_path, monkeypatch, steps):
    """Killed before or after its first checkpoint, it goes on with as many slots, whatever auto would choose now."""
    users = [user_rows(f"u{n}", 6 + n, seed=n) for n in range(9)]
    monkeypatch.setattr(memory, "machine_bytes", lambda _: 64 * GIB)
    whole = {user.user_id: user.adapter for user in _engine(users, FleetSettings(checkpoint_every=2)).run()}
    first = _engine(users, FleetSettings(checkpoint_every=2), tmp_path)
    assert first.count == 8

    def stop(reports):
        if all(report.step > steps for report in reports):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(first.run(stop))
    monkeypatch.setattr(memory, "machine_bytes", lambda _: 1)
    assert _engine(users, FleetSettings()).count == 1
    second = _engine(users, FleetSettings(), tmp_path)
    assert second.count == 8
    resumed = {user.user_id: user.adapter for user in second.run()}
    assert set(resumed) == set(whole)
    assert all(torch.equal(whole[name], adapter) for name, adapter in resumed.items())


@pytest.mark.parametrize("sigma", [0.0, 0.5, 0.8])
def test_a_gpu_is_filled_by_users_of_uneven_lengths(sigma):
    """Tokens without padding of a step over the token budget, on lognormal lengths; and no pass exceeds it."""
    budget, draw = 65_536, random.Random(0)
    users = [[_pair(round(60 * draw.lognormvariate(0, sigma))) for _ in range(20)] for _ in range(400)]
    rows = [UserRows(f"u{n}", pairs, []) for n, pairs in enumerate(users)]
    dpo = DpoSettings(epochs=1)
    steps = [sum(map(pair_tokens, schedule.pairs(n))) for schedule in _schedules(rows, dpo) for n in range(5)]
    largest, state = max(steps), 16 << 20
    cost = StepCost(largest, state + largest * (1 << 20), 2048, state, round(sum(steps) / len(steps)))
    slots = choose_slots(FleetSettings(), cost, "cuda", 140 * GIB, 3 * GIB)
    room = step_room(FleetSettings(), cost, 140 * GIB, 3 * GIB, slots)
    waves_ = [[sum(map(pair_tokens, s.pairs(n))) for s, n in wave] for wave in waves(_schedules(rows, dpo), slots)]
    full = [wave for wave in waves_ if len(wave) == slots]
    assert sum(map(sum, full)) / len(full) / budget >= 0.8
    passes = [(len(users) * max(wave[n] for n in users)) for wave in full for users in step_passes(wave, room)]
    assert max(passes) <= room <= budget
    assert sum(passes) <= 1.35 * sum(map(sum, full)), "padding"


_PAIR = user_rows("u", 1, seed=0).train[0].pair


def _pair(length):
    row = Row(tuple(range(length)), tuple(range(length)))
    return PairRow(_PAIR, row, row)


def _schedules(rows, dpo):
    return [UserSchedule(user, dpo, 0) for user in rows]
