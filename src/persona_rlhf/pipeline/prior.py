"""The population's adapter beside users' adapters: gains over it, and the users who keep it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.prior_gain import FEWEST_HELDOUT, PriorGain, PriorName, heldout_gain, left_out_gain
from persona_rlhf.pipeline.looks import GateLooks, JudgedLook
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
    prompts = [row.pair.prompt for row in train]
    predicted = left_out(differences_of(basis, train), prompts, basis.prior, _seed(user.user_id))
    return left_out_gain(predicted.gains, predicted.p_value)


def _seed(user_id: str) -> int:
    """Every user has draws of their own, so that one unlucky set of draws does not decide for all."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:4], "big")


class AdapterLook(NamedTuple):
    """The look that decides on a user, and its adapter; `prior`: it is the population's.

    `other` is the verdict of the user's other look, where both adapters were judged.
    """

    look: JudgedLook
    adapter: Float[Tensor, " params"]
    prior: bool = False
    other: Verdict | None = None


def judge_beside_prior(
    looks: GateLooks,
    rows: Sequence[UserRows],
    flat: Float[Tensor, "users params"],
    gains: Sequence[PriorGain | None],
    prior: Float[Tensor, " params"],
    level: float,
) -> list[AdapterLook]:
    """Looks at the users' adapters, or at the population's (`prior`) for users who keep it.

    A user keeps it where the user's pairs do not show at `level` that the user's adapter is better. They decide before
    the look, which is then the user's only one. A user also keeps it where the user's adapter no longer is the base at
    every alpha tried: then it is one more look. `evaluation/spending.py` has the statistics.
    """
    population = prior.to(flat)
    kept = [gain is None or gain.p_value > level for gain in gains]
    adapters = torch.where(torch.tensor(kept, device=flat.device)[:, None], population, flat)
    users = [user.user_id for user in rows]
    ends = [
        AdapterLook(_explained(look, _unproven(gain, level)) if prior_kept else look, adapter, prior_kept)
        for look, adapter, prior_kept, gain in zip(
            looks.judge(users, adapters, rows), adapters, kept, gains, strict=True
        )
    ]
    harmed = [place for place, end in enumerate(ends) if not end.prior and _no_longer_base(end.look.verdict)]
    if harmed:
        again = looks.judge(
            [users[place] for place in harmed], population.repeat(len(harmed), 1), [rows[place] for place in harmed]
        )
        for place, look in zip(harmed, again, strict=True):
            ends[place] = _second(ends[place], look, population)
    return ends


def _no_longer_base(verdict: Verdict) -> bool:
    """Whether an adapter was held back because it no longer is the base at every alpha tried."""
    measures = [test.still_base for test in verdict.looks]
    return bool(measures) and not any(measure is None or measure.passes for measure in measures)


def _second(first: AdapterLook, look: JudgedLook, population: Float[Tensor, " params"]) -> AdapterLook:
    """The end of a user whose adapter was held back for harm, after a look at the population's."""
    before, after = first.look.verdict, look.verdict
    if after.admitted:
        return AdapterLook(_explained(look, f"the user's adapter was {before.reason}"), population, True, before)
    reason = f"{before.reason} (of the population's adapter: {after.reason})"
    return first._replace(look=JudgedLook(before._replace(reason=reason), look.spending), other=after)


def _unproven(gain: PriorGain | None, level: float) -> str:
    shown = "no pair tells a gain" if gain is None else f"the gain over it is {gain}"
    return f"{shown}, and level {level:g} asks for more"


def _explained(look: JudgedLook, why: str) -> JudgedLook:
    """The look at the population's adapter, with the cause in its reason."""
    reason = f"{look.verdict.reason} (of the population's adapter: {why})"
    return look._replace(verdict=look.verdict._replace(reason=reason))
