"""The heap of this process: freed blocks are kept while users train, and returned to the system between cohorts."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


def keep_large_blocks(size: int = 1 << 30) -> bool:
    """Makes glibc's malloc keep freed blocks of up to `size` bytes for the next step; True where it agrees.

    By default glibc returns large blocks to the system at once, and every step faults their pages in again: 1.6 million
    faults instead of 0.1 million in a run of eight users, and 3 s more of 57 CPU-seconds (docs/LOG.md).
    """
    try:
        libc = _glibc()
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, size)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, size))
    except (OSError, AttributeError):
        return False


def return_free_blocks() -> bool:
    """Returns the pages of all freed blocks to the system; True where glibc's malloc did so. Takes 0.1 s a GiB.

    Kept blocks of many sizes do not fit later requests, and the heap grows from cohort to cohort.
    """
    try:
        return bool(_glibc().malloc_trim(0))
    except (OSError, AttributeError):
        return False


def _glibc() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise OSError("no glibc on this system")
    return ctypes.CDLL("libc.so.6")
