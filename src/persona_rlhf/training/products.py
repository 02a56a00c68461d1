"""Attention over short rows as batched matrix products: faster than torch's kernel for them, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.sight import Call

SHORT = 160
"""Tokens of a row up to which products are faster. They compute what a row's tokens do not see as well, and keep it."""


def products(
    query: Float[Tensor, "asking size"],
    key: Float[Tensor, "seen size"],
    value: Float[Tensor, "seen width"],
    calls: Sequence[Call],
    scale: float,
) -> Float[Tensor, "asking width"]:
    """`softmax(scale q k + mask) v` of every call. Queries, keys and what is found lie as `Sight.by_head` says."""
    found: Tensor = _Products.apply(query, key, value, calls, scale)  # type: ignore[no-untyped-call]
    return found


class _Products(torch.autograd.Function):
    """Keeps the probabilities. What all calls give, and their gradients, are written into one place each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[Call], scale: float) -> Tensor:
        found, kept = value.new_empty(len(query), value.shape[1]), []
        for call, q, own, k, v in _by_call(calls, [query, found], [key, value]):
            assert call.seen is not None
            scores = q.new_empty(call.lines, call.queries, call.keys)
            scores.view(call.seen.shape).copy_(call.seen)
            shares = torch.softmax(scores.baddbmm_(q, k.mT, alpha=scale), -1)
            torch.bmm(shares, v, out=own)
            if any(ctx.needs_input_grad):
                kept.append(shares)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.calls, ctx.scale = calls, scale
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        found = for_query, for_key, for_value = [torch.empty_like(x) for x in (query, key, value)]
        runs = _by_call(ctx.calls, [query, for_query, gradient], [key, for_key, value, for_value])
        for (_, q, for_q, pull, k, for_k, v, for_v), shares in zip(runs, kept, strict=True):
            torch.bmm(shares.mT, pull, out=for_v)
            slopes = torch._softmax_backward_data(torch.bmm(pull, v.mT), shares, -1, shares.dtype)
            torch.baddbmm(for_q, slopes, k, beta=0, alpha=ctx.scale, out=for_q)
            torch.baddbmm(for_k, slopes.mT, q, beta=0, alpha=ctx.scale, out=for_k)
        return *found, None, None


def _by_call(calls: Sequence[Call], asking: Sequence[Tensor], seen: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Every call with its matrices, one a line, of the tensors."""
    sides = [(asking, [call.queries for call in calls]), (seen, [call.keys for call in calls])]
    columns = [
        [part.view(call.lines, length, -1) for part, call, length in zip(parts, calls, lengths, strict=True)]
        for tensors, lengths in sides
        for x in tensors
        for parts in [x.split_with_sizes([c.lines * n for c, n in zip(calls, lengths, strict=True)])]
    ]
    return zip(calls, *columns, strict=True)
