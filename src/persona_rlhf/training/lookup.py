"""A gather whose gradient is added up in a fixed order: the same bits on every run, on a GPU as on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Lookup:
    """`x[index]` along the first dimension, where one source may be read several times.

    torch's own gradient of it adds with atomics on a GPU, in any order. Here each source's first reader is written,
    then its second is added, and so on. `runs` are (first source, first place, how many, turn): that many neighbouring
    places read as many neighbouring sources, for the `turn`-th time (from 0). `fill` says, as (source, how many) from
    the first place on, what a place reads that is in no run; no gradient comes back from it.
    """

    def __init__(
        self, fill: Sequence[tuple[int, int]], runs: Sequence[tuple[int, int, int, int]], device: torch.device
    ) -> None:
        index = np.repeat(*np.array(fill, dtype=np.int64).reshape(-1, 2).T)
        source, place, count, turn = np.array(runs, dtype=np.int64).reshape(-1, 4).T
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        reads = np.stack([np.repeat(source, count), np.repeat(place, count)]) + within
        index[reads[1]] = reads[0]
        self.index: Int[Tensor, " places"] = torch.from_numpy(index).to(device)
        turns = np.repeat(turn, count)
        self.turns: list[tuple[Tensor, Tensor]] = []
        for n in range(turn.max(initial=-1) + 1):
            own = reads[:, turns == n]
            sources, places = torch.from_numpy(own[:, own[0].argsort()]).to(device)
            self.turns.append((sources, places))

    def __call__(self, x: Float[Tensor, "sources width"]) -> Float[Tensor, "places width"]:
        found: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup, ctx.shape = lookup, x.shape
        return x.index_select(0, lookup.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found: Tensor | None = None
        for sources, places in ctx.lookup.turns:
            read = gradient.index_select(0, places)
            if found is None and len(sources) == ctx.shape[0]:
                found = read  # every source was read, and they come in order
            else:
                found = gradient.new_zeros(ctx.shape) if found is None else found
                found.index_add_(0, sources, read)  # no source twice
        return gradient.new_zeros(ctx.shape) if found is None else found, None
