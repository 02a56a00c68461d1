"""Shards of a run and local processes: which users a process trains, and how processes are launched.

Users are cut into chunks in the order of the data. A chunk is prepared, trained, judged and written on its own, so its
result does not depend on the process or on other chunks; a process takes every n-th chunk.
"""

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

HELD_BACK = 3  # exit code of a finished run in which the gate held a user back, or a user failed
_LIFELINE = "PERSONA_RLHF_LIFELINE"


def launch(words: Sequence[str], count: int, log: Callable[[str], None]) -> int:
    """Runs `persona-rlhf WORDS` in `count` processes, and returns the exit code of the first to fail, else of rank 0.

    Each process has its RANK, its GPU (LOCAL_RANK) and an equal part of the CPU's threads. If one fails, the others are
    ended; `--resume` goes on from the work on disk. All of them end with this process. `log` gets a line on a killed
    process.
    """
    with ended_as_by_ctrl_c():
        try:
            return _launched(words, count, log)
        except KeyboardInterrupt:
            return 130


def _launched(words: Sequence[str], count: int, log: Callable[[str], None]) -> int:
    each = max(1, _threads() // count)
    workers = []
    try:
        for rank in range(count):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": each, _LIFELINE: 1}
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            command = [sys.executable, "-m", "persona_rlhf", *words]
            # a new session: Ctrl-C reaches this process only, which passes it on
            workers.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True))
        while all(worker.poll() in (None, 0) for worker in workers) and workers[0].poll() is None:
            time.sleep(0.1)
        if workers[0].returncode in (0, HELD_BACK):  # it waited for all chunks: the others are at their end
            for worker in workers:
                worker.wait()
        failed = [worker.returncode for worker in workers if worker.returncode]
        for rank, worker in enumerate(workers):
            if (worker.returncode or 0) < 0:
                log(f"Process {rank + 1} of {count} was ended by signal {-worker.returncode}; the others were stopped.")
        return max(failed[0], 1) if failed else 0
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def _threads() -> int:
    """Threads of one process alone: OMP_NUM_THREADS, else one for each core that it may use."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads) > 0:
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C, and a process started by `launch` ends with the process that started it."""

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
    """Waits for the end of stdin: the launching process has ended."""
    while os.read(0, 4096):  # not sys.stdin: its lock would outlive the main thread
        pass
    signal.raise_signal(signal.SIGTERM)


MOST = 256  # users of a chunk if `fleet.chunk` is auto


class WorkShare(NamedTuple):
    """The part of a run that one process trains: job `shard` of `shards`, and in it process `rank` of `world`."""

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
        """The part of file names that belong to this process alone."""
        return f"{self.shard * self.world + self.rank + 1}-of-{self.workers}"

    def mine(self, chunks: int) -> range:
        """The chunks of this process, of those of the run."""
        return range(self.shard * self.world + self.rank, chunks, self.workers)

    def job(self, chunks: int) -> list[int]:
        """The chunks of all processes of this job."""
        return sorted(n for rank in range(self.world) for n in self._replace(rank=rank).mine(chunks))

    def chunk_size(self, users: int, setting: int | str) -> int:
        """Users of a chunk: `fleet.chunk`, or if it is auto, a number that gives all processes equal work."""
        if isinstance(setting, int):
            return setting
        rounds = ceil(users / (MOST * self.workers))
        return ceil(users / (rounds * self.workers))


def work_share_of(shard: str | None, environment: Mapping[str, str] = os.environ) -> WorkShare:
    """The share named by `--shard i/n` and by RANK and WORLD_SIZE, as `accelerate launch` sets them.

    Raises InputError if `shard` is not two whole numbers, 1 <= i <= n.
    """
    share = WorkShare()
    if shard is not None:
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", shard)
        if match is None or int(match[1]) > int(match[2]):
            sentence = f"is `{shard}`; write i/n with 1 <= i <= n, such as 1/8 for the first of eight"
            raise InputError([Problem("train", None, "--shard", sentence)])
        share = WorkShare(int(match[1]) - 1, int(match[2]))
    if "RANK" in environment and "WORLD_SIZE" in environment:
        share = share._replace(rank=int(environment["RANK"]), world=int(environment["WORLD_SIZE"]))
    return share
