"""Attention over packed rows, by torch's SDPA kernels or, for short rows on a CPU, by batched matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from persona_rlhf.models.packing import AttentionCall, AttentionLayout

_NAME = "persona_rlhf_rows"
_NO_EFFECT = {
    "use_cache", "position_ids", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
    "sliding_window",
}  # fmt: skip
"""Arguments without an effect here: packed rows are causal, keys and queries contain their positions, and no window is
shorter than the rows (see `max_row_length`)."""

SHORT = 160
"""Longest row, in tokens, for batched products. They also compute the masked scores, and keep them for the gradient."""


@contextmanager
def packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, models with this (text) config attend over packed rows. Their forward needs `layout`."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def max_row_length(config: PreTrainedConfig) -> float:
    """Longest row, in tokens, in which every layer of a (text) config attends to all earlier tokens.

    Infinite without sliding windows; 0 for layers of another type.
    """
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not types <= {"full_attention", "sliding_attention"}:
        return 0
    window: int | None = getattr(config, "sliding_window", None)  # None or 0: none
    return window or (0 if "sliding_attention" in types else inf)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "users heads width size"],
    key: Float[Tensor, "users groups width size"],
    value: Float[Tensor, "users groups width value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "users width heads value_size"], None]:
    """The attention function of `transformers` for packed rows: gathers, attends call by call, gathers back."""
    unsupported = sorted(name for name, x in others.items() if x is not None and name not in _NO_EFFECT)
    if layout is None or attention_mask is not None or unsupported:
        raise NotImplementedError(f"packed attention does not support {unsupported or 'masks'}")
    users, heads, width, _ = query.shape
    if layout.longest <= SHORT and not dropout and _products_apply(query, key):
        split, scale = per_head(layout, heads, key.shape[1]), scaling or query.shape[3] ** -0.5
        q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[3]) for x in (query, key, value))
        output = attention_products(split.queries(q), split.keys(k), split.keys(v), split.calls, scale)
        return split.outputs(output).view(users, width, heads, -1), None
    gathers = ((layout.queries, query), (layout.keys, key), (layout.keys, value))
    packed = [gather(x.transpose(1, 2).reshape(users * width, -1)) for gather, x in gathers]

    # Split at once: the gradient of slices would be a tensor of zeros each.
    query_sizes, key_sizes = [c.lines * c.queries for c in layout.calls], [c.lines * c.keys for c in layout.calls]
    parts = (x.split_with_sizes(sizes) for x, sizes in zip(packed, (query_sizes, key_sizes, key_sizes), strict=True))
    outputs = []
    for (lines, queries, keys, mask), *tokens in zip(layout.calls, *parts, strict=True):
        q, k, v = (
            part.view(lines, length, x.shape[1], x.shape[3]).transpose(1, 2)
            for part, x, length in zip(tokens, (query, key, value), (queries, keys, keys), strict=True)
        )
        if mask is None:
            output = sdpa_attention_forward(module, q, k, v, None, dropout, scaling, True)[0]
        else:  # directly by torch: `transformers` would repeat the keys for every head of a group
            grouped = k.shape[1] < q.shape[1]
            output = F.scaled_dot_product_attention(
                q, k, v, mask.to(q.dtype), dropout, scale=scaling, enable_gqa=grouped
            ).transpose(1, 2)
        outputs.append(output.reshape(lines * queries, -1))
    return layout.outputs(torch.cat(outputs)).view(users, width, heads, -1), None


AttentionInterface.register(_NAME, _attend)


def _products_apply(query: Tensor, key: Tensor) -> bool:
    """Whether batched products may replace torch's kernel: other types would be rounded elsewhere than in it."""
    exact = query.dtype in (torch.float32, torch.float64)
    return exact and query.device.type == "cpu" and query.shape[1] % key.shape[1] == 0


def per_head(layout: AttentionLayout, heads: int, groups: int) -> AttentionLayout:
    """The layout over rows that are one head of a token each: `heads` of each query and `groups` of each key.

    A line of a call is one group of keys with the queries of its heads. Every call has a mask.
    """
    if (heads, groups) not in layout.head_layouts:
        layout.head_layouts[heads, groups] = _split_heads(layout, heads, groups)
    return layout.head_layouts[heads, groups]


def _split_heads(layout: AttentionLayout, heads: int, groups: int) -> AttentionLayout:
    query_rows = _head_rows(layout.calls, [call.lines * call.queries for call in layout.calls], heads)
    key_rows = _head_rows(layout.calls, [call.lines * call.keys for call in layout.calls], groups)
    tokens = len(layout.outputs.index)
    query_heads, key_heads = (torch.arange(tokens * each).view(tokens, each) for each in (heads, groups))
    causal = torch.full((layout.longest, layout.longest), -torch.inf).triu_(1)
    calls = []
    for lines, queries, keys, mask in layout.calls:
        mask = causal[:queries, :keys] if mask is None else mask[:, :, None]
        shape = (lines, groups, heads // groups, queries, keys)
        calls.append(AttentionCall(lines * groups, heads // groups * queries, keys, mask.expand(shape)))
    return AttentionLayout(
        layout.queries.per_head(query_heads, query_rows),
        layout.keys.per_head(key_heads, key_rows),
        layout.outputs.per_head(query_rows, query_heads),
        calls,
        None,
        {},
    )


def _head_rows(calls: Sequence[AttentionCall], sizes: Sequence[int], heads: int) -> Int[Tensor, "tokens heads"]:
    """Row numbers of the heads of every token of calls with `sizes` tokens: line after line, head after head."""
    numbers = torch.arange(sum(sizes) * heads).split([size * heads for size in sizes])
    by_line = [
        rows.view(call.lines, heads, -1).mT.reshape(-1, heads) for call, rows in zip(calls, numbers, strict=True)
    ]
    return torch.cat(by_line)


def attention_products(
    query: Float[Tensor, "queries size"],
    key: Float[Tensor, "keys size"],
    value: Float[Tensor, "keys width"],
    calls: Sequence[AttentionCall],
    scale: float,
) -> Float[Tensor, "queries width"]:
    """`softmax(scale q k + mask) v` of every call, with rows as in `per_head`."""
    output: Tensor = _AttentionProducts.apply(query, key, value, calls, scale)  # type: ignore[no-untyped-call]
    return output


class _AttentionProducts(torch.autograd.Function):
    """Saves the probabilities. The calls write their outputs and gradients into one tensor each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[AttentionCall], scale: float
    ) -> Tensor:
        output, saved = value.new_empty(len(query), value.shape[1]), []
        for call, q, y, k, v in _by_call(calls, [query, output], [key, value]):
            assert call.mask is not None
            scores = q.new_empty(call.lines, call.queries, call.keys)
            scores.view(call.mask.shape).copy_(call.mask)
            probabilities = torch.softmax(scores.baddbmm_(q, k.mT, alpha=scale), -1)
            torch.bmm(probabilities, v, out=y)
            if any(ctx.needs_input_grad):
                saved.append(probabilities)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.calls, ctx.scale = calls, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        gradients = grad_query, grad_key, grad_value = [torch.empty_like(x) for x in (query, key, value)]
        calls = _by_call(ctx.calls, [query, grad_query, gradient], [key, grad_key, value, grad_value])
        for (_, q, grad_q, grad_y, k, grad_k, v, grad_v), probabilities in zip(calls, saved, strict=True):
            torch.bmm(probabilities.mT, grad_y, out=grad_v)
            grad_p = torch.bmm(grad_y, v.mT)
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=ctx.scale, out=grad_q)
            torch.baddbmm(grad_k, grad_scores.mT, q, beta=0, alpha=ctx.scale, out=grad_k)
        return *gradients, None, None


def _by_call(
    calls: Sequence[AttentionCall], query_side: Sequence[Tensor], key_side: Sequence[Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Every call with its part of each tensor, `[lines, tokens, width]`."""
    sides = [(query_side, [call.queries for call in calls]), (key_side, [call.keys for call in calls])]
    columns = [
        [part.view(call.lines, length, -1) for part, call, length in zip(parts, calls, lengths, strict=True)]
        for tensors, lengths in sides
        for x in tensors
        for parts in [x.split_with_sizes([c.lines * n for c, n in zip(calls, lengths, strict=True)])]
    ]
    return zip(calls, *columns, strict=True)
