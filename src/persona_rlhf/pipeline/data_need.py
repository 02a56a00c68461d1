"""The curve of a user's labels, and the pairs that the users of a plan need by it; no base is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.common.files import slug
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.data_curve import CurvePoint, DataNeed, UserCurve, data_need
from persona_rlhf.evaluation.prior_gain import interval_of
from persona_rlhf.release.results import Result
from persona_rlhf.training.reward_basis import RewardBasis
from persona_rlhf.training.subset_accuracy import SUBSETS, LabelledUser, TextReward, subset_accuracies

_PLANNED = 2  # users of a plan, with one subset each: a plan takes less than a tenth of a run


def planned_need(rows: Sequence[UserRows], basis: RewardBasis | None) -> DataNeed | None:
    """The pairs that users of a plan need, by the first users with both kinds of pairs."""
    users = [
        LabelledUser(user.user_id, [row.pair for row in user.train], [row.pair for row in user.heldout])
        for user in rows
        if user.train and user.heldout
    ][:_PLANNED]
    if not users:
        return None
    reward = TextReward.of(basis, users)
    return data_need([curve for user in users for curve in curves_of(reward, user, None, 1)])


def curves_of(reward: TextReward, user: LabelledUser, result: Result | None, subsets: int = SUBSETS) -> list[UserCurve]:
    """The user's curve; none for a user without training pairs or held-out pairs."""
    accuracies = subset_accuracies(reward, user, subsets)
    if not accuracies:
        return []
    points = []
    for size, of_prompts in accuracies.items():
        low, high = interval_of([value - 0.5 for value in of_prompts], "base")
        n = len(of_prompts)
        points.append(CurvePoint(size, sum(of_prompts) / n, 0.5 + low, 0.5 + high, n))
    adapter, measured = None, None if result is None else result.measures.heldout_accuracy
    if result is not None and measured is not None and result.status == "released":
        adapter = CurvePoint(result.pairs.train, measured.adapted, measured.low, measured.high, measured.n)
    return [UserCurve(user.user_id, slug(user.user_id), len(user.train), points, adapter)]
