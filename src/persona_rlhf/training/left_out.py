"""Predictions of a user's few pairs, each prompt from the others: evidence for the reward without a held-out pair.

The test is a Monte Carlo test (Barnard 1963) of "the user only repeats the population's mean". Its statistic is the
log-likelihood of the pairs under the user's posterior, less that under the mean at the noise that suits the user best.
It is small for a user who only repeats the mean, however surely. Labels are drawn anew, one draw a prompt: with
P = sigmoid(d), where d is the mean reward difference of the prompt's pairs, and once more by coins. The p-value of each
is the share of label sets, the user's among them, whose statistic is as large; the larger one counts. So it is exact or
cautious for labels that are such draws, and for coin flips, with any number of prompts. For noise in between it is an
approximation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.reward_basis import Posterior, Prior, approximate

DRAWS = 99
"""Fits to labels drawn by the mean, and as many by coins; the smallest p-value is one in 100."""

_CERTAINTIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # factors of the population's mean reward
_SAME = 1e-9  # of two log-likelihoods


class LeftOut(NamedTuple):
    """Of each prompt, the share of its pairs that the posterior of all others orders as the user does, less the
    prior's; and the p-value of "the labels repeat the population's mean, or are coin flips"."""

    gains: list[float]
    p_value: float


def left_out(
    differences: Float[Tensor, "pairs rank"], prompts: Sequence[Hashable], prior: Prior, seed: int = 0
) -> LeftOut:
    """The prediction of each prompt from the others. `differences`: coordinates of chosen less rejected answers.

    A pair that a reward does not order counts half. Raises ValueError without a pair.
    """
    if not len(differences):
        raise ValueError("there is no pair to leave out")
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    of_pair = torch.tensor([numbers[prompt] for prompt in prompts])
    member = of_pair == torch.arange(len(numbers))[:, None]
    without = approximate(differences * ~member[..., None], prior)  # a row of zeros tells nothing
    predicted, before = differences @ without.mean.T, differences @ prior.location
    points = (predicted[torch.arange(len(differences)), of_pair].sign() - before.sign()) / 2
    gains = [float(points[one].mean()) for one in member]
    rewards = torch.stack([before[one].mean() for one in member])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(DRAWS, len(numbers), generator=generator, dtype=before.dtype)
    p_values = []
    for certainty in (0.0, 1.0):
        kept = draws < torch.sigmoid(certainty * rewards)
        labels = torch.cat([torch.ones(1, len(differences)), kept[:, of_pair] * 2.0 - 1]).to(differences)
        statistics = _likelihood_ratios(differences * labels[..., None], prior)
        p_values.append(float((statistics >= statistics[0] - _SAME).double().mean()))
    return LeftOut(gains, max(p_values))


def _likelihood_ratios(differences: Float[Tensor, "fits pairs rank"], prior: Prior) -> Float[Tensor, " fits"]:
    """The log-likelihood of each fit's pairs under its posterior, less the largest under the population's mean."""
    posteriors = map(Posterior, *approximate(differences, prior))
    columns = zip(posteriors, differences, strict=True)
    fitted = torch.stack([posterior.probability(pairs).log().sum() for posterior, pairs in columns])
    margins = differences @ prior.location
    return fitted - torch.stack([F.logsigmoid(factor * margins).sum(1) for factor in _CERTAINTIES]).amax(0)
