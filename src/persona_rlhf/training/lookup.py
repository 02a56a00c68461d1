"""A gather whose gradient is added up in a fixed order: the same bits on every run, on a GPU as on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Lookup:
    """`x[index]` along the first dimension, where one source may be read several times.

    torch's own gradient of it adds with atomics on a GPU, in any order. Here each source's first reader is written,
    then its second is added, and so on. `runs` are (first source, first place, how many, turn): that many neighbouring
    places read as many neighbouring sources, for the `turn`-th time (from 0). A place that is in no run reads source
    `fill[place]`, and no gradient comes back from it.
    """

    def __init__(self, fill: list[int], runs: list[tuple[int, int, int, int]], device: torch.device) -> None:
        index = fill
        turns: list[tuple[list[int], list[int]]] = []
        for source, place, count, turn in runs:
            index[place : place + count] = range(source, source + count)
            while len(turns) <= turn:
                turns.append(([], []))
            turns[turn][0].extend(range(source, source + count))
            turns[turn][1].extend(range(place, place + count))
        self.index: Int[Tensor, " places"] = torch.tensor(index, dtype=torch.int64).to(device)
        self.turns = [
            (torch.tensor(sources, dtype=torch.int64).to(device), torch.tensor(places, dtype=torch.int64).to(device))
            for sources, places in turns
        ]

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
        found = gradient.new_zeros(ctx.shape)
        for turn, (sources, places) in enumerate(ctx.lookup.turns):
            read = gradient.index_select(0, places)
            found.index_copy_(0, sources, read if turn == 0 else found.index_select(0, sources) + read)
        return found, None
