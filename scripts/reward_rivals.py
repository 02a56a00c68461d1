"""Rivals of the reward basis on the same features, and populations with a poisoned minority.

Prototypes (PAL, Chen et al. 2024, arXiv 2406.08469, its model B with a linear map): the reward of user u is
`x G s_u`, where the columns of G are prototypes, which all users share, and s_u lies on the simplex. A user without a
pair has the mean of all prototypes.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.reward_basis import Population

PROTOTYPES = 40
"""Twice the directions of the basis: a share is not negative, so a taste and its opposite need a prototype each."""
RIDGE = 10.0  # weight of |G|^2 / 2 in the sum over all pairs; chosen on users who are not reported
LEVEL = 0.3  # weight of |logits|^2 / 2 of a user, which draws shares together


class Prototypes(NamedTuple):
    """The prototypes, as directions of features."""

    directions: Float[Tensor, "features prototypes"]

    def shares(self, learnt: Float[Tensor, "pairs features"]) -> Float[Tensor, " prototypes"]:
        """A new user's shares of the prototypes, from chosen less rejected features, by L-BFGS on their logits."""
        differences = learnt @ self.directions
        logits = torch.zeros(self.directions.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.softplus(-(differences @ logits.softmax(0))).sum() + LEVEL / 2 * logits.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return logits.detach().softmax(0)

    def margins(
        self, learnt: Float[Tensor, "pairs features"], test: Float[Tensor, "tests features"]
    ) -> Float[Tensor, " tests"]:
        """The user's reward of the first answers over the second ones."""
        return test @ self.directions @ self.shares(learnt)


def fit_prototypes(population: Population, prototypes: int = PROTOTYPES, seed: int = 0) -> Prototypes:
    """Prototypes and all users' shares, by L-BFGS on the sum of the loss over pairs."""
    generator = torch.Generator().manual_seed(seed)
    features = population.features.float()
    directions = (0.05 * torch.randn(features.shape[1], prototypes, generator=generator)).requires_grad_()
    logits = (0.5 * torch.randn(len(population.user_ids), prototypes, generator=generator)).requires_grad_()
    optimizer = torch.optim.LBFGS([directions, logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        rewards = features @ directions
        margins = rewards[population.chosen] - rewards[population.rejected]
        of_users = (margins * logits.softmax(1)[population.users]).sum(1)
        penalty = RIDGE / 2 * directions.square().sum() + LEVEL / 2 * logits.square().sum()
        value = F.softplus(-of_users).sum() + penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Prototypes(directions.detach())


def flipped(population: Population, share: float, seed: int) -> Population:
    """The population with chosen and rejected exchanged in all pairs of this share of its users."""
    users = len(population.user_ids)
    attackers = torch.tensor(Random(f"{seed} flipped").sample(range(users), round(share * users)), dtype=torch.int64)
    turned = torch.isin(population.users, attackers)
    chosen = torch.where(turned, population.rejected, population.chosen)
    rejected = torch.where(turned, population.chosen, population.rejected)
    return population._replace(chosen=chosen, rejected=rejected)


def agreed(population: Population, share: float, seed: int) -> Population:
    """The population where this share of its users all choose the answer with more of one hidden direction.

    They are of one mind, which is the strongest pull on shared directions and on the population's mean.
    """
    users = len(population.user_ids)
    attackers = torch.tensor(Random(f"{seed} agreed").sample(range(users), round(share * users)), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    scores = population.features @ torch.randn(population.features.shape[1], generator=generator)
    wrong = torch.isin(population.users, attackers) & (scores[population.chosen] < scores[population.rejected])
    chosen = torch.where(wrong, population.rejected, population.chosen)
    rejected = torch.where(wrong, population.chosen, population.rejected)
    return population._replace(chosen=chosen, rejected=rejected)
