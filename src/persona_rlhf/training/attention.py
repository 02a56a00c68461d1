"""Attention over packed tokens: the one layer that sees rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from persona_rlhf.training.products import SHORT, products
from persona_rlhf.training.sight import Sight

_NAME = "persona_rlhf_rows"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sight: Sight | None = None,
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
