"""Predictions of a user's few pairs, each prompt from the others: evidence for the reward without a held-out pair.

The test is a randomisation test (Fisher 1935). If a user's labels were coin flips, each prompt's could as well be the
other way round, all of its pairs together. So the posterior is fitted again to labels that are flipped by coins, and
the p-value is the share of fits, the user's among them, at which the fitted pairs are as likely as the user's. It is
exact for any number of pairs, and it is small only where the labels have a rule that the basis can express.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.reward_basis import Posterior, Prior, approximate

FLIPS = 99
"""Fits to flipped labels; the smallest p-value is one in 100."""

_SAME = 1e-9  # of two log-likelihoods


class LeftOut(NamedTuple):
    """Of each prompt, the share of its pairs that the posterior of all others orders as the user does, less the
    prior's; and the p-value of "the labels are coin flips"."""

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
    generator = torch.Generator().manual_seed(seed)
    flips = torch.randint(0, 2, (FLIPS, len(numbers)), generator=generator)[:, of_pair] * 2 - 1
    labels = torch.cat([torch.ones(1, len(differences), dtype=flips.dtype), flips])
    fits = _likelihoods(differences * labels[..., None], prior)
    return LeftOut(gains, float((fits >= fits[0] - _SAME).double().mean()))


def _likelihoods(differences: Float[Tensor, "fits pairs rank"], prior: Prior) -> Float[Tensor, " fits"]:
    """The log-likelihood of each fit's pairs under its posterior."""
    posteriors = map(Posterior, *approximate(differences, prior))
    columns = zip(posteriors, differences, strict=True)
    return torch.stack([posterior.probability(pairs).log().sum() for posterior, pairs in columns])
