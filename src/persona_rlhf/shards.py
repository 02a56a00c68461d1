"""Which users a process trains, where a run is divided among jobs of a cluster or the devices of a host.

The users of a run, in the order they first appear in the data, are cut into chunks. A chunk is prepared, trained,
judged and written on its own, so that it comes out the same whoever does it and whatever else is done beside it; a
process takes every so-manyth of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem

MOST = 256  # users of a chunk, where `fleet.chunk` is auto


class Share(NamedTuple):
    """A process's part of a run: one of `shards` jobs (from 0), and in it one of `world` processes, the `rank`-th."""

    shard: int = 0
    shards: int = 1
    rank: int = 0
    world: int = 1

    @property
    def workers(self) -> int:
        """Processes of the whole run."""
        return self.shards * self.world

    @property
    def name(self) -> str:
        """What files of this process alone are called after."""
        return f"{self.shard * self.world + self.rank + 1}-of-{self.workers}"

    def mine(self, chunks: int) -> range:
        """The chunks of this process, of those of the run."""
        return range(self.shard * self.world + self.rank, chunks, self.workers)

    def job(self, chunks: int) -> list[int]:
        """The chunks of all processes of this job."""
        return sorted(n for rank in range(self.world) for n in self._replace(rank=rank).mine(chunks))

    def chunk_size(self, users: int, asked: int | str) -> int:
        """Users of a chunk: as asked; else so few that no process is idle, so alike that they end together."""
        if isinstance(asked, int):
            return asked
        rounds = ceil(users / (MOST * self.workers))
        return ceil(users / (rounds * self.workers))


def share_of(shard: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share named by `--shard i/n`, and by what `accelerate launch` and its like tell their processes.

    Raises InputError where `shard` is not two whole numbers, 1 <= i <= n.
    """
    share = Share()
    if shard is not None:
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", shard)
        if found is None or int(found[1]) > int(found[2]):
            sentence = f"is `{shard}`; write i/n with 1 <= i <= n, such as 1/8 for the first of eight"
            raise InputError([Problem("train", None, "--shard", sentence)])
        share = Share(int(found[1]) - 1, int(found[2]))
    if "RANK" in environment and "WORLD_SIZE" in environment:
        share = share._replace(rank=int(environment["RANK"]), world=int(environment["WORLD_SIZE"]))
    return share
