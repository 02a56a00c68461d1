"""Gathers of token rows whose gradient has the same bits in every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class GatherRun(NamedTuple):
    """Neighbouring outputs that read equally many neighbouring sources: `length` from `place` and from `source` on.

    `repeat` counts the earlier runs that read the same sources.
    """

    source: int
    place: int
    length: int
    repeat: int


class DeterministicGather(NamedTuple):
    """`x[index]` along the first dimension, with a gradient that is summed in a fixed order.

    On a GPU, torch's own gradient of indexing adds with atomics in any order. Here each source's first reader is
    written, then its second reader is added, and so on. So every run gives the same bits.

    read: the source that each place reads
    unread: sources that no place reads
    first_reader: the first place that reads each source
    later_readers: sources that are read again, and the places that read them
    """

    read: Int[Tensor, " places"]
    unread: Int[Tensor, " unread"]
    first_reader: Int[Tensor, " sources"]
    later_readers: list[Int[Tensor, "2 reads"]]

    @classmethod
    def of(cls, sources: int, fill: Sequence[tuple[int, int]], runs: Sequence[GatherRun]) -> DeterministicGather:
        """The gather of `runs` from so many `sources`, the rows of x, on the CPU.

        fill: (source, count) of consecutive places; places that are in no run read it and send no gradient back
        """
        index = np.repeat(*np.array(fill, dtype=np.int64).reshape(-1, 2).T)
        source, place, length, repeat = np.array(runs, dtype=np.int64).reshape(-1, 4).T
        within = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        reads = np.stack([np.repeat(source, length), np.repeat(place, length)]) + within
        index[reads[1]] = reads[0]
        repeats = np.repeat(repeat, length)
        first = np.full(sources, -1)
        first[reads[0, repeats == 0]] = reads[1, repeats == 0]
        later = [torch.from_numpy(reads[:, repeats == n]) for n in range(1, repeat.max(initial=0) + 1)]
        unread, readers = torch.from_numpy(np.flatnonzero(first < 0)), torch.from_numpy(first.clip(0))
        return cls(torch.from_numpy(index), unread, readers, later)

    def __call__(self, x: Float[Tensor, "sources width"]) -> Float[Tensor, "places width"]:
        y: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: DeterministicGather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.read)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gather: DeterministicGather = ctx.gather
        if not len(gradient):
            return gradient.new_zeros(len(gather.first_reader), *gradient.shape[1:]), None
        grad_x = gradient.index_select(0, gather.first_reader)
        if len(gather.unread):
            grad_x.index_fill_(0, gather.unread, 0)
        for sources, places in gather.later_readers:
            grad_x.index_add_(0, sources, gradient.index_select(0, places))  # no source twice
        return grad_x, None
