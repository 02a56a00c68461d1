import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from tests.models.tiny import constraint_bank, tiny_base, user_rows

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(epochs=2, learning_rate=2e-3)
SCRIPT = Path(__file__).with_name("killed_training.py")


def _engine(users, bank=None, slots=8, state=None, dpo=DPO, every=20, lora=LORA) -> Engine:
    adapted = AdaptedModel(tiny_base(), lora)
    reference = Reference(adapted)
    reference.add(row for user in users for pair in user.taught for row in (pair.chosen, pair.rejected))
    if bank is not None:
        reference.add(bank.rows())
    fleet = FleetSettings(slots=slots, checkpoint_every=every)
    constraint = bank and LagrangianConstraint(bank, ConstraintSettings(), seed=7)
    return Engine(adapted, users, reference, constraint, dpo, fleet, seed=7, state=state)


def _users(count=3, pairs=8):
    return [user_rows(f"user {n}", pairs, seed=n, even=True) for n in range(count)]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    """kill -9 at random steps, slots refilled, with a bank: adapters and duals are the same bits."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "1", "2", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(int(deaths) >= 2 for deaths in done.stdout.split())
    whole = load_file(tmp_path / "whole.safetensors")
    assert len(whole) == 10
    for seed in ("1", "2", "3"):
        cut = load_file(tmp_path / f"{seed}.safetensors")
        assert set(cut) == set(whole)
        for name, value in whole.items():
            assert torch.equal(value, cut[name]), (seed, name)


def test_a_finished_run_resumes_to_its_results_without_a_step(tmp_path):
    users = _users(4)
    first = {user.user_id: user for user in _engine(users, constraint_bank(), slots=2, state=tmp_path).run()}
    reports = []
    again = {user.user_id: user for user in _engine(users, constraint_bank(), 2, tmp_path).run(reports.append)}
    assert reports == []
    assert set(again) == set(first)
    for user_id, user in first.items():
        assert torch.equal(again[user_id].adapter, user.adapter)
        assert again[user_id]._replace(adapter=None) == user._replace(adapter=None)


def test_where_a_finished_user_is_gone_from_the_disk_all_begin_anew_to_the_same_bits(tmp_path):
    users = _users(4)
    first = {user.user_id: user for user in _engine(users, constraint_bank(), slots=2, state=tmp_path).run()}
    file = sorted((tmp_path / "trained").iterdir())[1]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="delete it to start its users anew"):
        list(_engine(users, constraint_bank(), slots=2, state=tmp_path).run())
    file.unlink()
    again = {user.user_id: user for user in _engine(users, constraint_bank(), slots=2, state=tmp_path).run()}
    assert set(again) == set(first)
    assert all(torch.equal(again[user_id].adapter, user.adapter) for user_id, user in first.items())


def test_an_interrupted_run_resumes_in_the_middle(tmp_path):
    """Closing the generator stands for Ctrl-C; the second run makes fewer steps and the same adapters."""
    users = [user_rows(f"user {n}", 4 + 3 * n, seed=n) for n in range(4)]
    whole = {user.user_id: user for user in _engine(users, slots=2).run()}
    run = _engine(users, slots=2, state=tmp_path, every=1).run()
    next(run)
    run.close()
    reports = []
    resumed = {user.user_id: user for user in _engine(users, slots=2, state=tmp_path, every=1).run(reports.append)}
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[user_id].adapter, user.adapter) for user_id, user in whole.items())
    assert 0 < len(reports) < max(user.steps for user in whole.values()) * 2


@pytest.mark.parametrize("file", ["slots.safetensors", "trained/*.safetensors"])
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_file(tmp_path, file):
    users = _users(3, 4)
    list(_engine(users, state=tmp_path).run())
    broken = next(iter(tmp_path.glob(file)))
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(InputError) as fault:
        list(_engine(users, state=tmp_path).run())
    assert str(broken) in str(fault.value)
    assert "damaged" in str(fault.value)


@pytest.mark.parametrize("poison", ["adapter", "weight"])
def test_a_user_whose_numbers_break_fails_alone(poison):
    """Not a number in one user: it stops with a reason, and the others' bits are those of a run where it is finite."""
    users = _users(3)
    well = {user.user_id: user for user in _engine(users).run()}
    if poison == "weight":
        sick = user_rows("user 1", 8, seed=1, even=True, weight=float("inf"))
        engine = _engine([users[0], sick, users[2]], every=1)
        trained = {user.user_id: user for user in engine.run()}
    else:
        engine = _engine(users)
        assert engine._fill()
        engine.slots.flat[engine.slots.users.index("user 1"), 5] = float("nan")
        trained = {user.user_id: user for user in engine.run()}
    failed = trained.pop("user 1")
    assert failed.status == "failed"
    assert failed.adapter is None
    assert "not finite" in failed.reason
    assert f"step {failed.steps}" in failed.reason
    assert set(trained) == {"user 0", "user 2"}
    for user_id, user in trained.items():
        assert user.status == "trained"
        assert torch.allclose(user.adapter, well[user_id].adapter, rtol=0, atol=1e-5)


def test_a_failing_user_changes_no_bit_of_the_step_of_its_failure():
    users = _users(3)
    one, other = _engine(users, constraint_bank()), _engine(users, constraint_bank())
    assert one._fill()
    assert other._fill()
    place = other.slots.users.index("user 1")
    for step in range(2):
        if step == 1:
            other.slots.flat[place, 5] = float("nan")
        one._step(print)
        moved = other._step(print)[1]
        assert moved == [step == 0 or n != place for n in range(3)]
    rest = [n for n in range(3) if n != place]
    for name, state in one.slots.tensors().items():
        assert torch.equal(state[rest], other.slots.tensors()[name][rest]), name


def test_a_failed_user_stays_failed_when_the_run_resumes(tmp_path):
    users = [*_users(2), user_rows("sick", 8, seed=9, even=True, weight=float("inf"))]
    first = {user.user_id: user for user in _engine(users, state=tmp_path).run()}
    again = {user.user_id: user for user in _engine(users, state=tmp_path).run()}
    assert again["sick"].status == first["sick"].status == "failed"
    assert again["sick"].reason == first["sick"].reason
    assert again["sick"].adapter is None


def test_memory_is_bounded_by_the_slots_and_every_user_is_reported_once():
    users = [user_rows(f"user {n}", 2 + n % 5, seed=n) for n in range(9)]
    engine = _engine(users, slots=2)
    most, seen, last = 0, [], {}

    def watch(reports):
        nonlocal most
        most = max(most, engine.slots.flat.shape[0])
        for report in reports:
            assert report.step == last.get(report.user_id, 0) + 1
            last[report.user_id] = report.step

    for user in engine.run(watch):
        seen.append(user.user_id)
        assert last[user.user_id] == user.steps == engine.schedules[user.user_id].steps
        assert user.seconds > 0
        assert user.duals == {}
    assert most == 2
    assert sorted(seen) == sorted(user.user_id for user in users)


def test_a_user_without_a_training_pair_is_left_to_the_caller():
    users = [*_users(1), user_rows("quiet", 0, seed=3, heldout=2)]
    assert [user.user_id for user in _engine(users).run()] == ["user 0"]
    assert list(_engine([user_rows("quiet", 0, seed=3)]).run()) == []


def test_training_learns_what_the_user_prefers():
    """The point of it all: the loss falls, margins rise, and the base itself is left as it was."""
    users = _users(2)
    engine = _engine(users, dpo=DPO.model_copy(update={"epochs": 12, "learning_rate": 5e-3}))
    before = {name: value.clone() for name, value in engine.adapted.base.model.state_dict().items()}
    course = []
    list(engine.run(course.append))
    assert all(report.loss == pytest.approx(0.6931, abs=1e-3) for report in course[0])
    assert all(report.loss < 0.3 and report.accuracy == 1 and report.margin > 1 for report in course[-1])
    after = engine.adapted.base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_tie_pulls_its_margin_back_to_zero_and_a_preference_does_not():
    """With all layers, and with frozen ones below, whose states of a user's rows are read from the cache."""
    dpo = DPO.model_copy(update={"epochs": 12, "learning_rate": 5e-3})
    for lora in (LORA, LoraSettings(rank=4, alpha=8, layers={"top": 0.5})):
        [rows] = _users(1)
        ties = [pair._replace(probability=0.5) for pair in rows.train[:4]]
        margins = {}
        for kind, user in (("tied", rows._replace(train=rows.train[4:], ties=ties)), ("preferred", rows)):
            engine = _engine([user], dpo=dpo, lora=lora)
            [trained] = list(engine.run())
            assert trained.pairs == 8
            reference = Reference(engine.adapted)
            every = [row for pair in rows.train for row in (pair.chosen, pair.rejected)]
            reference.add(every)
            with engine.adapted.using(trained.adapter[None]):
                scores = [score.logp for score in engine.adapted.score([every])[0]]
            base = [reference[row] for row in every]
            shift = [score - of_base for score, of_base in zip(scores, base, strict=True)]
            margins[kind] = [chosen - rejected for chosen, rejected in zip(shift[::2], shift[1::2], strict=True)]
        assert min(margins["preferred"]) > 4
        assert min(margins["tied"][4:]) > 4
        assert max(map(abs, margins["tied"][:4])) < 1
