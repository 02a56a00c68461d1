"""Memory in bytes: what the machine has, what the process has held at most, and what a piece of work takes."""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes(device: torch.device) -> int:
    """All memory of a device: a GPU's own, or the machine's (of a container: its limit). What others use is not taken
    off, so that the same machine gives the same answer tomorrow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [file.read_text().strip() for name in _CONTAINER_LIMITS if (file := Path(name)).is_file()]
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])


def most_held(device: torch.device) -> int:
    """The most memory that this process ever held: of tensors on a GPU, else its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_by(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, storage that they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def taken_by(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `work` holds at once beyond what was held before it.

    A GPU's allocator keeps count. On a CPU the tensors themselves are counted, since what a process holds depends on
    what it did before; a kernel's scratch memory is not seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _Counter()
    with counter:
        work()
    return counter.most


class _Counter(TorchDispatchMode):
    """Watches the storage that every operation makes, until it is freed; `most` is the largest sum, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known:
                self._watch(leaf.untyped_storage())
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, freed), storage.nbytes())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
