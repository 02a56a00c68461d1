import torch

from persona_rlhf.config.training import DpoSettings
from persona_rlhf.training.user_state import Slots

PARAMS = 6


def _slots(count=3) -> Slots:
    slots = Slots(count, PARAMS, 2, DpoSettings(), 0.1, torch.device("cpu"))
    for place in range(count):
        slots.take(place, f"user {place}", torch.full((PARAMS,), place + 1.0))
    return slots


def _step(slots: Slots) -> None:
    count = len(slots.users)
    slots.optimizer.step(torch.ones(count, PARAMS), torch.full((count,), 0.1, dtype=torch.float64))
    seen = torch.ones(count, 2, dtype=torch.bool)
    slots.duals.update(torch.ones(count, 2), seen, torch.ones(count, dtype=torch.bool))
    slots.steps = [step + 1 for step in slots.steps]


def test_a_new_user_finds_nothing_of_the_last_one():
    slots = _slots()
    _step(slots)
    slots.users[1] = None
    slots.take(1, "new", torch.zeros(PARAMS))
    fresh = _slots(1)
    for name, value in slots.tensors().items():
        if name != "optimizer.params":
            assert torch.equal(value[1], fresh.tensors()[name][0]), name
    assert (slots.users, slots.steps, slots.seconds[1]) == (["user 0", "new", "user 2"], [1, 0, 1], 0.0)
    assert slots.flat[1].tolist() == [0] * PARAMS


def test_the_optimizer_moves_the_very_tensor_that_the_model_reads():
    slots = _slots()
    before = slots.flat.clone()
    _step(slots)
    assert slots.flat is slots.optimizer.params
    assert (slots.flat != before).all()
    slots.users[0] = None
    slots.close_free()
    assert slots.flat is slots.optimizer.params


def test_free_places_leave_and_the_rest_keep_every_number():
    slots = _slots()
    _step(slots)
    before = {name: value.clone() for name, value in slots.tensors().items()}
    slots.users[1] = None
    slots.spend(2.0)
    slots.close_free()
    assert slots.users == ["user 0", "user 2"]
    for name, value in slots.tensors().items():
        assert torch.equal(value, before[name][[0, 2]]), name
    slots.users = [None, None]
    slots.close_free()
    assert slots.users == []
    assert slots.flat.shape == (0, PARAMS)


def test_what_a_checkpoint_takes_a_new_stack_goes_on_from():
    slots, other = _slots(), _slots()
    _step(slots)
    other.restore({name: value.clone() for name, value in slots.tensors().items()}, dict(slots.notes()))
    _step(slots)
    _step(other)
    assert other.flat is other.optimizer.params
    assert other.notes() == slots.notes()
    for name, value in slots.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name


def test_seconds_are_shared_by_those_who_step():
    slots = _slots()
    slots.spend(3.0)
    slots.users[2] = None
    slots.close_free()
    slots.spend(1.0)
    assert slots.seconds == [1.5, 1.5]
