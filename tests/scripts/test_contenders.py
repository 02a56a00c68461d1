"""The constraint's rivals as plug-ins of the training loop, on a tiny base: each trains, and no two train the same."""

from types import SimpleNamespace

import pytest
import torch

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintFunctional
from tests.models.tiny import constraint_bank, tiny_base, user_rows
from tests.scripts.loading import load_script

CONFIG = SimpleNamespace(
    dpo=DpoSettings(epochs=4, learning_rate=5e-3), constraint=ConstraintSettings(margin=0.0, floor=-1000), seed=1
)


@pytest.fixture(scope="module")
def contenders():
    return load_script("contenders")


@pytest.fixture(scope="module")
def adapters(contenders):
    adapted, data, users = AdaptedModel(tiny_base(), LoraSettings(rank=4)), constraint_bank(limit=0.0), []
    users = [user_rows(f"user {n}", 6, seed=n) for n in range(2)]
    reference = Reference(adapted)
    reference.add([*(row for user in users for pair in user.train for row in pair[1:3]), *data.rows()])
    trained = {
        name: contender.train(adapted, users, reference, data, CONFIG, FleetSettings(slots=2))
        for name, contender in contenders.CONTENDERS.items()
    }
    return {name: torch.stack([user.adapter for user in users]) for name, users in trained.items()}


def test_every_contender_trains_in_its_own_way(adapters):
    others = dict(adapters)
    assert torch.equal(others.pop("swap"), others["plain"])  # here the pairs are not prepared
    assert all(adapter.isfinite().all() for adapter in others.values())
    distinct = {tuple(adapter.flatten().tolist()) for adapter in others.values()}
    assert len(distinct) == len(others)


@pytest.mark.parametrize("name", ["mix", "primal", "surgery", "ours", "squared"])
def test_a_constraint_functional_has_a_penalty_for_every_sample(contenders, name):
    functional = contenders.CONTENDERS[name].constraint(constraint_bank(), ConstraintSettings(rows_per_step=3), 1)
    assert isinstance(functional, ConstraintFunctional)
    samples = [functional.sample("a", 0), functional.sample("b", 3), functional.largest()]
    rows = max(len(sample.rows) for sample in samples)
    assert len(samples[2].rows) == rows
    logps = torch.full((3, rows), -2.0, requires_grad=True)
    penalty = functional.penalty(samples, logps, torch.full((3, rows), -1.0), torch.ones(3, 2))
    assert penalty.total.shape == (3,)
    assert (penalty.total > 0).all()
    assert (torch.autograd.grad(penalty.total.sum(), logps)[0] != 0).any(1).all()
    assert {row for sample in samples for row in sample.rows} <= set(functional.rows())
