"""Several processes of one run on one host: started, watched and ended together, as `accelerate launch` would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

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
