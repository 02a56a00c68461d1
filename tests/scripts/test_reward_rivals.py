"""Prototypes that users mix, and populations with a poisoned minority."""

import pytest
import torch

from persona_rlhf.training.reward_basis import Population
from tests.scripts.loading import SCRIPTS, load_script

USERS, PAIRS = 30, 40


@pytest.fixture(scope="module")
def rivals():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load_script("reward_rivals")


@pytest.fixture(scope="module")
def population():
    """Even users like the first feature, odd ones dislike it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 6, generator=generator)
    pairs = torch.randint(100, (USERS * PAIRS, 2), generator=generator)
    pairs[:, 1] = torch.where(pairs[:, 0] == pairs[:, 1], (pairs[:, 1] + 1) % 100, pairs[:, 1])
    users = torch.arange(USERS).repeat_interleave(PAIRS)
    likes = features[pairs[:, 0], 0] > features[pairs[:, 1], 0]
    turned = likes == (users % 2 == 1)
    chosen, rejected = torch.where(turned, pairs[:, 1], pairs[:, 0]), torch.where(turned, pairs[:, 0], pairs[:, 1])
    return Population(features, chosen, rejected, users, tuple(map(str, range(USERS))))


def test_a_new_user_of_either_taste_is_a_mixture_of_prototypes(rivals, population):
    prototypes = rivals.fit_prototypes(population, prototypes=4)
    differences = population.features[population.chosen] - population.features[population.rejected]
    for user in (0, 1):
        rows = differences[population.users == user]
        shares = prototypes.shares(rows[:10])
        assert float(shares.sum()) == pytest.approx(1)
        assert (shares >= 0).all()
        assert float((prototypes.margins(rows[:10], rows[10:]) > 0).double().mean()) > 0.9


def test_without_a_pair_all_prototypes_have_the_same_share(rivals):
    shares = rivals.Prototypes(torch.eye(4)).shares(torch.zeros(0, 4))
    assert shares.tolist() == pytest.approx([0.25] * 4)


def test_a_share_of_the_users_is_flipped_whole_and_nobody_else(rivals, population):
    poisoned = rivals.flipped(population, 0.2, 0)
    changed = poisoned.chosen != population.chosen
    by_user = changed.view(USERS, PAIRS)
    assert int(by_user.all(1).sum()) == int(by_user.any(1).sum()) == 6
    assert torch.equal(poisoned.rejected[changed], population.chosen[changed])


def test_users_who_agree_have_one_reward_that_orders_all_their_pairs(rivals, population):
    poisoned = rivals.agreed(population, 0.2, 0)
    changed = (poisoned.chosen != population.chosen).view(USERS, PAIRS).any(1)
    assert 0 < int(changed.sum()) <= 6
    scores = population.features @ torch.randn(6, generator=torch.Generator().manual_seed(0))
    attackers = changed[population.users]
    assert (scores[poisoned.chosen] >= scores[poisoned.rejected])[attackers].all()
