"""A run whose shards are tasks of Ray, on one machine or on many that share a file system.

A task calls the function of `train --shard i/n`, and its results appear in the run folder by renaming. So a task that
Ray gives again after a lost worker goes on from the files, and no user is trained twice. The first shard computes what
all users share; the others begin when it is written. Nothing but this file knows Ray.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from persona_rlhf.common.errors import InputError, Problem, counted
from persona_rlhf.common.run_lock import run_lock
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, seconds_left
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.pipeline.train import train_share

SHARDS_EACH = 4
"""Shards for each one that runs at once, so that a slow one holds up little."""

LEAST_USERS = 8
"""Users of a shard, at least, where `fleet.chunk` is auto: each shard imports torch and loads the base."""

_POLL_SECONDS = 1.0
_LOCK_SECONDS = 300.0
_REACH_SECONDS = 5.0
_CLIENT_PORT = 10001  # of ray:// where none is given


class ShardEnd(NamedTuple):
    """How a shard ended: well, with problems of its input, or with the trace of a fault."""

    problems: list[Problem]
    fault: str | None


class FailedShardsError(RuntimeError):
    """Shards that failed, by no fault of the input; the others are kept."""


@runtime_checkable  # for beartype in the tests
class ShardTasks(Protocol):
    """Runs shards somewhere."""

    @property
    def capacity(self) -> int:
        """Shards that run at once."""
        ...

    def submit(self, config: Config, run: Path, share: WorkShare, resume: bool) -> None:
        """Starts a shard, or lets it wait for its turn."""
        ...

    def ended(self, seconds: float) -> list[tuple[WorkShare, ShardEnd]]:
        """The shards that ended since the last call; waits up to so many seconds for one."""
        ...


def train_shards(
    config: Config,
    run: Path,
    users: int,
    tasks: ShardTasks,
    *,
    resume: bool,
    on_progress: OnProgress,
) -> None:
    """Trains all shards of a run of so many users; `train_share` with `resume` then puts the run together.

    Raises InputError with the problems of all shards, and FailedShardsError naming every shard that failed.
    """
    run_dir = RunDir(run)
    count = _count(config.fleet, users, tasks.capacity, run_dir.chunk_size if run_dir.begun else None)
    waiting = [WorkShare(shard, count) for shard in range(count)]
    failed = dict[WorkShare, ShardEnd]()
    on_progress(ProgressEvent("training", f"{counted(users, 'user')} in {counted(count, 'shard')}"))
    tasks.submit(config, run, waiting.pop(0), resume)
    running, begun = 1, monotonic()
    while running:
        for share, end in tasks.ended(_POLL_SECONDS):
            running -= 1
            if end.problems or end.fault is not None:
                failed[share] = end
                on_progress(ProgressEvent("training", f"shard {share.shard + 1} of {count} failed"))
        if waiting and run_dir.ready and not failed:
            for share in waiting:
                tasks.submit(config, run, share, resume)
            running, waiting = running + len(waiting), []
        done = _users_done(run_dir, users)
        left = seconds_left(monotonic() - begun, done, users)
        on_progress(ProgressEvent("training", users_done=done, users=users, seconds_left=left))
    _raise(failed, count)


def _count(fleet: FleetSettings, users: int, capacity: int, chunk: int | None) -> int:
    """Shards of a run: `fleet.shards`, or four for each that runs at once; no more than chunks of users."""
    size = chunk or (fleet.chunk if isinstance(fleet.chunk, int) else LEAST_USERS)
    most = SHARDS_EACH * capacity if fleet.shards == "auto" else fleet.shards
    return max(1, min(most, ceil(users / size)))


def _users_done(run_dir: RunDir, users: int) -> int:
    """Users of the chunks that are done."""
    if not run_dir.begun:
        return 0
    size = run_dir.chunk_size
    return sum(min(size, users - n * size) for n in range(ceil(users / size)) if run_dir.is_done(n))


def _raise(failed: dict[WorkShare, ShardEnd], count: int) -> None:
    problems = dict.fromkeys(problem for end in failed.values() for problem in end.problems)
    if problems:
        raise InputError(list(problems))
    if failed:
        faults = [f"shard {share.shard + 1} of {count}: {end.fault}" for share, end in sorted(failed.items())]
        raise FailedShardsError("; ".join(faults) + "; the other shards are kept, and --resume goes on with the run")


def train_shard(config: Config, run: Path, share: WorkShare, resume: bool, folder: str) -> ShardEnd:
    """Trains one shard in `folder`, the working directory that the config's paths start from."""
    os.chdir(folder)
    try:
        with ExitStack() as stack:
            try:  # the lock of a lost machine can outlive it
                stack.enter_context(run_lock(run, "train", part=RunDir(run, share).part, wait=_LOCK_SECONDS))
            except InputError as fault:
                return ShardEnd([], str(fault))
            train_share(config, run, resume=resume or RunDir(run).begun, share=share)
    except InputError as fault:
        return ShardEnd(fault.problems, None)
    except Exception as fault:
        last = traceback.extract_tb(fault.__traceback__)[-1]
        return ShardEnd([], f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}: {fault}")
    return ShardEnd([], None)


class RayTasks:
    """Shards as stateless tasks of Ray. A task whose worker dies is given again, up to `fleet.shard_retries` times."""

    def __init__(self, ray: Any, fleet: FleetSettings, on_cpu: bool) -> None:
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        gpus = fleet.shard_gpus
        if gpus == "auto":
            gpus = 0.0 if on_cpu else float(any(machine.get("GPU", 0) for machine in machines))
        self._ray, self._shares = ray, dict[Any, WorkShare]()
        self._capacity = sum(_rooms(machine, fleet.shard_cpus, gpus) for machine in machines)
        if not self._capacity:
            have = "; ".join(f"{m.get('CPU', 0):g} CPUs and {m.get('GPU', 0):g} GPUs" for m in machines)
            sentence = (
                f"a shard takes {fleet.shard_cpus} CPUs and {gpus:g} GPUs, and no machine has them ({have}); take less"
            )
            raise InputError([Problem("config", None, "fleet.shard_cpus, fleet.shard_gpus", sentence)])
        options = {"num_cpus": fleet.shard_cpus, "num_gpus": gpus, "max_retries": fleet.shard_retries}
        self._task = ray.remote(**options)(train_shard)

    @property
    def capacity(self) -> int:
        return self._capacity

    def submit(self, config: Config, run: Path, share: WorkShare, resume: bool) -> None:
        self._shares[self._task.remote(config, run, share, resume, str(Path.cwd()))] = share

    def ended(self, seconds: float) -> list[tuple[WorkShare, ShardEnd]]:
        done, _ = self._ray.wait(list(self._shares), timeout=seconds)
        return [(self._shares.pop(task), self._end(task)) for task in done]

    def _end(self, task: Any) -> ShardEnd:
        try:
            end = self._ray.get(task)
        except self._ray.exceptions.RayError as fault:
            return ShardEnd([], str(fault).strip().partition("\n")[0])
        assert isinstance(end, ShardEnd)
        return end


def _rooms(machine: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Shards that a machine with these resources has room for."""
    rooms = [machine.get("CPU", 0) // cpus, *([machine.get("GPU", 0) // gpus] if gpus else [])]
    return int(min(rooms))


@contextmanager
def ray_tasks(address: str, config: Config) -> Iterator[RayTasks]:
    """Tasks on the cluster at an address of Ray (`auto`, `ray://host:port`), or on this machine for `local`.

    Raises InputError where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
        from ray import init
    except ImportError:  # of `init`, where a folder of this name lies in the working directory
        sentence = "Ray is not installed: pip install 'persona-rlhf[ray]'"
        raise InputError([Problem("train", None, "--ray", sentence)]) from None
    try:
        if address == "local":
            init("local", include_dashboard=False, log_to_driver=False)  # whatever RAY_ADDRESS says
        else:
            _reach(address)
            init(address=address, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as fault:
        sentence = (
            f"no cluster answers at {address} ({str(fault).strip().partition(chr(10))[0]}); start one, or give `local`"
        )
        raise InputError([Problem("train", None, "--ray", sentence)]) from fault
    try:
        yield RayTasks(ray, config.fleet, config.base.device == "cpu")
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError or ValueError where nothing listens at `host:port`; Ray itself would try for many minutes."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if address != "auto":
        socket.create_connection((place.hostname or "", place.port or _CLIENT_PORT), timeout=_REACH_SECONDS).close()
