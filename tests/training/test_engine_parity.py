"""A user in a fleet is the user alone, and the user alone is TRL's DPOTrainer with PEFT."""

import pytest
import torch

from persona_rlhf.config.training import DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.engine import Engine, TrainedUser
from tests.models.tiny import tiny_base, user_rows
from tests.training.oracles import trl_run

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(epochs=3, pairs_per_step=4, learning_rate=2e-3)


def _train(users, dtype=torch.float32, slots=8, dpo=DPO, losses=None) -> dict[str, TrainedUser]:
    adapted = AdaptedModel(tiny_base(dtype=dtype), LORA)
    reference = Reference(adapted)
    reference.add(row for user in users for pair in user.train for row in (pair.chosen, pair.rejected))
    fleet = FleetSettings(slots=slots)
    engine = Engine(adapted, users, reference, None, dpo, fleet, seed=7)

    def report(steps):
        if losses is not None:
            for step in steps:
                losses.setdefault(step.user_id, []).append(step.loss)

    return {user.user_id: user for user in engine.run(report)}


def _apart(one: TrainedUser, other: TrainedUser) -> float:
    assert one.adapter is not None
    assert other.adapter is not None
    return (one.adapter - other.adapter).abs().max().item()


@pytest.fixture(scope="module")
def uneven() -> list[UserRows]:
    """Eight users with 3 to 17 pairs of all lengths, and weights."""
    return [user_rows(f"user {n}", 3 + 2 * n, seed=n, weight=1.0 if n % 2 else 0.5) for n in range(8)]


@pytest.fixture(scope="module")
def uneven_fleet(uneven) -> dict[str, TrainedUser]:
    return _train(uneven)


def test_eight_in_a_fleet_are_each_alone_in_fp64():
    """Same tensor shapes: one length, so that transformers' fp32 islands (norms, rotary) round alike."""
    users = [user_rows(f"user {n}", 8, seed=n, even=True) for n in range(8)]
    together = _train(users, torch.float64)
    for user in users:
        [alone] = _train([user], torch.float64).values()
        assert together[user.user_id].steps == alone.steps == 6
        assert _apart(together[user.user_id], alone) <= 1e-12
        assert alone.adapter is not None
        assert alone.adapter.dtype == torch.float64


def test_users_of_unequal_size_in_fp64():
    """Users end one after the other; every step's pairs still have one length."""
    users = [user_rows(f"user {n}", 4 * (1 + n % 3), seed=n, even=True) for n in range(8)]
    together = _train(users, torch.float64)
    for user in users:
        [alone] = _train([user], torch.float64).values()
        assert together[user.user_id].steps == alone.steps == 3 * (1 + int(user.user_id[-1]) % 3)
        assert _apart(together[user.user_id], alone) <= 1e-12


def test_eight_uneven_users_in_a_fleet_are_each_alone_in_fp32(uneven, uneven_fleet):
    """Other padding, short last steps, users of unequal length."""
    for user in uneven:
        [alone] = _train([user]).values()
        assert uneven_fleet[user.user_id].steps == alone.steps
        assert uneven_fleet[user.user_id].status == "trained"
        assert _apart(uneven_fleet[user.user_id], alone) <= 1e-5
    moved = [user.adapter.norm() for user in uneven_fleet.values() if user.adapter is not None]
    assert len({round(float(norm), 6) for norm in moved}) == 8


def test_three_slots_refilled_train_what_eight_slots_train(uneven, uneven_fleet):
    streamed = _train(uneven, slots=3)
    assert set(streamed) == set(uneven_fleet)
    for user_id, user in streamed.items():
        assert _apart(user, uneven_fleet[user_id]) <= 1e-5
        assert user.steps == uneven_fleet[user_id].steps


def test_the_order_of_users_in_the_data_does_not_matter(uneven, uneven_fleet):
    for user_id, user in _train(uneven[::-1]).items():
        assert _apart(user, uneven_fleet[user_id]) == 0


def test_a_neighbours_values_change_no_bit():
    """The same shapes, but another neighbour: other tokens, other weights."""
    mine = user_rows("me", 8, seed=1, even=True)
    first, second = user_rows("you", 8, seed=2, even=True), user_rows("you", 8, seed=3, weight=2.5, even=True)
    one, other = _train([mine, first]), _train([mine, second])
    assert _apart(one["me"], other["me"]) == 0
    assert _apart(one["you"], other["you"]) > 1e-3


@pytest.mark.parametrize("kind", ["ipo", "hinge", "robust", "sigmoid_norm"])
def test_every_kind_of_loss_is_the_same_in_the_fleet(kind):
    dpo = DPO.model_copy(update={"loss": kind, "epochs": 1, "label_smoothing": 0.1 if kind == "robust" else 0.0})
    users = [user_rows(f"user {n}", 5 + n, seed=n) for n in range(3)]
    together = _train(users, dpo=dpo)
    for user in users:
        assert _apart(together[user.user_id], _train([user], dpo=dpo)[user.user_id]) <= 1e-5


@pytest.mark.parametrize(("kind", "anchor"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("sigmoid_norm", 0.0)])
def test_a_user_is_what_trl_and_peft_train(kind, anchor, tmp_path):
    """Same first A, same order of pairs, 24 steps with warm-up, decay and clip, fp32, no tricks on TRL's side."""
    dpo = DPO.model_copy(update={"loss": kind, "anchor": anchor})
    user = user_rows("user", 32, seed=5)
    losses: dict[str, list[float]] = {}
    [ours] = _train([user], dpo=dpo, losses=losses).values()
    theirs, their_losses = trl_run(tiny_base(), user, LORA, dpo, seed=7, folder=tmp_path)
    assert ours.steps == len(their_losses) == 24
    assert ours.adapter is not None
    assert (ours.adapter - theirs).norm() <= 1e-4 * theirs.norm()
    assert max(abs(a - b) for a, b in zip(losses["user"], their_losses, strict=True)) <= 1e-4
    assert their_losses[-1] < their_losses[0] - 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_other_schedules_are_trls_too(schedule, tmp_path):
    dpo = DPO.model_copy(update={"schedule": schedule, "epochs": 2, "warmup": 0.3, "weight_decay": 0.1})
    user = user_rows("user", 14, seed=6)
    [ours] = _train([user], dpo=dpo).values()
    theirs, _ = trl_run(tiny_base(), user, LORA, dpo, seed=7, folder=tmp_path)
    assert ours.adapter is not None
    assert (ours.adapter - theirs).norm() <= 1e-4 * theirs.norm()
