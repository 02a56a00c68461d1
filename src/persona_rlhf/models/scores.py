"""Scores of rows under a model, alone and beside the greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.model_split import token_logps
from persona_rlhf.models.packing import Batch


class RowScore(NamedTuple):
    """Log-probability of a completion in nats, summed over its `tokens` with the end token."""

    logp: float
    tokens: int


class GreedyScore(NamedTuple):
    """A score with the greedy alternative.

    matched: how many of the completion's first tokens are the most likely ones
    next_token: the most likely token after these; None if all match
    """

    logp: float
    tokens: int
    matched: int
    next_token: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding writes exactly this completion."""
        return self.matched == self.tokens


def logps_and_greedy(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """At each position the log-probability of the target in nats, and the most likely token."""
    return token_logps(logits, targets), logits.argmax(-1)


def greedy_scores(
    batch: Batch, rows: Sequence[Row], logps: Float[Tensor, " tokens"], greedy: Int[Tensor, " tokens"]
) -> list[GreedyScore]:
    """Scores of a batch's rows from `logps_and_greedy`, with the greedy alternative to each."""
    sums = batch.to_grid(logps).double().sum(1)
    matches = batch.to_grid((greedy == batch.targets).double()).cumprod(1).sum(1)
    figures = torch.cat([sums[:, None], matches[:, None], batch.to_grid(greedy.double())], dim=1).tolist()
    matched, grid = [int(row[1]) for row in figures], [list(map(int, row[2:])) for row in figures]
    tokens = [len(row.completion) for row in rows]
    nexts = [ids[same] if same < n else None for ids, same, n in zip(grid, matched, tokens, strict=True)]
    logps_of_rows = [row[0] for row in figures]
    return [GreedyScore(*score) for score in zip(logps_of_rows, tokens, matched, nexts, strict=True)]
