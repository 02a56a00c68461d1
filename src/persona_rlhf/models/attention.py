"""Attention over packed rows, by torch's SDPA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from persona_rlhf.models.packing import AttentionLayout
from persona_rlhf.models.row_decoding import LayerTokens, RowCache

_NAME = "persona_rlhf_rows"
_NO_EFFECT = {
    "use_cache", "position_ids", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
    "sliding_window",
}  # fmt: skip
"""Arguments without an effect here: packed rows are causal, keys and queries contain their positions, and no window is
shorter than the rows (see `max_row_length`)."""


@contextmanager
def packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, models with this (text) config attend over packed rows. Their forward needs `layout`."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Float[Tensor, "users heads width size"],
    key: Float[Tensor, "users groups width size"],
    value: Float[Tensor, "users groups width value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | RowCache | None = None,
    passed: list[LayerTokens] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "users width heads value_size"], None]:
    """The attention function of `transformers` for packed rows: gathers, attends call by call, gathers back.

    Keys and values of the tokens are appended to `passed`. With a `RowCache` the tokens are those of a decoding step.
    """
    unsupported = sorted(name for name, x in others.items() if x is not None and name not in _NO_EFFECT)
    if layout is None or attention_mask is not None or unsupported:
        raise NotImplementedError(f"packed attention does not support {unsupported or 'masks'}")
    if isinstance(layout, RowCache):
        return layout.attend(query, key, value, scaling), None
    if passed is not None:
        passed.append(LayerTokens(*(x.transpose(1, 2).flatten(0, 1) for x in (key, value))))
    users, heads, width, _ = query.shape
    dtype = query.dtype
    if query.device.type == "cpu":  # torch's kernels for 16-bit types take twice the time of float32
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
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
    return layout.outputs(torch.cat(outputs)).view(users, width, heads, -1).to(dtype), None


AttentionInterface.register(_NAME, _attend)
