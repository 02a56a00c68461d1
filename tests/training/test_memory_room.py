"""A device without room: the same adapters and answers, in smaller pieces."""

from dataclasses import replace

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.passes import run_in_passes
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.memory import step_passes
from tests.models.tiny import constraint_bank, random_flat, tiny_base, user_rows

USERS = [user_rows(f"user-{n}", 6, seed=n) for n in range(5)]


def trained(monkeypatch, room=None):
    """The adapters of a fleet of five, and what was said; more than `room` users in a pass are too many."""
    adapted, bank, said, sizes = AdaptedModel(tiny_base(), LoraSettings(rank=4)), constraint_bank(), [], []
    reference = Reference(adapted)
    reference.add([*(row for user in USERS for pair in user.train for row in pair[1:3]), *bank.rows()])
    dpo = DpoSettings(epochs=2, pairs_per_step=2)
    constraint = LagrangianConstraint(bank, ConstraintSettings(), 0)
    engine = Engine(adapted, USERS, reference, constraint, dpo, FleetSettings(slots=5), 0)
    whole = adapted.row_logps

    def row_logps(batch, states=()):
        users = len(batch.tokens_per_user)
        if room is not None and users > room:
            raise torch.OutOfMemoryError("no room")
        sizes.append(users)
        return whole(batch, states)

    monkeypatch.setattr(adapted, "row_logps", row_logps)
    return {user.user_id: user for user in engine.run(say=said.append)}, said, sizes


def test_a_step_without_room_is_taken_in_parts(monkeypatch):
    whole, silence, _ = trained(monkeypatch)
    parts, said, sizes = trained(monkeypatch, room=2)
    assert silence == []
    assert said == ["out of memory with 5 users in a step: it is taken in parts of 2 from now on"]
    assert sizes[:3] == [2, 2, 1]
    for user, result in whole.items():
        assert result.steps == parts[user].steps
        assert result.duals.keys() == parts[user].duals.keys()
        torch.testing.assert_close(parts[user].adapter, result.adapter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("room", "parts"), [(60, [2]), (40, [2, 4])])
def test_a_user_without_room_is_trained_pair_by_pair(monkeypatch, tmp_path, room, parts):
    """The pairs of a step and its constraint in passes of their own: the same adapter, duals and reports."""
    adapted, bank, user = AdaptedModel(tiny_base(), LoraSettings(rank=4)), constraint_bank(), USERS[0]
    user = user._replace(train=[row._replace(pair=replace(row.pair, weight=n / 3)) for n, row in enumerate(user.train)])
    reference = Reference(adapted)
    reference.add([*(row for pair in user.train for row in pair[1:3]), *bank.rows()])
    constraint, dpo = LagrangianConstraint(bank, ConstraintSettings(), 0), DpoSettings(epochs=2, pairs_per_step=4)
    settings = (constraint, dpo, FleetSettings(slots=1), 0)
    reports, notices = [], []
    [whole] = Engine(adapted, [user], reference, *settings).run(reports.extend)
    row_logps, seen = adapted.row_logps, []

    def small(batch, states=()):
        seen.append(batch.input_ids.numel())
        if seen[-1] > room:
            raise torch.OutOfMemoryError("no room")
        return row_logps(batch, states)

    monkeypatch.setattr(adapted, "row_logps", small)
    engine, in_parts = Engine(adapted, [user], reference, *settings, tmp_path), []
    [trained_in_parts] = engine.run(in_parts.extend, notices.append)
    assert notices == [
        f"out of memory with one user in a step: its pairs are taken in {n} parts from now on" for n in parts
    ]
    torch.testing.assert_close(trained_in_parts.adapter, whole.adapter, rtol=1e-4, atol=1e-6)
    for name, dual in whole.duals.items():
        assert trained_in_parts.duals[name] == pytest.approx(dual, abs=1e-4)
    for report, other in zip(reports[1:], in_parts[1:], strict=True):  # at first all margins are zero but for rounding
        assert other[3:] == pytest.approx(report[3:], rel=1e-3, abs=1e-5)
    assert Engine(adapted, [user], reference, *settings, tmp_path).pieces == parts[-1]


def test_one_user_who_does_not_fit_is_told_so(monkeypatch):
    with pytest.raises(InputError, match="one user's step does not fit the device"):
        trained(monkeypatch, room=0)


def test_the_parts_of_a_step_are_kept_in_a_checkpoint(monkeypatch, tmp_path):
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=4))
    reference = Reference(adapted)
    reference.add([row for user in USERS for pair in user.train for row in pair[1:3]])
    settings = (DpoSettings(epochs=1), FleetSettings(slots=5), 0, tmp_path)
    engine = Engine(adapted, USERS, reference, None, *settings)
    engine.together = 2
    engine._save()
    assert Engine(adapted, USERS, reference, None, *settings).together == 2


def test_passes_without_room_are_run_in_halves():
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=4))
    rows = [[pair.chosen for pair in user.train] for user in USERS[:2]]
    flat = random_flat(adapted, 2)
    batch, sizes = adapted.batch, []

    def small(some, users):
        if len(some) > 4:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(some))
        return batch(some, users)

    with adapted.using(flat):
        whole = adapted.score(rows)
        adapted.batch = small
        parts = adapted.score(rows)
    assert len(sizes) >= 3
    for one, other in zip(whole, parts, strict=True):
        assert [score.tokens for score in one] == [score.tokens for score in other]
        assert [score.logp for score in one] == pytest.approx([score.logp for score in other], rel=1e-5)


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"),
    ],
)
def test_a_pass_that_did_not_fit_lowers_the_budget_of_all_later_ones(fault):
    """Whichever library reports the full memory; 16 rows of 4 tokens, of which 5 fit."""
    rows, sizes = [[Row((n, 1), (2, 3)) for n in range(16)]], []

    def run(places):
        sizes.append(len(places))
        if len(places) > 5:
            raise fault

    budget = run_in_passes(rows, 1000, run)
    assert sizes == [16, 8, 4, 4, 4, 4]
    assert budget == 16
    sizes.clear()
    assert run_in_passes(rows, budget, run) == budget
    assert sizes == [4, 4, 4, 4]


def test_another_fault_of_a_pass_is_no_full_memory():
    def run(places):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        run_in_passes([[USERS[0].train[0].chosen] * 4], 10, run)


def test_a_row_that_does_not_fit_alone_is_an_error():
    def run(places):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        run_in_passes([[USERS[0].train[0].chosen]], 10, run)


def test_users_of_like_length_share_the_passes_of_a_step():
    assert step_passes([5, 9, 4, 6], None) == step_passes([5, 9, 4, 6], 36) == [[0, 1, 2, 3]]
    assert step_passes([5, 9, 4, 6], 18) == [[1, 3], [0, 2]]
    assert step_passes([6, 9, 4, 7], 35) == [[1, 3, 0], [2]], "a third of a row at most is padding"
    assert step_passes([5, 9, 4, 6], 1) == [[1], [3], [0], [2]]


def test_a_step_in_passes_trains_the_same_adapters(tmp_path):
    """Duals and reports stay with their users, and a resumed run keeps the passes."""
    adapted, bank = AdaptedModel(tiny_base(), LoraSettings(rank=4)), constraint_bank()
    reference = Reference(adapted)
    reference.add([*(row for user in USERS for pair in user.train for row in pair[1:3]), *bank.rows()])
    constraint = LagrangianConstraint(bank, ConstraintSettings(), 0)
    settings = (DpoSettings(epochs=2, pairs_per_step=2), FleetSettings(slots=5), 0)
    runs = {}
    for room in (None, 300, 1):
        engine, reports = Engine(adapted, USERS, reference, constraint, *settings), []
        engine.room = room
        runs[room] = {user.user_id: user for user in engine.run(reports.extend)}, reports
    whole, reports = runs.pop(None)
    for parts, others in runs.values():
        for user, result in whole.items():
            torch.testing.assert_close(parts[user].adapter, result.adapter, rtol=1e-4, atol=1e-6)
            for name, dual in result.duals.items():
                assert parts[user].duals[name] == pytest.approx(dual, abs=1e-4)
        losses = [{(r.user_id, r.step): r.loss for r in run} for run in (reports, others)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    engine = Engine(adapted, USERS, reference, None, *settings, tmp_path)
    engine.room = 77
    engine._save()
    assert Engine(adapted, USERS, reference, None, *settings, tmp_path).room == 77
