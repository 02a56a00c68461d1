"""Scores of rows under a model, alone and beside the greedy answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
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


def greedy_scores(batch: Batch, rows: Sequence[Row], logits: Float[Tensor, "tokens vocabulary"]) -> list[GreedyScore]:
    """Scores of a batch's rows from its logits, with the greedy alternative to each."""
    sums = batch.to_grid(token_logps(logits, batch.targets)).double().sum(1).tolist()
    greedy = logits.argmax(-1)
    matched = batch.to_grid((greedy == batch.targets).double()).cumprod(1).sum(1).long().tolist()
    grid = batch.to_grid(greedy.double()).long().tolist()
    tokens = [len(row.completion) for row in rows]
    nexts = [ids[same] if same < n else None for ids, same, n in zip(grid, matched, tokens, strict=True)]
    return [GreedyScore(*figures) for figures in zip(sums, tokens, matched, nexts, strict=True)]
