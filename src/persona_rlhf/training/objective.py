"""The loss of one step of many users: DPO on each user's pairs plus the constraint's penalty, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_rlhf.config.training import DpoSettings
from persona_rlhf.data.tokenize import PairRow, Row, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.device import to_device
from persona_rlhf.models.model_split import HiddenStates
from persona_rlhf.models.packing import EMPTY
from persona_rlhf.models.scores import RowScore
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintFunctional, ConstraintSample
from persona_rlhf.training.losses import PairLogps, PairTokens, anchor_losses, pair_losses, user_means


class StepLoss(NamedTuple):
    """Per user: the DPO loss with its anchor; the mean reward margin and the share of positive margins of the step's
    pairs; and with a constraint its penalty and violations, see `constraint.Penalty`."""

    dpo: Float[Tensor, " users"]
    margin: Float[Tensor, " users"]
    accuracy: Float[Tensor, " users"]
    penalty: Float[Tensor, " users"] | None = None
    violations: Float[Tensor, "users names"] | None = None
    seen: Bool[Tensor, "users names"] | None = None

    @property
    def total(self) -> Float[Tensor, " users"]:
        """The loss to minimise."""
        return self.dpo if self.penalty is None else self.dpo + self.penalty


def detached(loss: StepLoss) -> StepLoss:
    """The loss without its graph."""
    return StepLoss(*(None if part is None else part.detach() for part in loss))  # type: ignore[arg-type]


def joined(losses: Sequence[StepLoss]) -> StepLoss:
    """The losses of groups of users as one."""
    columns = zip(*losses, strict=True)
    return StepLoss(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def in_order(loss: StepLoss, users: Int[Tensor, " users"]) -> StepLoss:
    """The loss with the users in another order."""
    return StepLoss(*(None if part is None else part.index_select(0, users) for part in loss))  # type: ignore[arg-type]


def heldout_losses(
    adapted: AdaptedModel, reference: Reference, pairs: Sequence[Sequence[PairRow]], dpo: DpoSettings
) -> list[float]:
    """The DPO loss, with its anchor, of the held-out pairs of each user, their weighted mean.

    The users' adapters must be on. A user scored alone has a loss of which no bit depends on other users.
    """
    scores = adapted.score([both_rows(user_pairs) for user_pairs in pairs])
    return [_heldout_loss(reference, *of_user, dpo) for of_user in zip(pairs, scores, strict=True)]


def _heldout_loss(
    reference: Reference, pairs: Sequence[PairRow], scores: Sequence[RowScore], dpo: DpoSettings
) -> float:
    def column(values: Sequence[float]) -> Float[Tensor, "1 pairs"]:
        return torch.tensor([values], dtype=torch.float64)

    logps = PairLogps(
        column([score.logp for score in scores[::2]]),
        column([score.logp for score in scores[1::2]]),
        column([reference[pair.chosen] for pair in pairs]),
        column([reference[pair.rejected] for pair in pairs]),
    )
    tokens = PairTokens(column([s.tokens for s in scores[::2]]), column([s.tokens for s in scores[1::2]]))
    losses, _ = pair_losses(dpo.loss, logps, tokens, dpo.beta, dpo.label_smoothing)
    weights = column([pair.pair.weight for pair in pairs])
    return float(user_means(losses, weights) + dpo.anchor * anchor_losses(logps.chosen, tokens.chosen, weights))


def summed(losses: Sequence[StepLoss]) -> StepLoss:
    """The loss of a step from those of its pieces (see `step_pieces`); the last piece has the constraint's figures."""
    if len(losses) == 1:
        return losses[0]
    return losses[-1]._replace(
        dpo=torch.stack([loss.dpo for loss in losses]).sum(0),
        margin=torch.stack([loss.margin for loss in losses]).sum(0),
        accuracy=torch.stack([loss.accuracy for loss in losses]).sum(0),
    )


def step_pieces(
    pieces: int,
    adapted: AdaptedModel,
    reference: Reference,
    pairs: Sequence[Sequence[PairRow]],
    samples: Sequence[ConstraintSample],
    constraint: ConstraintFunctional | None,
    duals: Float[Tensor, "users names"],
    dpo: DpoSettings,
    states: Sequence[HiddenStates] = (),
) -> Iterator[StepLoss]:
    """Losses that add up to `step_loss`, computed one after the other for steps too large for memory.

    One piece is the whole step. More are for one user: so many parts of its pairs, then the constraint's rows.
    """
    if pieces == 1:
        yield step_loss(adapted, reference, pairs, samples, constraint, duals, dpo, states)
        return
    [of_user] = pairs
    size, weight = ceil(len(of_user) / pieces), sum(pair.pair.weight for pair in of_user)
    for first in range(0, len(of_user), size):
        part = of_user[first : first + size]
        loss = step_loss(adapted, reference, [part], [], None, duals, dpo, states)
        share = len(part) / len(of_user)
        yield StepLoss(
            loss.dpo * (sum(pair.pair.weight for pair in part) / (weight or 1.0)),
            loss.margin * share,
            loss.accuracy * share,
        )
    if constraint is not None:
        yield step_loss(adapted, reference, [[]], samples, constraint, duals, dpo, states)


def step_loss(
    adapted: AdaptedModel,
    reference: Reference,
    pairs: Sequence[Sequence[PairRow]],
    samples: Sequence[ConstraintSample],
    constraint: ConstraintFunctional | None,
    duals: Float[Tensor, "users names"],
    dpo: DpoSettings,
    states: Sequence[HiddenStates] = (),
) -> StepLoss:
    """`L_u = L_DPO + anchor L_NLL(chosen) + penalty_u`.

    `pairs`, `samples` and `states` hold one entry a user. Without a constraint `samples` is empty; without `states` the
    whole model is computed. The adapters must be on.
    """
    most = max(map(len, pairs))
    columns: list[Sequence[Sequence[Row]]] = [
        [[pair.chosen for pair in user_pairs] for user_pairs in pairs],
        [[pair.rejected for pair in user_pairs] for user_pairs in pairs],
        [sample.rows for sample in samples] or [[]] * len(pairs),
    ]
    widths = [most, most, max(map(len, columns[2]))]
    rows: list[Row] = []
    for user in range(len(pairs)):
        for column, width in zip(columns, widths, strict=True):
            rows += [*column[user], *[EMPTY] * (width - len(column[user]))]
    logps = adapted.row_logps(adapted.batch(rows, len(pairs)), states).sum(1)
    chosen, rejected, constraint_logps = logps.view(len(pairs), -1).split(widths, dim=1)

    def padded(values: Sequence[Sequence[float]], width: int = most) -> Float[Tensor, "users width"]:
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in values], dtype=logps.dtype)

    figures = [
        padded([[reference[pair.chosen] for pair in user_pairs] for user_pairs in pairs]),
        padded([[reference[pair.rejected] for pair in user_pairs] for user_pairs in pairs]),
        padded([[len(pair.chosen.completion) for pair in user_pairs] for user_pairs in pairs]),
        padded([[len(pair.rejected.completion) for pair in user_pairs] for user_pairs in pairs]),
        padded([[pair.pair.weight for pair in user_pairs] for user_pairs in pairs]),
        padded([[pair.probability for pair in user_pairs] for user_pairs in pairs]),
        padded([[1.0] * len(user_pairs) for user_pairs in pairs]),
        padded([[reference[row] for row in sample.rows] for sample in samples] or [[]] * len(pairs), widths[2]),
    ]
    of_chosen, of_rejected, *lengths, weights, probability, present, base = to_device(figures, logps.device)
    pair_logps, tokens = PairLogps(chosen, rejected, of_chosen, of_rejected), PairTokens(*lengths)
    pair_loss, margins = pair_losses(dpo.loss, pair_logps, tokens, dpo.beta, dpo.label_smoothing, probability)
    loss, margins = user_means(pair_loss, weights), margins.detach()
    if dpo.anchor:
        loss = loss + dpo.anchor * anchor_losses(chosen, tokens.chosen, weights)
    margin, accuracy = user_means(margins, present), user_means((margins > 0).to(margins), present)
    if constraint is None:
        return StepLoss(loss, margin, accuracy)
    return StepLoss(loss, margin, accuracy, *constraint.penalty(samples, constraint_logps, base, duals))
