from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, EarlyStopSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import halved
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.api import fleet_train
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.user_state import Stopping
from tests.models.tiny import constraint_bank, tiny_base, user_rows

CPU = torch.device("cpu")
EARLY = EarlyStopSettings(patience=2, every=2)
DPO = DpoSettings(epochs=5, learning_rate=5e-3, early_stop=EARLY)


def _user(name, seed, helped, pairs=8):
    """A user whose deciding pairs agree with its training pairs (`helped`), or say the very opposite."""
    user = user_rows(name, pairs, seed=seed, even=True)
    if helped:
        return user._replace(deciding=user.train)
    return user._replace(deciding=[p._replace(chosen=p.rejected, rejected=p.chosen) for p in user.train])


def _engine(users, slots=3, state=None, dpo=DPO, every=20, bank=None) -> Engine:
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=4, alpha=8))
    reference = Reference(adapted)
    compared = [pair for user in users for pair in (*user.train, *user.deciding)]
    reference.add([row for pair in compared for row in (pair.chosen, pair.rejected)] + (bank.rows() if bank else []))
    fleet = FleetSettings(slots=slots, checkpoint_every=every)
    constraint = bank and LagrangianConstraint(bank, ConstraintSettings(), seed=7)
    return Engine(adapted, users, reference, constraint, dpo, fleet, seed=7, state=state)


def _trained(engine):
    return {user.user_id: user for user in engine.run()}


@given(
    losses=st.lists(st.one_of(st.floats(0, 2), st.just(nan), st.just(inf)), min_size=1, max_size=20),
    patience=st.integers(1, 4),
)
def test_a_user_stops_when_patience_ends_and_keeps_the_best(losses, patience):
    stopping = Stopping(1, 1, EarlyStopSettings(patience=patience, every=1), CPU)
    best, best_at, at = inf, None, 0
    for at, loss in enumerate(losses, 1):
        stopped = stopping.check(0, loss, torch.tensor([float(at)]))
        if loss < best:
            best, best_at = loss, at
        assert stopped == (at - (best_at or 0) >= patience)
        if stopped:
            break
    kept = stopping.adapter(0, torch.tensor([-1.0])).item()
    assert kept == (-1.0 if best_at is None else best_at)


def test_nothing_is_kept_and_nobody_is_asked_without_the_setting():
    stopping = Stopping(3, 1000, None, CPU)
    assert stopping.best.numel() == 0
    assert not any(stopping.due(step, 10) for step in range(11))


def test_a_user_is_checked_at_intervals_and_at_the_end():
    stopping = Stopping(1, 1, EarlyStopSettings(patience=1, every=4), CPU)
    assert [step for step in range(1, 11) if stopping.due(step, 10)] == [4, 8, 10]


def test_a_user_stops_when_the_heldout_loss_rises_and_keeps_the_best_adapter():
    """Trained against its held-out pairs, a user's first check is its best; the other user trains to the end."""
    users = [_user("harmed", 1, helped=False), _user("helped", 2, helped=True)]
    engine, seen = _engine(users), {}

    def watch(reports):
        for place, report in enumerate(reports):
            seen[report.user_id, report.step] = engine.slots.flat[place].clone()

    trained = {user.user_id: user for user in engine.run(watch)}
    assert trained["harmed"].status == "trained"
    assert trained["harmed"].steps == EARLY.every * (1 + EARLY.patience)
    assert torch.equal(trained["harmed"].adapter, seen["harmed", EARLY.every])
    assert trained["helped"].steps == engine.schedules["helped"].steps == 10
    assert ("harmed", EARLY.every * (1 + EARLY.patience) + 1) not in seen


def test_a_stopped_user_frees_its_slot():
    users = [_user(f"user {n}", n, helped=n == 1) for n in range(3)]
    together = []
    list(_engine(users, slots=2).run(lambda reports: together.append({report.user_id for report in reports})))
    assert {"user 0", "user 1"} == together[0]
    assert {"user 1", "user 2"} == together[EARLY.every * (1 + EARLY.patience)]


def test_without_deciding_pairs_all_steps_are_taken_and_the_last_adapter_is_kept():
    alone = user_rows("alone", 8, seed=1, even=True)
    early = _trained(_engine([alone]))["alone"]
    plain = _trained(_engine([alone], dpo=DPO.model_copy(update={"early_stop": None})))["alone"]
    assert early.steps == plain.steps == 10
    assert torch.equal(early.adapter, plain.adapter)


def test_the_library_call_stops_early_too():
    """On half of the held-out pairs that it is given; with them upside down, it stops as soon as patience allows."""
    rows = user_rows("harmed", 8, seed=1, heldout=8, even=True)
    opposite = [p._replace(chosen=q.rejected, rejected=q.chosen) for p, q in zip(rows.heldout, rows.train, strict=True)]
    user = rows._replace(heldout=opposite)
    base = tiny_base()
    assert len(halved(user).deciding) == len(halved(user).heldout) == 4
    [found] = fleet_train(
        base.model, [user], tokenizer=base.tokenizer, lora=LoraSettings(rank=4, alpha=8), dpo=DPO
    ).values()
    assert found.steps == EARLY.every * (1 + EARLY.patience)


def test_a_neighbour_changes_no_bit_of_who_stops_when():
    """Same shapes, other users side by side: one helped, one harmed, one not a number."""
    bank = constraint_bank()
    found = []
    for other in (_user("b", 5, True), _user("b", 6, False), _user("b", 7, True)):
        users = [_user("a", 1, helped=False), other, _user("c", 3, helped=True)]
        found.append(_trained(_engine(users, bank=bank)))
    assert len({run["a"].steps for run in found}) == 1
    assert all(torch.equal(run["a"].adapter, found[0]["a"].adapter) for run in found)
    alone = _trained(_engine([_user("a", 1, helped=False)], bank=bank))["a"]
    assert alone.steps == found[0]["a"].steps
    assert torch.allclose(alone.adapter, found[0]["a"].adapter, rtol=0, atol=1e-5)


USERS = [_user(f"user {n}", n, helped=n % 2 == 1) for n in range(3)]


@pytest.fixture(scope="module")
def whole():
    return _trained(_engine(USERS, slots=2, every=3))


@pytest.mark.parametrize("dies", [1, 5, 8])
def test_a_resumed_run_stops_where_the_whole_run_stops(whole, tmp_path, dies):
    """Interrupted between checks, at one, and after somebody stopped: best adapters and patience are on disk too."""
    taken = 0

    def stop(_):
        nonlocal taken
        taken += 1
        if taken == dies:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(_engine(USERS, slots=2, state=tmp_path, every=3).run(stop))
    resumed = _trained(_engine(USERS, slots=2, state=tmp_path, every=3))
    assert {name: user.steps for name, user in resumed.items()} == {name: user.steps for name, user in whole.items()}
    assert all(torch.equal(resumed[name].adapter, user.adapter) for name, user in whole.items())
    assert len({user.steps for user in whole.values()}) > 1
