"""Hidden states that memory has no room for: in a file that is mapped into memory and has no name any more, so that it
is gone with the process, however that ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.fleet import AdaptedModel

_AT_ONCE = 256  # rows whose states are computed, and in memory, together


class Spilled(Mapping[Row, Float[Tensor, "_tokens hidden"]]):
    """The states of rows below the adapted layers, on disk; what is asked for comes back to the base's device.

    The file lies in `folder`, or where the system keeps what is temporary. Raises OSError where the disk is full.
    """

    def __init__(self, adapted: AdaptedModel, rows: Sequence[Row], folder: Path | None = None) -> None:
        distinct = list(dict.fromkeys(row for row in rows if row.completion))
        self._device, self._places = adapted.base.device, dict[Row, slice]()
        end = 0
        for row in distinct:
            start, end = end, end + len(row.prompt) + len(row.completion) - 1
            self._places[row] = slice(start, end)
        self._states = self._mapped(adapted, end, folder)
        for at in range(0, len(distinct), _AT_ONCE):
            for row, states in adapted.below(distinct[at : at + _AT_ONCE]).items():
                self._states[self._places[row]] = states.to("cpu")

    @staticmethod
    def _mapped(adapted: AdaptedModel, tokens: int, folder: Path | None) -> Float[Tensor, "_all hidden"]:
        hidden, dtype = adapted.base.model.config.get_text_config().hidden_size, adapted.base.model.dtype
        with tempfile.NamedTemporaryFile(dir=folder, prefix="states-") as file:
            size = tokens * hidden * dtype.itemsize
            try:  # a mapped file with holes in it would kill the process where the disk is full
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            except OSError as fault:
                raise OSError(fault.errno, "no space left for hidden states (fleet.trunk_disk)", file.name) from fault
            return torch.from_file(file.name, shared=True, size=tokens * hidden, dtype=dtype).view(tokens, hidden)

    def __getitem__(self, row: Row) -> Float[Tensor, "_tokens hidden"]:
        return self._states[self._places[row]].to(self._device)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
