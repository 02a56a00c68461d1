"""The loss of one step of a cohort: DPO on each user's pairs, plus his duals on the constraint, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_rlhf.config.training import ConstraintSettings, DpoSettings
from persona_rlhf.data.tokenize import PairRow, Row, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.model_split import HiddenStates
from persona_rlhf.models.packing import EMPTY
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintBank, ConstraintLogps, ConstraintSample, penalty
from persona_rlhf.training.losses import PairLogps, PairTokens, pair_losses, reward_margins, user_means


class StepLoss(NamedTuple):
    """Per user: the loss to minimise, its DPO part, the mean reward margin and the share of positive margins of the
    step's pairs; and, with a constraint, the violation (nats over the limit) of what was seen of the bank's names."""

    total: Float[Tensor, " users"]
    dpo: Float[Tensor, " users"]
    margin: Float[Tensor, " users"]
    accuracy: Float[Tensor, " users"]
    violations: Float[Tensor, "users names"] | None
    seen: Bool[Tensor, "users names"] | None


def detached(loss: StepLoss) -> StepLoss:
    """The loss without the graph that it was computed by."""
    return StepLoss(*(None if part is None else part.detach() for part in loss))  # type: ignore[arg-type]


def joined(losses: Sequence[StepLoss]) -> StepLoss:
    """The losses of groups of users as one."""
    columns = zip(*losses, strict=True)
    return StepLoss(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def heldout_loss(adapted: AdaptedModel, reference: Reference, pairs: Sequence[PairRow], dpo: DpoSettings) -> float:
    """The DPO loss of one user's held-out pairs, their weighted mean; his adapter must be on, and nobody else's.

    He is scored alone, so that no bit of it depends on his neighbours.
    """
    [scores] = adapted.score([both_rows(pairs)])

    def known(values: Sequence[float]) -> Float[Tensor, "1 pairs"]:
        return torch.tensor([values], dtype=torch.float64)

    logps = PairLogps(
        known([score.logp for score in scores[::2]]),
        known([score.logp for score in scores[1::2]]),
        known([reference[pair.chosen] for pair in pairs]),
        known([reference[pair.rejected] for pair in pairs]),
    )
    tokens = PairTokens(known([s.tokens for s in scores[::2]]), known([s.tokens for s in scores[1::2]]))
    losses = pair_losses(dpo.loss, logps, tokens, dpo.beta, dpo.label_smoothing)
    return float(user_means(losses, known([pair.pair.weight for pair in pairs])))


def step_loss(
    adapted: AdaptedModel,
    reference: Reference,
    pairs: Sequence[Sequence[PairRow]],
    draws: Sequence[ConstraintSample],
    bank: ConstraintBank | None,
    duals: Float[Tensor, "users names"],
    dpo: DpoSettings,
    constraint: ConstraintSettings,
    states: Sequence[HiddenStates] = (),
) -> StepLoss:
    """`L_u = L_DPO + penalty_u`, see `constraint.penalty`.

    `pairs`, `draws` and `states` hold one entry a user; `draws` is empty without a bank, `states` where the whole model
    is to be computed. The adapters must be on.
    """
    most = max(map(len, pairs))
    columns: list[Sequence[Sequence[Row]]] = [
        [[pair.chosen for pair in own] for own in pairs],
        [[pair.rejected for pair in own] for own in pairs],
        *([draw.columns[kind] for draw in draws] for kind in range(len(ConstraintLogps._fields))),
    ]
    widths = [most, most, *(max(map(len, column), default=0) for column in columns[2:])]
    rows: list[Row] = []
    for user in range(len(pairs)):
        for column, width in zip(columns, widths, strict=True):
            own = column[user] if column else []
            rows += [*own, *[EMPTY] * (width - len(own))]
    logps = adapted.row_logps(adapted.batch(rows, len(pairs)), states).sum(1)
    chosen, rejected, *watched = logps.view(len(pairs), -1).split(widths, dim=1)

    def known(values: Sequence[Sequence[float]]) -> Float[Tensor, "users pairs"]:
        padded = [[*own, *[0.0] * (most - len(own))] for own in values]
        return torch.tensor(padded, dtype=logps.dtype, device=logps.device)

    pair_logps = PairLogps(
        chosen,
        rejected,
        known([[reference[pair.chosen] for pair in own] for own in pairs]),
        known([[reference[pair.rejected] for pair in own] for own in pairs]),
    )
    tokens = PairTokens(
        known([[len(pair.chosen.completion) for pair in own] for own in pairs]),
        known([[len(pair.rejected.completion) for pair in own] for own in pairs]),
    )
    weights = known([[pair.pair.weight for pair in own] for own in pairs])
    losses = user_means(pair_losses(dpo.loss, pair_logps, tokens, dpo.beta, dpo.label_smoothing), weights)
    present = known([[1.0] * len(own) for own in pairs])
    margins = reward_margins(pair_logps, dpo.beta).detach()
    margin, accuracy = user_means(margins, present), user_means((margins > 0).to(margins), present)
    if bank is None:
        return StepLoss(losses, losses, margin, accuracy, None, None)
    found = penalty(bank, draws, ConstraintLogps(*watched), reference, duals, constraint)
    return StepLoss(losses + found.total, losses, margin, accuracy, found.violations, found.seen)
