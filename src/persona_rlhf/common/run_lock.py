"""The lock of a run: one program that writes, or several that read; the others learn which one is at work.

It is `flock` on RUN/.lock: the kernel frees it when its process ends, however that ends, and a file left by a killed
process locks nothing. `filelock` locks in the same way, but it has no shared mode. The file holds a JSON line per
holder, for the message to others; the last holder removes it.

Processes on several machines exclude each other where their common file system supports `flock`, as NFS does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, ParamSpec, TypeVar

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError, Problem

WAIT_SECONDS = 10.0
"""How long a command waits for a lock by default: most verbs hold it for seconds, only training for hours."""

LOCK = ".lock"
_POLL_SECONDS = 0.1
_NAMED = 3  # holders named in a message
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

P = ParamSpec("P")
R = TypeVar("R")
_held: ContextVar[Mapping[Path, _Mode]] = ContextVar("locks that this thread holds", default=MappingProxyType({}))


class Holder(NamedTuple):
    """A program that holds a lock: its process, its machine, its verb, and the time (UTC, ISO 8601) it began."""

    pid: int
    host: str
    verb: str
    since: str

    @property
    def alive(self) -> bool:
        """Whether the process is there; one of another machine is taken to be."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it belongs to another account
            pass
        return True

    def __str__(self) -> str:
        machine = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"`{self.verb}` (process {self.pid}{machine}, since {self.since})"


def tell_nobody(_: str) -> None:
    """Tells nobody."""


@contextmanager
def run_lock(
    run: Path,
    verb: str,
    *,
    shared: bool = False,
    part: str | None = None,
    wait: float = 0.0,
    tell: Callable[[str], None] = tell_nobody,
) -> Iterator[None]:
    """Holds the lock of a run for a block: alone, or `shared` with other readers.

    A lock that this thread holds already counts for blocks inside. Processes that train one run together each name
    their own `part`: the parts share the lock, and each part has one process. The folder of a run is made if need be,
    and removed again if it stays empty.

    `wait` is in seconds; `tell` gets a sentence when waiting begins. Raises InputError naming the holders when it is
    over, and for a file system without locks.
    """
    verb = verb if part is None else f"{verb}, part {part}"
    with _locked(run / LOCK, verb, _Mode(part is None and not shared, not shared), wait, tell):
        if part is None:
            yield
        else:
            with _locked(run / f"{LOCK}-{part}", verb, _Mode(True, True), wait, tell):
                yield


def locks_run(verb: str, *, shared: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of a function whose first argument is `run`: the function holds the lock of it (`run_lock`)."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            run = args[0] if args else kwargs["run"]
            assert isinstance(run, Path)
            with run_lock(run, verb, shared=shared):
                return function(*args, **kwargs)

        return locked

    return decorate


def is_lock(name: str) -> bool:
    """Whether a file of a run is one of its locks."""
    return name.startswith(LOCK)


class _Mode(NamedTuple):
    """How a lock is held: alone or with others, and for writing or only for reading."""

    alone: bool
    writes: bool


@contextmanager
def _locked(file: Path, verb: str, mode: _Mode, wait: float, tell: Callable[[str], None]) -> Iterator[None]:
    key, held = file.parent.resolve() / file.name, _held.get()
    if key in held:
        assert held[key].alone or not mode.alone, f"{verb} writes to a run that it holds for reading"
        yield
        return
    made = [folder for folder in (key.parent, *key.parent.parents) if not folder.exists()] if mode.writes else []
    handle = _acquired(key, verb, mode, wait, tell)
    reset = _held.set({**held, key: mode})
    try:
        yield
    finally:
        _held.reset(reset)
        if handle is not None:
            _release(handle, key)
        with contextlib.suppress(OSError):  # something is in the folder now
            for folder in made:
                folder.rmdir()


def _acquired(file: Path, verb: str, mode: _Mode, wait: float, tell: Callable[[str], None]) -> int | None:
    """The handle of a locked file; None where there is nothing to read, or a reader may not write to the folder."""
    end, waiting = time.monotonic() + wait, False
    while True:
        handle = _opened(file, mode.writes)
        if handle is None:
            return None
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if mode.alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            holders = _holders(handle)
        except OSError as fault:
            if fault.errno not in _NO_LOCKS:
                raise
            sentence = "this file system has no locks (flock); put the run on one that has them"
            raise InputError([Problem(str(file.parent), None, None, sentence)]) from fault
        else:
            if _is_at(handle, file):
                _enter(handle, verb, mode.alone)
                return handle
            os.close(handle)
            continue
        os.close(handle)
        names = " and ".join(holders[:_NAMED]) or "another program"
        if time.monotonic() >= end:
            sentence = f"{names} is at work in this run, so nothing was done; wait for its end or stop it, or give "
            sentence += "--wait SECONDS"
            raise InputError([Problem(str(file.parent), None, None, sentence)])
        if not waiting:
            limit = "" if wait == math.inf else f" up to {wait:g} seconds"
            tell(f"Waiting{limit} for {names} in {file.parent}")
            waiting = True
        time.sleep(min(_POLL_SECONDS, max(0.0, end - time.monotonic())))


def _opened(file: Path, writes: bool) -> int | None:
    """The lock's file, made if need be; None where a reader finds no folder, or one that it may not write to."""
    try:
        if writes:
            file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except (NotADirectoryError, FileExistsError):  # RUN is a file: the verb says so
        return None
    except OSError:
        if writes:
            raise
    try:
        return os.open(file, os.O_RDONLY)
    except OSError:
        return None


def _is_at(handle: int, file: Path) -> bool:
    """Whether an open file still has its name: its holder before, or a swap of runs, may have taken it away."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _enter(handle: int, verb: str, alone: bool) -> None:
    """Writes the holder's line: alone in the file, or after those of other readers."""
    since = now()
    line = json.dumps(Holder(os.getpid(), socket.gethostname(), verb, since)._asdict()) + "\n"
    with contextlib.suppress(OSError):  # a reader may not write here, or the disk is full: the lock holds all the same
        if alone:
            os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_END)
        os.write(handle, line.encode())


def _holders(handle: int) -> list[str]:
    """The living holders of a lock, as a message names them."""
    holders = []
    for line in os.pread(handle, 1 << 16, 0).splitlines():
        with contextlib.suppress(ValueError, TypeError):  # the line is being written
            holder = Holder(**json.loads(line))
            if holder.alive:
                holders.append(str(holder))
    return holders


def _release(handle: int, file: Path) -> None:
    """Frees a lock; its last holder removes the file."""
    with contextlib.suppress(OSError):  # other readers hold it, or this one may not write here
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, file):
            file.unlink()
        else:  # the folder was renamed
            os.ftruncate(handle, 0)
    os.close(handle)
