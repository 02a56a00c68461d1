"""Norms and rotary embeddings with their gradients written down: half as many passes over memory as the formulas of
`transformers` take, and a tenth of a step of a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_rlhf.training.swap import Swap, rotating


def written_down(model: PreTrainedModel) -> Swap:
    """A model's norms and rotary embeddings as they are computed here. One that rotates in some other way gives wrong
    values with it."""
    norms = {m: own for m in model.modules() if (own := _as_normed(m)) is not None}
    return Swap(norms, dict.fromkeys(rotating(model), rotated))


def normed(
    weight: Float[Tensor, " width"], epsilon: float, hidden_states: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension (Zhang & Sennrich 2019, equation 4). No gradient
    comes to the weight, which is frozen."""
    found: Tensor = _Normed.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call]
    return found


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean.add_(epsilon).rsqrt_()
        scaled = x * factor
        ctx.save_for_backward(scaled, factor, weight)
        return scaled * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scaled, factor, weight = ctx.saved_tensors
        found = gradient * weight
        along = torch.linalg.vecdot(found, scaled).unsqueeze(-1).div_(-scaled.shape[-1])
        return found.addcmul_(scaled, along).mul_(factor), None, None


def _as_normed(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes a norm: `normed` with its weight or (Gemma's way) one plus its weight, whichever equals it on some
    made-up rows; None for any other module."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or weight is None or weight.dim() != 1 or epsilon is None:
        return None
    rows = 3 * torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    for factor in (weight.detach(), 1 + weight):
        found = partial(normed, factor, epsilon)
        with torch.no_grad():
            if torch.allclose(found(rows), norm(rows), rtol=1e-5, atol=1e-6):
                return found
    return None


def rotated(
    q: Float[Tensor, "lines heads width size"],
    k: Float[Tensor, "lines groups width size"],
    cos: Float[Tensor, "#lines width size"],
    sin: Float[Tensor, "#lines width size"],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`x cos + turned(x) sin` of queries and keys, where `turned` puts the second half of a head, negative, before its
    first (Su et al. 2021, equation 34, by halves). Both halves of `cos`, and of `sin`, must be the same."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    """A rotation; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    found, half = x * cos, x.shape[-1] // 2
    (first, second), (left, right), angle = x.split(half, -1), found.split(half, -1), sin[..., :half]
    left.addcmul_(second, angle, value=-sign)
    right.addcmul_(first, angle, value=sign)
    return found
