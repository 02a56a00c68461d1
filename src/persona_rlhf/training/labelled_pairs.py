"""Pairs of the base's answers that a user's posterior labels: how the reward that users share reaches an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_rlhf.data.tokenize import PairRow, Row, UserRows, both_rows
from persona_rlhf.training.records import BasisUse
from persona_rlhf.training.reward_basis import Posterior, RewardBasis, shrinkage


class AnswerPool(NamedTuple):
    """Pairs of the base's answers, which all users share; `prompts` numbers the prompt of each pair.

    `differences` are coordinates of each pair's first answer (its `chosen`) less those of its second. A user gets
    `most` labelled pairs at most.
    """

    rows: Sequence[PairRow]
    prompts: Int[Tensor, " pairs"]
    differences: Float[Tensor, "pairs rank"]
    most: int

    @property
    def distinct_rows(self) -> list[Row]:
        """Every answer once."""
        return list(dict.fromkeys(both_rows(self.rows)))


def answer_pool(basis: RewardBasis, rows: Sequence[PairRow], most: int) -> AnswerPool:
    """The pool of pairs with their coordinates; pairs of one prompt stand together."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.pair.prompt for row in rows))}
    prompts = torch.tensor([numbers[row.pair.prompt] for row in rows], dtype=torch.int64)
    return AnswerPool(rows, prompts, differences_of(basis, rows), most)


def differences_of(basis: RewardBasis, rows: Sequence[PairRow]) -> Float[Tensor, "pairs rank"]:
    """Coordinates of chosen less rejected answers, as `text_differences` has them."""
    return text_differences(basis, [row.pair.chosen for row in rows], [row.pair.rejected for row in rows])


def text_differences(basis: RewardBasis, first: Sequence[str], second: Sequence[str]) -> Float[Tensor, "pairs rank"]:
    """Coordinates of first less second answers, shortened as in the fit: no single pair outweighs all others."""
    chosen, rejected = basis.features(first), basis.features(second)
    return basis.coordinates((chosen - rejected) * shrinkage(chosen - rejected)[:, None])


def with_labels(user: UserRows, basis: RewardBasis, pool: AnswerPool) -> tuple[UserRows, BasisUse]:
    """The user with labelled pairs, one a prompt of the pool: the two answers that the posterior holds furthest apart.

    Of more prompts than `most`, those count whose two answers are furthest apart: there the user's taste shows. The
    posterior stands on the pairs that the user judged alone; a tie is one preference each way. A pair that it orders
    without doubt counts like a real one; one that it cannot order teaches that both answers are alike.
    """
    posterior = basis.posterior(torch.cat([differences_of(basis, user.judged), -differences_of(basis, user.ties)]))
    places = _furthest(posterior.margin(pool.differences).abs(), pool.prompts, pool.most)
    chances = posterior.probability(pool.differences)
    labelled = [_ordered(pool.rows[place], float(chances[place])) for place in places]
    prior = basis.posterior(pool.differences[:0])
    use = BasisUse(basis.sha256, len(user.judged), len(labelled), _gain(posterior, prior, pool))
    return user._replace(labelled=labelled), use


def prior_rows(basis: RewardBasis, pool: AnswerPool) -> UserRows:
    """The population as one more user of a fleet: pairs that the mean of the basis labels, and no pair of a person.

    A user without a pair has the same labels. Its id is that of no user, who has at least one character.
    """
    nobody, _ = with_labels(UserRows("", [], []), basis, pool)
    return UserRows("", list(nobody.labelled), [])


def _furthest(distances: Float[Tensor, " pairs"], prompts: Int[Tensor, " pairs"], most: int) -> list[int]:
    """The place of the largest distance of each prompt, for the prompts where it is largest; the first of equal ones.

    Places are in the order of the pool.
    """
    best: dict[int, int] = {}
    for place, (distance, prompt) in enumerate(zip(distances.tolist(), prompts.tolist(), strict=True)):
        if prompt not in best or distance > float(distances[best[prompt]]):
            best[prompt] = place
    return sorted(sorted(best.values(), key=lambda place: -float(distances[place]))[:most])


def _ordered(row: PairRow, chance: float) -> PairRow:
    """The pair with the likelier answer as chosen."""
    if chance >= 0.5:
        return row._replace(probability=chance)
    turned = replace(row.pair, chosen=row.pair.rejected, rejected=row.pair.chosen)
    return PairRow(turned, row.rejected, row.chosen, 1 - chance)


def _gain(posterior: Posterior, prior: Posterior, pool: AnswerPool) -> float:
    """The gain of `BasisUse`; answers that the prior does not order count half."""
    if not len(pool.rows):
        return 0.0
    chances, before = posterior.probability(pool.differences), prior.margin(pool.differences)
    agrees: Bool[Tensor, " pairs"] = (before > 0) == (chances > 0.5)
    expected = torch.maximum(chances, 1 - chances)
    of_prior = torch.where(before == 0, 0.5, torch.where(agrees, expected, 1 - expected))
    return float((expected - of_prior).mean())
