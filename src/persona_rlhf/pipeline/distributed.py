"""Shards and local processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem

# ----------------------------------------------------------------------------------------------------
# Several processes of one run on one host: started, watched and ended together, as `accelerate launch` would.
# ----------------------------------------------------------------------------------------------------

HELD_BACK = 3  # exit code of a run that was finished, where the gate held somebody back
_LIFELINE = "PERSONA_RLHF_LIFELINE"


def launch(words: Sequence[str], count: int, say: Callable[[str], None]) -> int:
    """Runs `persona-rlhf WORDS` in `count` processes, and returns the exit code of the first to fail, else of rank 0.

    Each has its RANK, its GPU (LOCAL_RANK) and an equal part of the CPU's threads. Where one fails the others are
    ended: what is done is on disk, and `--resume` goes on with it. They end with this process, however it ends; then
    the first of them says so. `say` tells people of a process that was killed.
    """
    with ended_as_by_ctrl_c():
        try:
            return _launched(words, count, say)
        except KeyboardInterrupt:
            return 130


def _launched(words: Sequence[str], count: int, say: Callable[[str], None]) -> int:
    each = max(1, _threads() // count)
    workers = []
    try:
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": each, _LIFELINE: 1}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            command = [sys.executable, "-m", "persona_rlhf", *words]
            # a session of its own: Ctrl-C is for this process, which passes it on
            workers.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        while all(worker.poll() in (None, 0) for worker in workers) and workers[0].poll() is None:
            time.sleep(0.1)
        if workers[0].returncode in (0, HELD_BACK):  # it waited for all chunks: the others are at their end
            for worker in workers:
                worker.wait()
        failed = [worker.returncode for worker in workers if worker.returncode]
        for rank, worker in enumerate(workers):
            if (worker.returncode or 0) < 0:
                say(f"Process {rank + 1} of {count} was ended by signal {-worker.returncode}; the others were stopped.")
        return max(failed[0], 1) if failed else 0
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def _threads() -> int:
    """Threads that a process alone would compute with: as told, else one a core that it may use."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C; and a process that `launch` started ends with the one that started it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    if os.environ.pop(_LIFELINE, None):
        threading.Thread(target=_watch, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch() -> None:
    """Waits for the end of stdin, which is the end of the process at its other side."""
    while os.read(0, 4096):  # not sys.stdin: its lock would outlive the main thread
        pass
    signal.raise_signal(signal.SIGTERM)


# ----------------------------------------------------------------------------------------------------
# Which users a process trains, where a run is divided among jobs of a cluster or the devices of a host.
#
# The users of a run, in the order they first appear in the data, are cut into chunks. A chunk is prepared, trained,
# judged and written on its own, so that it comes out the same whoever does it and whatever else is done beside it; a
# process takes every so-manyth of them.
# ----------------------------------------------------------------------------------------------------

MOST = 256  # users of a chunk, where `fleet.chunk` is auto


class WorkShare(NamedTuple):
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


def work_share_of(shard: str | None, environment: Mapping[str, str] = os.environ) -> WorkShare:
    """The share named by `--shard i/n`, and by what `accelerate launch` and its like tell their processes.

    Raises InputError where `shard` is not two whole numbers, 1 <= i <= n.
    """
    share = WorkShare()
    if shard is not None:
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", shard)
        if found is None or int(found[1]) > int(found[2]):
            sentence = f"is `{shard}`; write i/n with 1 <= i <= n, such as 1/8 for the first of eight"
            raise InputError([Problem("train", None, "--shard", sentence)])
        share = WorkShare(int(found[1]) - 1, int(found[2]))
    if "RANK" in environment and "WORLD_SIZE" in environment:
        share = share._replace(rank=int(environment["RANK"]), world=int(environment["WORLD_SIZE"]))
    return share
