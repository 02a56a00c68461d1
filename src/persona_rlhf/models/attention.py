"""Attention over packed rows (SDPA, or batched matmul for short rows on CPU)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from persona_rlhf.models.packing import AttentionCall, AttentionLayout

# ----------------------------------------------------------------------------------------------------
# Attention over short rows as batched matrix products: faster than torch's kernel for them, on a CPU.
# ----------------------------------------------------------------------------------------------------

SHORT = 160
"""Tokens of a row up to which products are faster. They compute what a row's tokens do not see as well, and keep it."""


def products(
    query: Float[Tensor, "asking size"],
    key: Float[Tensor, "seen size"],
    value: Float[Tensor, "seen width"],
    calls: Sequence[AttentionCall],
    scale: float,
) -> Float[Tensor, "asking width"]:
    """`softmax(scale q k + mask) v` of every call. Queries, keys and what is found lie as `Sight.by_head` says."""
    found: Tensor = _Products.apply(query, key, value, calls, scale)  # type: ignore[no-untyped-call]
    return found


class _Products(torch.autograd.Function):
    """Keeps the probabilities. What all calls give, and their gradients, are written into one place each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[AttentionCall], scale: float
    ) -> Tensor:
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


def _by_call(
    calls: Sequence[AttentionCall], asking: Sequence[Tensor], seen: Sequence[Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Every call with its matrices, one a line, of the tensors."""
    sides = [(asking, [call.queries for call in calls]), (seen, [call.keys for call in calls])]
    columns = [
        [part.view(call.lines, length, -1) for part, call, length in zip(parts, calls, lengths, strict=True)]
        for tensors, lengths in sides
        for x in tensors
        for parts in [x.split_with_sizes([c.lines * n for c, n in zip(calls, lengths, strict=True)])]
    ]
    return zip(calls, *columns, strict=True)


# ----------------------------------------------------------------------------------------------------
# Attention over packed tokens: the one layer that sees rows.
# ----------------------------------------------------------------------------------------------------

_NAME = "persona_rlhf_rows"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sight: AttentionLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Lays packed `[users, heads, width, size]` out as `sight` says, attends, and packs the result."""
    unheard = sorted(name for name, value in others.items() if value is not None and name not in _HEARD)
    if sight is None or attention_mask is not None or unheard:
        raise NotImplementedError(f"attention over packed rows knows nothing of {unheard or 'masks'}")
    users, width = query.shape[0], query.shape[2]
    if sight.longest <= SHORT and not dropout and _fits(query, key):
        heads, scale = sight.by_head(query.shape[1], key.shape[1]), scaling or query.shape[3] ** -0.5
        q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[3]) for x in (query, key, value))
        whole = products(heads.queries(q), heads.keys(k), heads.keys(v), heads.calls, scale)
        return heads.home(whole).view(users, width, query.shape[1], -1), None
    lookups = ((sight.queries, query), (sight.keys, key), (sight.keys, value))
    laid = [(lookup(x.transpose(1, 2).reshape(users * width, -1)), x) for lookup, x in lookups]

    # Split at once: the gradient of slices would be a tensor of zeros each.
    asked, known = ([call.lines * getattr(call, side) for call in sight.calls] for side in ("queries", "keys"))
    parts = (flat.split_with_sizes(sizes) for (flat, _), sizes in zip(laid, (asked, known, known), strict=True))
    results = []
    for (lines, queries, keys, seen), *flats in zip(sight.calls, *parts, strict=True):
        q, k, v = (
            flat.view(lines, length, x.shape[1], x.shape[3]).transpose(1, 2)
            for flat, (_, x), length in zip(flats, laid, (queries, keys, keys), strict=True)
        )
        if seen is None:
            found: Tensor = sdpa_attention_forward(module, q, k, v, None, dropout, scaling, True)[0]
        else:  # straight to torch: `transformers` would repeat the keys for every head of a group
            grouped = k.shape[1] < q.shape[1]
            found = F.scaled_dot_product_attention(
                q, k, v, seen.to(q.dtype), dropout, scale=scaling, enable_gqa=grouped
            )
            found = found.transpose(1, 2)
        results.append(found.reshape(lines * queries, -1))
    return sight.home(torch.cat(results)).view(users, width, query.shape[1], -1), None


def _fits(query: Tensor, key: Tensor) -> bool:
    """Whether `products` are for them; a type that rounds more would be rounded elsewhere than in torch's kernel."""
    exact = query.dtype in (torch.float32, torch.float64)
    return exact and query.device.type == "cpu" and query.shape[1] % key.shape[1] == 0


_HEARD = {
    "use_cache", "position_ids", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
    "sliding_window",
}  # fmt: skip
"""Arguments that change nothing here: packed rows are causal, their positions are in the keys and queries, and no
window is shorter than they are (see `window`)."""

AttentionInterface.register(_NAME, _attend)


def window(config: PreTrainedConfig) -> float:
    """Length in tokens up to which every token of a row sees all before it, in every layer of a (text) config.

    Infinite without sliding windows; 0 where a layer attends in some other way.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return 0
    width: int | None = getattr(config, "sliding_window", None)  # None or 0: none
    return width or (0 if "sliding_attention" in kinds else inf)


@contextmanager
def packed(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, models with this (text) config attend over packed rows; they must be given `sight`."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
