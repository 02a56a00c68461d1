"""Implicit rewards and the DPO family of losses, as pure functions of log-probabilities."""

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


class PairLosses(NamedTuple):
    """The loss of each pair, and its reward margin: implicit reward of chosen minus that of rejected, in nats times
    beta."""

    losses: Float[Tensor, "users pairs"]
    margins: Float[Tensor, "users pairs"]


def reward_margins(logps: PairLogps, beta: float) -> Float[Tensor, "users pairs"]:
    """`r(chosen) - r(rejected)` in nats times beta, with the implicit reward `r = beta (log pi_user - log pi_ref)`.

    Rafailov et al. 2023, "Direct Preference Optimization", equation 5 with the partition function cancelled.
    """
    chosen = logps.chosen - logps.reference_chosen
    rejected = logps.rejected - logps.reference_rejected
    return beta * (chosen - rejected)


def pair_losses(
    kind: LossKind,
    logps: PairLogps,
    tokens: PairTokens,
    beta: float,
    label_smoothing: float = 0.0,
    probability: Float[Tensor, "users pairs"] | float = 1.0,
) -> PairLosses:
    """The loss and the reward margin of every pair.

    sigmoid: `-log sigmoid(margin)` (Rafailov et al. 2023, equation 7). hinge: `max(0, 1 - margin)` (Zhao et al. 2023,
    SLiC). robust: the sigmoid loss corrected for a share `label_smoothing` of flipped labels (Chowdhury et al. 2024,
    equation 12). ipo: `(delta - 1 / (2 beta))^2` with log-ratios averaged over tokens (Azar et al. 2023, equation 17;
    the averaging is the authors' own). sigmoid_norm: the sigmoid loss on log-ratios averaged over tokens.

    `probability` is that of the label. Below 1, the loss is its expectation over both orders of the answers.
    """
    margins = reward_margins(logps, beta)
    if kind in ("ipo", "sigmoid_norm"):
        chosen = (logps.chosen - logps.reference_chosen) / tokens.chosen.clamp(min=1)
        rejected = (logps.rejected - logps.reference_rejected) / tokens.rejected.clamp(min=1)
        advantage = chosen - rejected
    else:
        advantage = margins
    kept, flipped = (_losses(kind, sign * advantage, beta, label_smoothing) for sign in (1, -1))
    return PairLosses(probability * kept + (1 - probability) * flipped, margins)


def _losses(
    kind: LossKind, advantage: Float[Tensor, "users pairs"], beta: float, label_smoothing: float
) -> Float[Tensor, "users pairs"]:
    """The loss of pairs with a certain label, from the advantage of the chosen answer."""
    if kind == "ipo":
        return (advantage - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return torch.relu(1 - advantage)
    if kind == "robust":
        kept, flipped = -F.logsigmoid(advantage), -F.logsigmoid(-advantage)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return -F.logsigmoid(beta * advantage if kind == "sigmoid_norm" else advantage)


def anchor_losses(
    chosen: Float[Tensor, "users pairs"], tokens: Float[Tensor, "users pairs"], weights: Float[Tensor, "users pairs"]
) -> Float[Tensor, " users"]:
    """The negative log-likelihood of each user's chosen answers, in nats a token; 0 for a user without a pair.

    DPO may make both answers unlikely, as long as the rejected one falls further (likelihood displacement). This term
    beside it keeps the chosen one likely: RPO, Pang et al. 2024, "Iterative Reasoning Preference Optimization",
    equation 1. Its mean is over the tokens of a step, as TRL's loss `sft` has it.
    """
    return user_means(-chosen / tokens.clamp(min=1), weights * tokens)


def user_means(losses: Float[Tensor, "users pairs"], weights: Float[Tensor, "users pairs"]) -> Float[Tensor, " users"]:
    """Weighted mean over each user's own pairs; 0 for a user without a pair in this step."""
    total = weights.sum(dim=1)
    return (losses * weights).sum(dim=1) / torch.where(total > 0, total, torch.ones_like(total))
