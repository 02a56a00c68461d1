"""What lies below the adapters is computed once, and nothing but time tells the difference."""

import errno
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings, TopLayers
from persona_rlhf.data.tokenize import Row, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.models.packing import EMPTY, collate
from persona_rlhf.training import cache
from persona_rlhf.training.api import fleet_train
from persona_rlhf.training.cache import DiskStates, HiddenStateCache, Reference, rows_ahead
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from tests.models.tiny import constraint_bank, random_flat, random_row, tiny_base, tiny_tokenizer, user_rows

TOP = LoraSettings(rank=4, alpha=8, layers=TopLayers(top=0.5))
CONSTRAINT = ConstraintSettings(enabled=True, rows_per_step=2)
DPO = DpoSettings(epochs=2, pairs_per_step=3, learning_rate=0.01)


@pytest.fixture
def adapted():
    made = AdaptedModel(tiny_base(layers=4), TOP)
    yield made
    made.close()


def test_only_the_upper_layers_are_adapted(adapted):
    assert {int(name.split(".")[2]) for name in adapted.spans} == {2, 3}
    tiny_share = AdaptedModel(tiny_base(layers=4), LoraSettings(layers=TopLayers(top=0.01)))
    assert {name.split(".")[2] for name in tiny_share.spans} == {"3"}


@pytest.mark.parametrize("packs", [True, False])
def test_starting_above_changes_neither_values_nor_gradients(adapted, packs):
    adapted.packs_rows = packs
    draw = torch.Generator().manual_seed(6)
    made = [random_row(draw, 3 + n, 4 + 5 * n) for n in range(4)]
    rows = [made[0], Row(made[0].prompt, made[1].completion), made[3], made[1], EMPTY, EMPTY]
    states = [adapted.prefix_states(rows[:3]), adapted.prefix_states(rows[3:])]
    assert set(states[0]) == set(rows[:3])
    results = []
    for below in ((), states):
        flat = random_flat(adapted, 2).requires_grad_()
        with adapted.using(flat):
            logps = adapted.row_logps(adapted.batch(rows, 2), below)
            logps.sum().backward()
        results.append((logps.detach(), flat.grad))
    assert results[0][0].abs().max() > 1
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def test_the_lower_layers_are_really_left_out(adapted):
    row = random_row(torch.Generator().manual_seed(1), 5, 6)
    states = adapted.prefix_states([row])
    calls = []
    hook = adapted.base.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), adapted.using(None):
        adapted.row_logps(adapted.batch([row], 1), [states])
        assert not calls
        adapted.row_logps(adapted.batch([row], 1))
    hook.remove()
    assert calls


def test_the_reference_of_a_users_rows_starts_from_cached_states(adapted):
    """Nothing frozen is computed twice: a row passes the lower layers once, for its states and its reference."""
    users = [user_rows(f"u{n}", 3, n) for n in range(2)]
    rows = both_rows(pair for user in users for pair in user.train)
    assert rows_ahead(adapted, users) == []
    whole, above, tokens = Reference(adapted), Reference(adapted), []
    whole.add(rows)
    hook = adapted.base.model.model.layers[0].register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))
    kept = HiddenStateCache(adapted, above, [], 2, 2**20)
    for user in users:
        kept.of(user.user_id, user.train, user.train[:1], [])
    hook.remove()
    fed = {(*row.prompt, *row.completion[:-1]) for row in rows}
    assert sum(tokens) <= sum(map(len, fed))
    for row in rows:
        assert above[row] == pytest.approx(whole[row], abs=1e-4)


def test_other_states_give_other_values(adapted):
    """The states are what the upper layers begin with: a wrong one would be seen."""
    row = random_row(torch.Generator().manual_seed(1), 5, 6)
    states = adapted.prefix_states([row])
    with torch.no_grad(), adapted.using(None):
        right, wrong = (
            adapted.row_logps(adapted.batch([row], 1), [{row: states[row] * factor}]) for factor in (1.0, -1.0)
        )
    assert (right - wrong).abs().max() > 0.1


def test_a_base_with_positions_of_its_own_can_be_started_above():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=4, n_head=4)
    base = tiny_base()
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for block in model.transformer.h:  # GPT-2's own layers are Conv1D; one linear layer a block will do here
        block.mlp.act = torch.nn.Sequential(block.mlp.act, torch.nn.Linear(128, 128).requires_grad_(False))
    adapted = AdaptedModel(Base(model, tiny_tokenizer(), "gpt", "0", 64), TOP)
    assert {name.split(".")[2] for name in adapted.spans} == {"2", "3"}
    row = random_row(torch.Generator().manual_seed(1), 5, 6)
    with torch.no_grad(), adapted.using(random_flat(adapted, 1)):
        whole = adapted.row_logps(collate([row], 0, base.device))
        above = adapted.row_logps(adapted.batch([row], 1), [states := adapted.prefix_states([row])])
    assert row in states
    assert torch.allclose(whole, above, rtol=0, atol=1e-5)


def _train(users, trunk_cache, slots=2, trunk_disk=0):
    adapted = AdaptedModel(tiny_base(layers=4), TOP)
    bank = constraint_bank()
    reference = Reference(adapted)
    reference.add([row for user in users for pair in user.train for row in (pair.chosen, pair.rejected)] + bank.rows())
    fleet = FleetSettings(slots=slots, trunk_cache=trunk_cache, trunk_disk=trunk_disk)
    engine = Engine(adapted, users, reference, LagrangianConstraint(bank, CONSTRAINT, 0), DPO, fleet, 0)
    trained = {user.user_id: user.adapter for user in engine.run()}
    adapted.close()
    return trained


def test_a_fleet_trains_the_same_with_and_without_room_for_states():
    users = [user_rows(f"u{n}", 6, n) for n in range(3)]
    kept, anew = _train(users, 64), _train(users, 0)
    for user_id, adapter in kept.items():
        assert (adapter - anew[user_id]).abs().max() <= 1e-5
        assert adapter.abs().max() > 0.05


def test_states_that_memory_has_no_room_for_are_found_on_disk(monkeypatch):
    users, made = [user_rows(f"u{n}", 6, n) for n in range(3)], []

    class Spilled(DiskStates):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(cache, "DiskStates", Spilled)
    kept, reread = _train(users, 64), _train(users, 0, trunk_disk=64)
    assert len(made) == 4  # the bank's and each user's
    for user_id, adapter in kept.items():
        assert (adapter - reread[user_id]).abs().max() <= 1e-5
    assert _train(users, 0, trunk_disk=0).keys() == kept.keys()
    assert len(made) == 4


def test_a_file_of_states_has_no_name_and_gives_what_memory_would(adapted, tmp_path):
    rows = [random_row(torch.Generator().manual_seed(n), 4 + n % 3, 2 + n % 5) for n in range(12)]
    states, spilled = adapted.prefix_states(rows), DiskStates(adapted, [*rows, *rows], tmp_path)
    assert not list(tmp_path.iterdir())
    assert list(spilled) == list(dict.fromkeys(rows))
    assert len(spilled) == len(states)
    for row in rows:
        assert torch.allclose(spilled[row], states[row], rtol=0, atol=1e-5)
    assert not torch.equal(spilled[rows[0]], spilled[rows[3]])


def test_a_full_disk_is_said_before_anything_is_computed(adapted, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(adapted, "prefix_states", None)
    with pytest.raises(OSError, match=r"fleet\.trunk_disk"):
        DiskStates(adapted, [random_row(torch.Generator().manual_seed(1), 5, 6)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_neighbour_is_not_felt_at_the_same_shapes():
    one = [user_rows("a", 6, 1, even=True), user_rows("b", 6, 2, even=True)]
    two = [one[0], user_rows("b", 6, 3, even=True)]
    assert torch.equal(_train(one, 64)["a"], _train(two, 64)["a"])
    assert not torch.equal(_train(one, 64)["b"], _train(two, 64)["b"])


def test_users_in_a_fleet_are_users_alone():
    users = [user_rows(f"u{n}", 5 + n, n) for n in range(3)]
    together = _train(users, 64, slots=3)
    for user in users:
        alone = _train([user], 64)
        assert (together[user.user_id] - alone[user.user_id]).abs().max() <= 1e-5


def test_the_library_call_takes_upper_layers():
    users = [user_rows("a", 4, 1)]
    base = tiny_base(layers=4)
    trained = fleet_train(base.model, users, tokenizer=base.tokenizer, lora=TOP, dpo=DPO)
    whole = AdaptedModel(tiny_base(layers=4), LoraSettings(rank=4, alpha=8)).params_per_user
    assert trained["a"].adapter.numel() == whole // 2
