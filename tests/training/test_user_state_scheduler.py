import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from persona_rlhf.config.training import DpoSettings
from persona_rlhf.training.user_state import UserSchedule, queue_order, user_generator, waves
from tests.models.tiny import user_rows


@given(pairs=st.integers(1, 13), size=st.integers(1, 5), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_epoch_shows_every_pair_once(pairs, size, epochs, seed):
    rows = user_rows("user", pairs, seed=0)
    schedule = UserSchedule(rows, DpoSettings(epochs=epochs, pairs_per_step=size), seed)
    per_epoch = math.ceil(pairs / size)
    assert schedule.steps == epochs * per_epoch
    for epoch in range(epochs):
        shown = [schedule.pairs(epoch * per_epoch + n) for n in range(per_epoch)]
        assert all(len(step) == size for step in shown[:-1])
        assert 1 <= len(shown[-1]) <= size
        assert sorted(pair.pair.id for step in shown for pair in step) == sorted(pair.pair.id for pair in rows.train)


@given(pairs=st.integers(1, 7), labelled=st.integers(0, 11), epochs=st.integers(1, 3))
def test_a_labelled_pair_is_shown_once_and_a_real_one_every_epoch(pairs, labelled, epochs):
    rows = user_rows("user", pairs + labelled, seed=0)
    rows = rows._replace(train=rows.train[:pairs], labelled=rows.train[pairs:])
    schedule = UserSchedule(rows, DpoSettings(epochs=epochs, pairs_per_step=3), 0)
    shown = Counter(pair.pair.id for step in range(schedule.steps) for pair in schedule.pairs(step))
    assert shown == Counter([row.pair.id for row in rows.train] * epochs + [row.pair.id for row in rows.labelled])
    first = pairs + labelled // epochs
    assert sum(len(schedule.pairs(step)) for step in range(math.ceil(first / 3))) == first


def test_ties_are_shown_every_epoch_like_preferences():
    rows = user_rows("user", 5, seed=0)
    rows = rows._replace(train=rows.train[:2], ties=rows.train[2:4], labelled=rows.train[4:])
    schedule = UserSchedule(rows, DpoSettings(epochs=3, pairs_per_step=2), 0)
    shown = Counter(pair.pair.id for step in range(schedule.steps) for pair in schedule.pairs(step))
    assert shown == Counter([row.pair.id for row in rows.judged] * 3 + [rows.labelled[0].pair.id])


def test_the_order_belongs_to_the_user_and_the_seed():
    def order(user_id: str, seed: int) -> list[int]:
        schedule = UserSchedule(user_rows(user_id, 12, seed=0), DpoSettings(epochs=2), seed)
        return [pair.pair.line for step in range(schedule.steps) for pair in schedule.pairs(step)]

    assert order("a", 1) == order("a", 1)
    assert len({tuple(order(user, seed)) for user in "ab" for seed in (1, 2)}) == 4
    assert order("a", 1)[:12] != order("a", 1)[12:]


def test_streams_of_one_user_differ_by_purpose():
    drawn = {
        tuple(torch.rand(3, generator=user_generator(seed, user, purpose)).tolist())
        for seed in (1, 11)
        for user in ("1", "a", "\ud800")
        for purpose in ("order", "init")
    }
    assert len(drawn) == 12


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(kind, warmup):
    settings = DpoSettings(schedule=kind, warmup=warmup, learning_rate=3e-3, epochs=3, pairs_per_step=4)
    schedule = UserSchedule(user_rows("user", 25, seed=0), settings, seed=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, math.ceil(warmup * schedule.steps), schedule.steps)
    for step in range(schedule.steps):
        assert schedule.rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_longest_user_goes_first_whatever_the_order_of_the_data():
    schedules = [
        UserSchedule(user_rows(name, n, seed=0), DpoSettings(), 0) for name, n in (("b", 4), ("c", 9), ("a", 4))
    ]
    for given_order in (schedules, schedules[::-1]):
        assert [schedule.rows.user_id for schedule in queue_order(given_order)] == ["c", "a", "b"]


@given(pairs=st.lists(st.integers(1, 9), min_size=1, max_size=7), slots=st.integers(1, 4))
def test_waves_take_every_step_once_in_order_and_leave_no_slot_free(pairs, slots):
    settings = DpoSettings(epochs=1, pairs_per_step=2)
    queue = queue_order([UserSchedule(user_rows(f"u{n}", size, seed=0), settings, 0) for n, size in enumerate(pairs)])
    seen: dict[str, list[int]] = {}
    walked = list(waves(queue, slots))
    for seated in walked:
        for schedule, step in seated:
            seen.setdefault(schedule.rows.user_id, []).append(step)
        assert len({schedule.rows.user_id for schedule, _ in seated}) == len(seated) <= slots
    assert seen == {schedule.rows.user_id: list(range(schedule.steps)) for schedule in queue}
    widths = [len(seated) for seated in walked]
    assert widths == sorted(widths, reverse=True)  # full, until nobody waits any more
