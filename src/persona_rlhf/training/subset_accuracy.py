"""Held-out accuracy of a user's reward on growing random subsets of the user's pairs: the curve of the labels.

With a basis the reward is the posterior on it. Without one it is a logistic regression on the features of the answers'
texts, with a normal prior; its weights lie in the span of the pairs, so a fit takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.training.answer_features import AnswerFeatures, scaled_features
from persona_rlhf.training.reward_basis import RewardBasis, approximate, laplace, shrinkage

SIZES = (0, 1, 2, 5, 10, 20, 40, 80, 160, 320)
"""Numbers of pairs; a user's curve goes up to the largest one that the user has."""
SUBSETS = 5
"""Random orders of a user's pairs; the first pairs of each are a subset."""
VARIANCE = 0.01
"""Variance of the normal prior of a weight, without a basis."""


class LabelledUser(NamedTuple):
    """A user's training pairs and held-out pairs."""

    user_id: str
    train: Sequence[PreferencePair]
    heldout: Sequence[PreferencePair]


class TextReward(NamedTuple):
    """The space in which users' rewards are fitted: features of answers, and the basis, where there is one."""

    features: AnswerFeatures
    basis: RewardBasis | None = None

    @staticmethod
    def of(basis: RewardBasis | None, users: Iterable[LabelledUser]) -> TextReward:
        """The space of a basis; without one, that of all features, scaled by the answers in users' training pairs."""
        if basis is not None:
            return TextReward(basis.features, basis)
        pairs = [pair for user in users for pair in user.train]
        return TextReward(scaled_features([text for pair in pairs for text in (pair.chosen, pair.rejected)]))

    def differences(self, pairs: Sequence[PreferencePair]) -> Float[Tensor, "pairs width"]:
        """Coordinates of chosen less rejected answers, shortened as in the fit of a basis."""
        chosen, rejected = (
            self.features(texts) for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        )
        rows = (chosen - rejected) * shrinkage(chosen - rejected)[:, None]
        return rows.double() if self.basis is None else self.basis.coordinates(rows)

    def weights(self, differences: Float[Tensor, "subsets pairs width"]) -> Float[Tensor, "subsets width"]:
        """The weights of rewards that are each fitted to one subset."""
        if self.basis is not None:
            return approximate(differences, self.basis.prior).mean
        width = differences.shape[2]
        variance = torch.full((len(differences), width), VARIANCE, dtype=differences.dtype)
        return laplace(differences, torch.zeros(width, dtype=differences.dtype), variance).mean


def subset_accuracies(
    reward: TextReward, user: LabelledUser, subsets: int = SUBSETS, seed: int = 0
) -> dict[int, list[float]]:
    """By number of pairs: of each held-out prompt the share of pairs ordered rightly, a mean over so many subsets.

    A pair that a reward does not order counts half. Empty where the user has no held-out pair or no training pair.
    """
    if not user.train or not user.heldout:
        return {}
    train, heldout = reward.differences(user.train), reward.differences(user.heldout)
    if reward.basis is None:
        span = torch.linalg.qr(train.T).Q
        train, heldout = train @ span, heldout @ span
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(train), generator=generator) for _ in range(subsets)])
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in user.heldout))}
    member = torch.tensor([[numbers[pair.prompt] == number for pair in user.heldout] for number in numbers.values()])
    accuracies = {}
    for size in (size for size in SIZES if size <= len(train)):
        weights = reward.weights(train[orders[:, :size]])
        points = ((heldout @ weights.T).sign() + 1) / 2
        shares = (member.double() @ points) / member.sum(1, keepdim=True)
        accuracies[size] = shares.mean(1).tolist()
    return accuracies
