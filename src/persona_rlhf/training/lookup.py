"""A gather whose gradient is added up in a fixed order: the same bits on every run, on a GPU as on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Lookup:
    """`x[index]` along the first dimension, where one source may be read several times.

    torch's own gradient of it adds with atomics on a GPU, in any order. Here each source's first reader is written,
    then its second is added, and so on. `runs` are (first source, first place, how many, turn): that many neighbouring
    places read as many neighbouring ones of the `sources`, for the `turn`-th time (from 0). `fill` says, as (source,
    how many) from the first place on, what a place reads that is in no run; no gradient comes back from it.
    """

    def __init__(
        self,
        sources: int,
        fill: Sequence[tuple[int, int]],
        runs: Sequence[tuple[int, int, int, int]],
        device: torch.device,
    ) -> None:
        index = np.repeat(*np.array(fill, dtype=np.int64).reshape(-1, 2).T)
        source, place, count, turn = np.array(runs, dtype=np.int64).reshape(-1, 4).T
        within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        reads = np.stack([np.repeat(source, count), np.repeat(place, count)]) + within
        index[reads[1]] = reads[0]
        turns = np.repeat(turn, count)
        first = np.full(sources, -1)
        first[reads[0, turns == 0]] = reads[1, turns == 0]
        later = [torch.from_numpy(reads[:, turns == n]).to(device) for n in range(1, turn.max(initial=0) + 1)]
        self.index: Int[Tensor, " places"] = torch.from_numpy(index).to(device)
        self.unread: Int[Tensor, " unread"] = torch.from_numpy(np.flatnonzero(first < 0)).to(device)
        self.first: Int[Tensor, " sources"] = torch.from_numpy(first.clip(0)).to(device)
        self.later: list[Int[Tensor, "2 reads"]] = later

    def in_parts(self, sources: Int[Tensor, "sources parts"], places: Int[Tensor, "places parts"]) -> Lookup:
        """This lookup where a source and a place are several rows each: those, of which every part reads its own."""
        made = copy(self)
        made.index, made.first = torch.empty_like(places).flatten(), torch.empty_like(sources).flatten()
        made.index[places.flatten()] = sources[self.index].flatten()
        made.first[sources.flatten()] = places[self.first].flatten()
        made.unread = sources[self.unread].flatten()
        made.later = [torch.stack([sources[read[0]].flatten(), places[read[1]].flatten()]) for read in self.later]
        return made

    def __call__(self, x: Float[Tensor, "sources width"]) -> Float[Tensor, "places width"]:
        found: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup = lookup
        return x.index_select(0, lookup.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        lookup: Lookup = ctx.lookup
        if not len(gradient):
            return gradient.new_zeros(len(lookup.first), *gradient.shape[1:]), None
        found = gradient.index_select(0, lookup.first).index_fill_(0, lookup.unread, 0)
        for sources, places in lookup.later:
            found.index_add_(0, sources, gradient.index_select(0, places))  # no source twice
        return found, None
