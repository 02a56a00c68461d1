"""The next token of every answer in a batch, each as its own request wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.apps.writing import Wish
from persona_rlhf.training.generation import inverse_sample


def pick(
    logits: Float[Tensor, "rows vocabulary"], wishes: Sequence[Wish], streams: Sequence[torch.Generator]
) -> Tensor:
    """A token a row: the most likely one at temperature 0, else one drawn from the row's own stream."""
    tokens = logits.argmax(-1)
    warm = [row for row, wish in enumerate(wishes) if wish.temperature > 0]
    if not warm:
        return tokens
    temperatures = torch.tensor([wishes[row].temperature for row in warm], device=logits.device)
    shares = torch.tensor([wishes[row].top_p for row in warm], device=logits.device)
    draws = torch.cat([1 - torch.rand(1, generator=streams[row], dtype=torch.float64) for row in warm])
    kept = nucleus(logits[warm] / temperatures[:, None], shares)
    tokens[warm] = inverse_sample(kept, draws.to(logits.device))  # draws lie in (0, 1]: none falls on a zero
    return tokens


def nucleus(
    logits: Float[Tensor, "rows vocabulary"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """The logits with all but the fewest most likely tokens that hold `top_p` (0, 1] of the probability taken out.

    Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1. The most likely token always stays.
    """
    ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    out = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
