"""Log-probabilities, implicit rewards and the DPO family of losses: the only place where they are written."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LossKind = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"]


class PairLogps(NamedTuple):
    """Log-probabilities (nats, summed over the tokens of a completion) of preference pairs under two models."""

    chosen: Float[Tensor, "users pairs"]
    rejected: Float[Tensor, "users pairs"]
    reference_chosen: Float[Tensor, "users pairs"]
    reference_rejected: Float[Tensor, "users pairs"]


class PairTokens(NamedTuple):
    """Completion lengths (tokens, the end token counted) of preference pairs."""

    chosen: Float[Tensor, "users pairs"]
    rejected: Float[Tensor, "users pairs"]


def reward_margins(logps: PairLogps, beta: float) -> Float[Tensor, "users pairs"]:
    """Implicit reward of chosen minus that of rejected, in nats times beta.

    `r = beta (log pi_user - log pi_ref)` (Rafailov et al. 2023, "Direct Preference Optimization", equation 5 with the
    partition function cancelled).
    """
    chosen = logps.chosen - logps.reference_chosen
    rejected = logps.rejected - logps.reference_rejected
    return beta * (chosen - rejected)


def pair_losses(
    kind: LossKind, logps: PairLogps, tokens: PairTokens, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, "users pairs"]:
    """The loss of every pair.

    sigmoid: `-log sigmoid(margin)` (Rafailov et al. 2023, equation 7). hinge: `max(0, 1 - margin)` (Zhao et al. 2023,
    SLiC). robust: the sigmoid loss corrected for a share `label_smoothing` of flipped labels (Chowdhury et al. 2024,
    equation 12). ipo: `(delta - 1 / (2 beta))^2` with log-ratios averaged over tokens (Azar et al. 2023, equation 17;
    the averaging is what its authors run). sigmoid_norm: the sigmoid loss on log-ratios averaged over tokens.
    """
    if kind in ("ipo", "sigmoid_norm"):
        chosen = (logps.chosen - logps.reference_chosen) / tokens.chosen.clamp(min=1)
        rejected = (logps.rejected - logps.reference_rejected) / tokens.rejected.clamp(min=1)
        delta = chosen - rejected
        return (delta - 1 / (2 * beta)) ** 2 if kind == "ipo" else -F.logsigmoid(beta * delta)
    margins = reward_margins(logps, beta)
    if kind == "hinge":
        return torch.relu(1 - margins)
    if kind == "robust":
        kept, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    assert kind == "sigmoid", kind
    return -F.logsigmoid(margins)


def user_means(losses: Float[Tensor, "users pairs"], weights: Float[Tensor, "users pairs"]) -> Float[Tensor, " users"]:
    """Weighted mean over each user's own pairs; 0 for a user without a pair in this step."""
    total = weights.sum(dim=1)
    return (losses * weights).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))


def loss_at_zero(kind: LossKind, beta: float, label_smoothing: float = 0.0) -> float:
    """The loss of the zero adapter (all margins 0): log 2 for sigmoid, 1 for hinge, 1 / (4 beta^2) for ipo."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss = pair_losses(kind, PairLogps(zero, zero, zero, zero), PairTokens(zero + 1, zero + 1), beta, label_smoothing)
    return float(loss)
