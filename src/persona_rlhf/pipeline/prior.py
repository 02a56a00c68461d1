"""The gain of users' adapters over the prior, by the pairs that each user has."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.prior_gain import FEWEST_HELDOUT, PriorGain, PriorName, heldout_gain, left_out_gain
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.training.labelled_pairs import differences_of
from persona_rlhf.training.left_out import left_out
from persona_rlhf.training.reward_basis import RewardBasis

_MOST_LEFT_OUT = 200  # pairs: time and memory grow with their square


def gains_over_prior(
    ready: Prepared,
    rows: Sequence[UserRows],
    flat: Float[Tensor, "users params"],
    prior: Float[Tensor, " params"] | None,
) -> list[PriorGain | None]:
    """The gain of each user's adapter as trained; None for a user without a pair to tell it by.

    Held-out pairs tell it, or left-out ones where held-out prompts are few and the run has a basis.
    """
    likeness, basis = ready.examination.likeness, ready.basis
    name: PriorName = "base" if prior is None else "population"
    gains = [heldout_gain(name, of_user) for of_user in likeness.prompt_gains(flat, rows, prior)]
    if basis is None:
        return list(gains)
    few = (gain is None or gain.n < FEWEST_HELDOUT for gain in gains)
    return [_left_out(basis, user) if left else gain for user, gain, left in zip(rows, gains, few, strict=True)]


def _left_out(basis: RewardBasis, user: UserRows) -> PriorGain:
    """The gain by the first training pairs, each predicted from those of the other prompts."""
    train = user.train[:_MOST_LEFT_OUT]
    predicted = left_out(differences_of(basis, train), [row.pair.prompt for row in train], basis.prior)
    return left_out_gain(predicted.gains, predicted.p_value)
