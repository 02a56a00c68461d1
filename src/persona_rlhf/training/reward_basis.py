"""A low-rank reward that users share, and each user's weights on it with their uncertainty, from one pair up.

User u prefers answer a to b with probability `sigmoid((x_a - x_b) V w_u)` (Bradley and Terry 1952), where x are
features of the answers (`answer_features`). The directions V are fitted once over consenting users (as in LoRe, Bose et
al. 2025), with few large weights a user. A new user's w then takes milliseconds: its prior is the population's, and its
posterior is taken as normal. No utility is needed: features, prior and stopping come from answers and choices alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path, sha256_of
from persona_rlhf.training.answer_features import AnswerFeatures

RANK = 40
"""Directions of the basis, at most: those that no user needs end near zero and are left out."""
RIDGE = 70.0
"""Weight of |V|^2 / 2 in the loss of a population, which is a sum over pairs."""
SPARSITY = 30.0
"""Weight of the sum of |w| in that loss: most users care for few directions."""
MOST_PAIRS = 80
"""Weight of a user in the shared loss, in pairs, at most; all pairs of a user with more count less."""
LARGEST_DIFFERENCE = 60.0
"""Norm of a pair's difference of features, at most; a longer one is shortened."""

_ROUNDING = 0.05  # of |w| near 0, so that the loss is smooth
_LEAST_REWARD = 1e-3  # largest singular value of W V^T; below it the penalties outweigh the pairs
_LEAST_SPREAD = 0.02  # of a direction that is kept, against the widest
_SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of the prior, in standard deviations of a direction over answers
_FIRST = 20  # pairs of a user from which the scale of the prior predicts the others
_ROUNDS = 10
_FORMAT = 3
_NOTES = "persona-rlhf"  # one entry: safetensors writes several in any order


class Population(NamedTuple):
    """The pairs of consenting users over a set of answers: `users` numbers the user of each pair in `user_ids`."""

    features: Float[Tensor, "answers features"]
    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    users: Int[Tensor, " pairs"]
    user_ids: tuple[str, ...]

    def without(self, user_id: str) -> Population:
        """The population as if this user had never been in it; answers of nobody else leave with the user.

        A basis fitted on it has no share of the user: removal is a refit, and exact. Raises ValueError for a stranger.
        """
        if user_id not in self.user_ids:
            raise ValueError(f"user {user_id!r} is not in this population")
        number = self.user_ids.index(user_id)
        kept = self.users != number
        pairs = torch.stack([self.chosen[kept], self.rejected[kept]])
        answers, places = pairs.unique(return_inverse=True)
        users = self.users[kept]
        ids = self.user_ids[:number] + self.user_ids[number + 1 :]
        return Population(self.features[answers], places[0], places[1], users - (users > number).long(), ids)


class Prior(NamedTuple):
    """Independent Student t distributions of a user's weights: `location`, one common scale, and degrees of freedom.

    Half a degree has heavier tails than a Cauchy distribution: most weights are near the location and few are far. The
    location is the population's mean, which a user without a pair has.
    """

    location: Float[Tensor, " rank"]
    scale: float
    degrees: float = 0.5


class Posterior(NamedTuple):
    """The normal approximation to one user's weights. `mean` and `covariance` are in units of the basis."""

    mean: Float[Tensor, " rank"]
    covariance: Float[Tensor, "rank rank"]

    def margin(self, differences: Float[Tensor, "pairs rank"]) -> Float[Tensor, " pairs"]:
        """The expected reward of the first answers over the second ones, in log-odds."""
        return differences @ self.mean

    def probability(self, differences: Float[Tensor, "pairs rank"]) -> Float[Tensor, " pairs"]:
        """P(the first answer is preferred), averaged over the posterior (MacKay 1992, the moderated output)."""
        variance = ((differences @ self.covariance) * differences).sum(1)
        return torch.sigmoid(self.margin(differences) / (1 + math.pi * variance / 8).sqrt())


@dataclass(frozen=True)
class RewardBasis:
    """Features, directions and prior of a population. `coordinates` turns texts into rows for a user's weights.

    `base` is the sha256 of the weights of the base whose answers gave the scale of the features, `sha256` that of the
    file that the basis was read from.
    """

    features: AnswerFeatures
    directions: Float[Tensor, "features rank"]
    prior: Prior
    base: str = ""
    sha256: str = ""

    def coordinates(self, features: Float[Tensor, "answers features"]) -> Float[Tensor, "answers rank"]:
        """The coordinates of answers, from their features."""
        return features.double() @ self.directions

    def posterior(self, differences: Float[Tensor, "pairs rank"]) -> Posterior:
        """A user's weights, from the coordinates of each chosen answer less those of its rejected one; none is a case.

        Milliseconds for a hundred pairs on one core.
        """
        approximated = approximate(differences[None], self.prior)
        return Posterior(approximated.mean[0], approximated.covariance[0])

    def save(self, file: Path) -> None:
        """Writes the basis as safetensors: numbers alone, no text and no user. Directions have single precision."""
        tensors = {"scale": self.features.scale, "directions": self.directions.float()}
        tensors["location"] = self.prior.location
        notes = {"format": _FORMAT, "prior": [self.prior.scale, self.prior.degrees], "base": self.base}
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file, needed=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {_NOTES: json.dumps(notes)}
            )


def load_basis(file: Path) -> RewardBasis:
    """A saved basis. Raises InputError if the file is none, or of another format."""
    try:
        with safe_open(file, framework="pt") as stored:
            notes = json.loads(stored.metadata()[_NOTES])
            tensors = {name: stored.get_tensor(name) for name in ("scale", "directions", "location")}
            if notes["format"] != _FORMAT:
                raise ValueError(f"format {notes['format']}, not {_FORMAT}")
            prior, base = Prior(tensors["location"], *notes["prior"]), notes["base"]
    except Exception as fault:  # safetensors raises its own kinds
        sentence = f"this is no reward basis ({fault}); fit it again"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault
    return RewardBasis(AnswerFeatures(tensors["scale"]), tensors["directions"].double(), prior, base, sha256_of(file))


def fit_basis(
    features: AnswerFeatures,
    population: Population,
    rank: int = RANK,
    ridge: float = RIDGE,
    sparsity: float = SPARSITY,
    seed: int = 0,
) -> RewardBasis:
    """The basis of a population. The same population, order and seed give the same basis.

    First V and W minimise the loss with `ridge / 2 (|V|^2 + |W|^2)`, which penalises the trace norm of `W V^T` (Srebro
    et al. 2005) and leaves a rotation free. Varimax turns W to where users need few directions. Then the sum of |w|
    takes the place of |W|^2. Each direction is scaled to a spread of 1 over the population's answers.
    A user weighs at most `MOST_PAIRS`, and the norm of the user's weights is bounded through `sparsity`. Raises
    ValueError if the penalties outweigh all pairs: there are too few.
    """
    pairs = _SharedPairs(population)
    users = len(population.user_ids)
    generator = torch.Generator().manual_seed(seed)
    start = 0.05 * torch.randn(population.features.shape[1], rank, generator=generator)
    factors = _minimise(pairs, _Factors(start, torch.zeros(users, rank)), ridge, lambda w: ridge / 2 * w.square().sum())
    directions, weights = _balanced(factors)
    rotation = varimax(weights)
    turned = _Factors((directions @ rotation).float(), (weights @ rotation).float())
    factors = _minimise(pairs, turned, ridge, lambda w: sparsity * (w.square() + _ROUNDING**2).sqrt().sum())
    spread = (population.features.float() @ factors.directions).double().std(0)
    kept = spread > _LEAST_SPREAD * spread.max()
    directions = (factors.directions.double()[:, kept] / spread[kept]).float().double()  # as it is saved
    location = (factors.weights.double()[:, kept] * spread[kept]).mean(0)
    return RewardBasis(features, directions, _fit_prior(pairs, directions, location))


class _Factors(NamedTuple):
    """V and W: the reward of an answer with features x for user u is `x V w_u`."""

    directions: Float[Tensor, "features rank"]
    weights: Float[Tensor, "users rank"]


class _SharedPairs:
    """The pairs of a population, weighted and shortened so that one user's influence on V is bounded."""

    def __init__(self, population: Population) -> None:
        features = population.features.float()
        self.sparse, self.transposed = features.to_sparse().coalesce(), features.T.to_sparse().coalesce()
        self.chosen, self.rejected, self.users = population.chosen, population.rejected, population.users
        counts = torch.bincount(self.users, minlength=len(population.user_ids))
        self.weight = (MOST_PAIRS / counts.clamp_min(1)).clamp(max=1)[self.users]
        parts = zip(self.chosen.split(4096), self.rejected.split(4096), strict=True)
        self.shrink = torch.cat([shrinkage(features[a] - features[b]) for a, b in parts])

    def differences(self, directions: Float[Tensor, "features rank"]) -> Float[Tensor, "pairs rank"]:
        """Coordinates of chosen less rejected answers."""
        coordinates: Tensor = _SparseProduct.apply(directions, self.sparse, self.transposed)  # type: ignore[no-untyped-call]
        first, second = coordinates.index_select(0, self.chosen), coordinates.index_select(0, self.rejected)
        return (first - second) * self.shrink[:, None]


def shrinkage(differences: Float[Tensor, "pairs features"]) -> Float[Tensor, " pairs"]:
    """The factors that shorten differences of features to `LARGEST_DIFFERENCE`; 1 for most."""
    norms: Tensor = differences.norm(dim=1)
    return (LARGEST_DIFFERENCE / norms.clamp_min(1e-12)).clamp(max=1)


class _SparseProduct(torch.autograd.Function):
    """`A V` for a sparse A that is given transposed as well."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, dense: Tensor, sparse: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed  # type: ignore[attr-defined]
        return sparse @ dense

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ gradient, None, None  # type: ignore[attr-defined]


def _minimise(pairs: _SharedPairs, start: _Factors, ridge: float, penalty: Callable[[Tensor], Tensor]) -> _Factors:
    """V and W that minimise the weighted loss of all pairs, `ridge / 2 |V|^2` and a penalty of W, by L-BFGS."""
    directions, weights = (factor.clone().requires_grad_() for factor in start)
    optimizer = torch.optim.LBFGS(
        [directions, weights], max_iter=100, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        margins = (pairs.differences(directions) * weights.index_select(0, pairs.users)).sum(1)
        value = (pairs.weight * F.softplus(-margins)).sum() + ridge / 2 * directions.square().sum() + penalty(weights)
        value.backward()
        return value

    optimizer.step(loss)
    return _Factors(directions.detach(), weights.detach())


def _balanced(factors: _Factors) -> _Factors:
    """The same product `W V^T`, with orthogonal columns that share the singular values; null ones are left out."""
    q_directions, r_directions = torch.linalg.qr(factors.directions.double())
    q_weights, r_weights = torch.linalg.qr(factors.weights.double())
    left, values, right = torch.linalg.svd(r_weights @ r_directions.T, full_matrices=False)
    if values[0] < _LEAST_REWARD:
        raise ValueError("the choices of this population share no direction: it needs more users or more pairs")
    kept = values > 1e-3 * values[0]
    root = values[kept].sqrt()
    return _Factors(q_directions @ right.T[:, kept] * root, q_weights @ left[:, kept] * root)


def varimax(loadings: Float[Tensor, "rows rank"], rounds: int = 300) -> Float[Tensor, "rank rank"]:
    """The rotation after which each column of loadings has few large entries (Kaiser 1958)."""
    rotation, criterion = torch.eye(loadings.shape[1], dtype=loadings.dtype), 0.0
    for _ in range(rounds):
        turned = loadings @ rotation
        left, values, right = torch.linalg.svd(loadings.T @ (turned**3 - turned * turned.square().mean(0)))
        rotation = left @ right
        if float(values.sum()) < criterion * (1 + 1e-6):
            break
        criterion = float(values.sum())
    return rotation


class Approximated(NamedTuple):
    """Normal approximations of many users."""

    mean: Float[Tensor, "users rank"]
    covariance: Float[Tensor, "users rank rank"]

    def squares(self, location: Float[Tensor, " rank"]) -> Float[Tensor, "users rank"]:
        """The expected squared distance of every weight from its location."""
        return (self.mean - location).square() + torch.diagonal(self.covariance, dim1=1, dim2=2)


def approximate(differences: Float[Tensor, "users pairs rank"], prior: Prior) -> Approximated:
    """Laplace approximations under a Student t prior, taken as a normal one of unknown variance (Tipping 2001).

    Each round finds the mode under normal priors, which is a convex problem, and then moves each variance to where the
    expected square of its weight puts it.
    """
    variance = torch.full((len(differences), len(prior.location)), prior.scale**2, dtype=differences.dtype)
    for _ in range(_ROUNDS):
        approximated = laplace(differences, prior.location, variance)
        squares = approximated.squares(prior.location)
        variance = (prior.degrees * prior.scale**2 + squares) / (prior.degrees + 1)
    return approximated


def laplace(
    differences: Float[Tensor, "users pairs rank"],
    location: Float[Tensor, " rank"],
    variance: Float[Tensor, "users rank"],
) -> Approximated:
    """The Laplace approximation of each user's weights under normal priors: the mode and the inverse Hessian.

    The log posterior is concave. Newton's steps, shortened as Sun and Tran-Dinh 2019 (equation 14) do for convergence
    from anywhere, go on until none is longer than 1e-7 prior deviations.
    """
    deviation = variance.sqrt()
    scaled, offset = differences * deviation[:, None], differences @ location
    modes = torch.zeros_like(variance)
    identity = torch.eye(variance.shape[1], dtype=variance.dtype)
    longest = math.inf
    while longest > 1e-7:
        chances = torch.sigmoid((scaled @ modes[..., None])[..., 0] + offset)
        gradient = modes - (scaled.mT @ (1 - chances)[..., None])[..., 0]
        hessian = identity + scaled.mT @ ((chances * (1 - chances))[..., None] * scaled)
        step = torch.linalg.solve(hessian, gradient)
        reach = (scaled @ step[..., None]).abs().amax(1) if scaled.shape[1] else torch.zeros_like(step[:, :1])
        modes = modes - step * torch.where(reach > 0, reach.log1p() / reach, 1.0)
        longest = float(step.norm(dim=1).max())
    inverse = torch.linalg.inv(hessian)
    return Approximated(location + modes * deviation, inverse * deviation[:, :, None] * deviation[:, None])


def _fit_prior(
    pairs: _SharedPairs, directions: Float[Tensor, "features rank"], location: Float[Tensor, " rank"]
) -> Prior:
    """The scale under which users' later pairs are most likely, each user's predicted from the first few."""
    differences = pairs.differences(directions.float()).double()
    users = [differences[pairs.users == number] for number in range(int(pairs.users.max()) + 1)]
    users = [rows for rows in users if len(rows) > _FIRST]
    if not users:
        return Prior(location, _SCALES[3])
    first = torch.stack([rows[:_FIRST] for rows in users])

    def likelihood(prior: Prior) -> float:
        posteriors = map(Posterior, *approximate(first, prior))
        later = zip(posteriors, users, strict=True)
        return sum(float(user.probability(rows[_FIRST:]).log().sum()) for user, rows in later)

    return max((Prior(location, scale) for scale in _SCALES), key=likelihood)
