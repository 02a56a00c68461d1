"""The device of a base: copies to it, its memory, and the errors that mean it is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_Tree = TypeVar("_Tree")


def to_device(tree: _Tree, device: torch.device) -> _Tree:
    """Tuples and lists of small CPU tensors on a device.

    On CUDA all tensors of one type go in one copy from page-locked memory, which the host does not wait for. A copy of
    each one from ordinary memory would wait until the device has done all earlier work.
    """
    if device.type == "cpu":
        return tree
    leaves, structure = tree_flatten(tree)
    places: dict[torch.dtype, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            places.setdefault(leaf.dtype, []).append(place)
    for of_type in places.values():
        tensors = [leaves[place] for place in of_type]
        moved = _in_one_copy(tensors, device) if device.type == "cuda" else [x.to(device) for x in tensors]
        for place, tensor in zip(of_type, moved, strict=True):
            leaves[place] = tensor
    rebuilt: _Tree = tree_unflatten(leaves, structure)
    return rebuilt


def _in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    whole = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def device_bytes(device: torch.device) -> int:
    """All memory of a GPU, in bytes, whoever uses it."""
    return int(torch.cuda.get_device_properties(device).total_memory)


_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(fault: Exception) -> bool:
    """Whether an error says that memory is full. Libraries and drivers say so in errors of their own."""
    if isinstance(fault, torch.OutOfMemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(sentence in str(fault) for sentence in _FULL)


def release_cache() -> None:
    """Frees the GPU memory that torch's allocator caches, so that smaller pieces fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
