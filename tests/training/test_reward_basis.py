"""The shared reward basis against an optimiser, sampled users and refits; features without text or a user's label."""

import inspect

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from persona_rlhf.common.errors import InputError
from persona_rlhf.training import answer_features, reward_basis
from persona_rlhf.training.answer_features import AnswerFeatures, scaled_features
from persona_rlhf.training.reward_basis import (
    Population,
    Posterior,
    Prior,
    RewardBasis,
    approximate,
    fit_basis,
    laplace,
    load_basis,
    varimax,
)

COUNT, WIDTH = 120, 24  # answers, features
WANTED = 3  # features that users care for


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def population(users=24, pairs=40, seed=0):
    """Each user likes or dislikes one of the first features; every other user has an extra pair."""
    features = normal(COUNT, WIDTH, seed=seed).float()
    rng = np.random.default_rng(seed)
    rows = [(u, *rng.choice(COUNT, 2, replace=False)) for u in range(users) for _ in range(pairs + u % 2)]
    chosen, rejected = [], []
    for user, first, second in rows:
        sign = 1 if user % 2 else -1
        better = sign * (features[first, user % WANTED] - features[second, user % WANTED]) > 0
        chosen.append(first if better else second)
        rejected.append(second if better else first)
    numbers = torch.tensor([user for user, _, _ in rows])
    return Population(features, torch.tensor(chosen), torch.tensor(rejected), numbers, tuple(map(str, range(users))))


def basis_of(people):
    return fit_basis(AnswerFeatures(torch.ones(WIDTH)), people, rank=6, ridge=10.0, sparsity=5.0)


@pytest.fixture(scope="module")
def fitted():
    return basis_of(population())


def test_the_mode_and_its_covariance_are_those_of_an_optimiser():
    differences, location = 3 * normal(2, 9, 4, seed=1), normal(4, seed=2)
    variance = torch.tensor([[0.3, 1.0, 5.0, 80.0], [2.0, 0.1, 1.0, 1.0]], dtype=torch.float64)
    ours = laplace(differences, location, variance)
    for user in range(2):
        x, mu, v = differences[user].numpy(), location.numpy(), variance[user].numpy()

        def loss(w, x=x, mu=mu, v=v):
            return np.logaddexp(0, -x @ w).sum() + ((w - mu) ** 2 / v).sum() / 2

        best = minimize(loss, mu, method="BFGS", options={"gtol": 1e-9}).x
        chances = 1 / (1 + np.exp(-x @ best))
        hessian = np.diag(1 / v) + x.T @ ((chances * (1 - chances))[:, None] * x)
        assert ours.mean[user].numpy() == pytest.approx(best, abs=1e-5)
        assert ours.covariance[user].numpy() == pytest.approx(np.linalg.inv(hessian), rel=1e-4, abs=1e-6)


def test_newton_ends_where_plain_steps_would_jump_to_and_fro():
    differences = torch.tensor([[[40.0, 0.0], [-40.0, 1.0], [40.0, 2.0], [0.01, 0.0]]], dtype=torch.float64)
    ours = laplace(differences, torch.tensor([30.0, -30.0]).double(), torch.full((1, 2), 1e6).double())
    chances = torch.sigmoid(differences[0] @ ours.mean[0])
    gradient = (ours.mean[0] - torch.tensor([30.0, -30.0])) / 1e6 - differences[0].T @ (1 - chances)
    assert gradient.abs().max() < 1e-5


def test_a_user_without_a_pair_has_the_prior_and_more_pairs_are_more_certain():
    prior = Prior(torch.tensor([0.5, -0.2]).double(), 0.3)
    basis = RewardBasis(AnswerFeatures(torch.ones(2)), torch.eye(2).double(), prior)
    nothing = basis.posterior(torch.zeros(0, 2).double())
    assert torch.equal(nothing.mean, prior.location)
    pairs = normal(900, 2, seed=3)
    agree = torch.rand(900, generator=torch.Generator().manual_seed(3)).double() < torch.sigmoid(2 * pairs[:, 0])
    pairs = pairs * torch.where(agree, 1.0, -1.0)[:, None]
    posteriors = [basis.posterior(pairs[:n]) for n in (20, 900)]
    few, many = (posterior.covariance.diagonal() for posterior in posteriors)
    assert (many < few / 5).all()
    assert posteriors[1].mean.tolist() == pytest.approx([2.0, 0.0], abs=0.3)


@pytest.mark.parametrize(("degrees", "gap"), [(1e6, 0.02), (3.0, 0.11)])
def test_the_posterior_is_calibrated_on_users_drawn_from_the_prior(degrees, gap):
    """Predicted probabilities against outcomes, in four bins, for 400 users of 15 pairs.

    Exact but for Laplace's approximation under a normal prior. Under heavy tails of the true scale it is too cautious.
    """
    generator = np.random.default_rng(0)
    prior = Prior(torch.zeros(6).double(), 0.5, degrees)
    weights = torch.tensor(0.5 * generator.standard_t(degrees, (400, 6)))
    differences = normal(400, 35, 6, seed=5)
    margins = (differences @ weights[..., None])[..., 0]
    outcome = torch.tensor(generator.random((400, 35))) < torch.sigmoid(margins)
    signed = differences * torch.where(outcome, 1.0, -1.0)[..., None]
    posteriors = list(map(Posterior, *approximate(signed[:, :15], prior)))
    pairs = list(zip(posteriors, differences[:, 15:], strict=True))
    moderated = torch.cat([posterior.probability(later) for posterior, later in pairs])
    plain = torch.cat([torch.sigmoid(posterior.margin(later)) for posterior, later in pairs])
    truth = outcome[:, 15:].flatten().double()

    def worst_gap(predicted):
        bins = [(predicted > low) & (predicted <= low + 0.25) for low in (0, 0.25, 0.5, 0.75)]
        return max(abs(float(predicted[b].mean() - truth[b].mean())) for b in bins)

    assert worst_gap(moderated) < gap
    if degrees > 3:
        assert worst_gap(plain) > 2 * gap, "ignoring the variance is overconfident"
    else:
        sure = moderated > 0.75
        assert truth[sure].mean() > moderated[sure].mean(), "cautious, not overconfident"


def test_new_users_are_predicted_from_five_pairs(fitted):
    """The population shows which three of 24 features count, and that a user has one of them."""
    new = population(users=12, pairs=50, seed=7)
    coordinates = fitted.coordinates(new.features)
    differences = coordinates[new.chosen] - coordinates[new.rejected]
    rows = [differences[new.users == user] for user in range(12)]
    right = [(fitted.posterior(user[:5]).margin(user[5:]) > 0).double().mean() for user in rows]
    assert torch.stack(right).mean() > 0.75


def test_directions_that_nobody_needs_are_left_out(fitted):
    assert fitted.directions.shape[1] == WANTED


def test_there_may_be_fewer_users_than_directions_but_not_too_few_pairs():
    assert 1 <= basis_of(population(users=4)).directions.shape[1] <= 4
    with pytest.raises(ValueError, match="more users or more pairs"):
        basis_of(population(users=2, pairs=1))


def test_a_user_leaves_without_a_trace():
    """The fit without a user has the bits of the fit of a population that never had the user or the user's answers."""
    people = population()
    extra = normal(4, WIDTH, seed=9).float()
    joined = Population(
        torch.cat([people.features, extra]),
        torch.cat([torch.tensor([COUNT, COUNT + 1]), people.chosen]),
        torch.cat([torch.tensor([COUNT + 2, COUNT + 3]), people.rejected]),
        torch.cat([torch.zeros(2, dtype=torch.int64), people.users + 1]),
        ("leaver", *people.user_ids),
    )
    left = joined.without("leaver")
    assert left.user_ids == people.user_ids
    never, gone, present = basis_of(people), basis_of(left), basis_of(joined)
    assert torch.equal(gone.directions, never.directions)
    assert torch.equal(gone.prior.location, never.prior.location)
    assert not torch.allclose(present.directions, never.directions, atol=1e-6)
    with pytest.raises(ValueError, match="not in this population"):
        left.without("leaver")


def test_a_users_weight_has_a_ceiling(monkeypatch):
    """Repeating a user's pairs beyond the ceiling changes nothing, and nor does a longer difference."""
    people = population(pairs=40)
    monkeypatch.setattr(reward_basis, "MOST_PAIRS", 20)
    mine = people.users == 0
    again = people._replace(
        chosen=torch.cat([people.chosen[mine], people.chosen]),
        rejected=torch.cat([people.rejected[mine], people.rejected]),
        users=torch.cat([people.users[mine], people.users]),
    )
    assert basis_of(again).directions == pytest.approx(basis_of(people).directions, abs=1e-3)
    monkeypatch.setattr(reward_basis, "LARGEST_DIFFERENCE", 5.0)
    long = people._replace(features=1000 * people.features)
    assert basis_of(long).directions * 1000 == pytest.approx(basis_of(people).directions, abs=1e-3)


def test_a_basis_is_saved_as_numbers_alone(tmp_path, fitted):
    file = tmp_path / "basis.safetensors"
    fitted.save(file)
    again = load_basis(file)
    assert torch.equal(again.directions, fitted.directions)
    assert again.prior.scale == fitted.prior.scale
    assert torch.equal(again.features.scale, fitted.features.scale)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="no reward basis"):
        load_basis(file)


def test_varimax_finds_the_axes_of_sparse_loadings():
    sparse = normal(200, 3, seed=11) * (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.2)
    turn = torch.linalg.qr(normal(3, 3, seed=12)).Q
    product = turn @ varimax(sparse @ turn)
    assert product.abs().max(1).values == pytest.approx(torch.ones(3).double(), abs=0.02)


def test_features_read_form_and_words():
    features = scaled_features(
        ["Go on, friend!", "1. Walk. 2. Run.", "Would you like more?", "A long evening of rain."]
    )
    rows = features(["Would you run?", "would YOU run?", "Run! 1. Walk.", ""])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert torch.isfinite(rows).all()
    assert not rows[3].any()


def test_neither_utilities_nor_labels_can_enter():
    """Features know texts alone; the basis knows no module of the simulation, and swapped choices swap all signs."""
    for module in (answer_features, reward_basis):
        source = inspect.getsource(module)
        assert "simulation" not in source
        assert "clean_choice" not in source
    people = population()
    swapped = basis_of(people._replace(chosen=people.rejected, rejected=people.chosen))
    straight = basis_of(people)
    popular, unpopular = (basis.directions @ basis.prior.location for basis in (straight, swapped))
    assert popular == pytest.approx(-unpopular, abs=1e-4)


def test_choices_at_random_teach_nothing(fitted):
    """With shuffled choices a held-out pair is predicted at chance: no label reaches a prediction by another way."""
    people = population(users=40)
    coins = torch.rand(len(people.users), generator=torch.Generator().manual_seed(1)) < 0.5
    chosen = torch.where(coins, people.chosen, people.rejected)
    shuffled = people._replace(chosen=chosen, rejected=torch.where(coins, people.rejected, people.chosen))
    coordinates = fitted.coordinates(people.features)
    differences = coordinates[shuffled.chosen] - coordinates[shuffled.rejected]
    right = []
    for user in range(40):
        rows = differences[people.users == user]
        posterior = fitted.posterior(rows[:20])
        right.append((posterior.margin(rows[20:]) > 0).double().mean())
    assert abs(float(torch.stack(right).mean()) - 0.5) < 0.05
