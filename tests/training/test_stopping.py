"""The expected gain of more choices: against a simulation of the posterior's next means, and its limits."""

from __future__ import annotations

import pytest
import torch

from persona_rlhf.training.reward_basis import Posterior
from persona_rlhf.training.stopping import expected_gain


def posterior_of(scale: float = 1.0, seed: int = 0) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    mean = torch.randn(4, generator=generator, dtype=torch.float64)
    return Posterior(mean, scale * (root @ root.T / 4 + 0.1 * torch.eye(4, dtype=torch.float64)))


@pytest.fixture
def differences():
    return torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def simulated(posterior: Posterior, differences, more: int, draws: int = 40_000) -> float:
    """The gain by true weights drawn from the posterior, and what `more` choices would tell of them."""
    chance = posterior.probability(differences)
    information = more * torch.einsum("p,pi,pj->ij", chance * (1 - chance), differences, differences) / len(differences)
    after = torch.linalg.inv(torch.linalg.inv(posterior.covariance) + information)
    generator = torch.Generator().manual_seed(2)

    def draw(covariance):
        noise = torch.randn(draws, len(covariance), generator=generator, dtype=torch.float64)
        return noise @ torch.linalg.cholesky(covariance).T

    means = posterior.mean + draw(posterior.covariance - after)
    weights = means + draw(after)
    truth = (weights @ differences.T).sign()
    right_after = (means @ differences.T).sign() == truth
    right_before = posterior.margin(differences).sign() == truth
    return float(right_after.double().mean() - right_before.double().mean())


@pytest.mark.parametrize("more", [1, 10, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_gain_is_that_of_a_simulation(differences, more, scale):
    posterior = posterior_of(scale)
    assert expected_gain(posterior, differences, more) == pytest.approx(
        simulated(posterior, differences, more), abs=0.004
    )


def test_no_choice_brings_nothing_and_more_bring_more(differences):
    posterior = posterior_of()
    gains = [expected_gain(posterior, differences, more) for more in (0, 1, 5, 20, 1000)]
    assert gains[0] == pytest.approx(0, abs=1e-9)
    assert gains == sorted(gains)
    wrong = torch.distributions.Normal(0, 1).cdf(
        -posterior.margin(differences).abs() / ((differences @ posterior.covariance) * differences).sum(1).sqrt()
    )
    assert gains[-1] < float(wrong.mean())  # perfect information


def test_a_posterior_without_doubt_gains_nothing(differences):
    assert expected_gain(posterior_of(1e-6), differences) == pytest.approx(0, abs=1e-3)
