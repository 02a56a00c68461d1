"""The gain in accuracy that more choices of a user are expected to bring, from the posterior of the user's weights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.reward_basis import Posterior

MORE = 20
"""Choices that are looked ahead."""
LEAST_GAIN = 0.01
"""Expected gain in accuracy of MORE choices below which more answers change little."""

_NODES = 21  # of the quadrature over the posterior's next mean


def expected_gain(posterior: Posterior, differences: Float[Tensor, "pairs rank"], more: int = MORE) -> float:
    """The expected gain in accuracy on `differences` after `more` choices between such pairs (preposterior analysis).

    A pair's margin is normal with mean m and variance v, so its sign is right with probability Phi(|m| / sqrt(v)).
    `more` choices add the expected Fisher information, p (1 - p) d d' each, to the precision, which leaves a variance
    v'. The mean then is m' = m + sqrt(v - v') z with a standard normal z (Raiffa and Schlaifer 1961, chapter 5), and
    the accuracy E Phi(|m'| / sqrt(v')). The gain of perfect information bounds it from above.
    """
    chance = posterior.probability(differences)
    weighted = differences * (chance * (1 - chance))[:, None]
    information = more * differences.T @ weighted / len(differences)
    precision = torch.linalg.inv(posterior.covariance) + information
    after = torch.linalg.inv(precision)
    mean = posterior.margin(differences)
    before, left = (_variances(differences, covariance) for covariance in (posterior.covariance, after))
    nodes, weights = _hermite()
    moved = mean[:, None] + (before - left).clamp_min(0).sqrt()[:, None] * nodes
    accuracy = _normal(moved.abs() / left.sqrt()[:, None]) @ weights
    return float((accuracy - _normal(mean.abs() / before.sqrt())).mean())


def _variances(differences: Tensor, covariance: Tensor) -> Tensor:
    return ((differences @ covariance) * differences).sum(1).clamp_min(1e-12)


def _normal(values: Tensor) -> Tensor:
    """The normal distribution function."""
    return (1 + torch.erf(values / math.sqrt(2))) / 2


def _hermite() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mean over a standard normal (Golub and Welsch 1969)."""
    off = torch.arange(1, _NODES, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0].square()
