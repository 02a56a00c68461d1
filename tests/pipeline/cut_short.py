"""Work in a process of its own that is killed, or meets a full disk, just before the n-th change it makes to a disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

KILLED, DONE, FAILED, UNMINDED = 9, 40, 42, 41
"""Exit codes: it was killed; there was no n-th change; it failed; it met the fault and nobody minded."""

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def cut_short(work: Callable[[], object], at: int, full: bool = False) -> int:
    """Runs `work` up to its `at`-th change of a disk (from 1); one of the codes above."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in _CHANGES or writes:
            seen += 1
            if seen == at:
                if full:
                    raise OSError(errno.ENOSPC, "No space left on device")
                os._exit(KILLED)

    sys.addaudithook(hook)  # a hook cannot be taken out again, but the process ends
    code = FAILED
    try:
        work()
        code = DONE if seen < at else UNMINDED
    except OSError:
        pass
    finally:
        os._exit(code)
