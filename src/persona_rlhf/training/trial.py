"""Shortcuts through a model are tried out before they are used, on made-up rows, against the model without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.base import Base
from persona_rlhf.training.batch import Batch, collate


class Trial:
    """Rows with a shared prompt and unequal lengths; however they are laid out, the tokens that are read are no
    multiple of a line."""

    def __init__(self, base: Base) -> None:
        ids = [n % base.model.config.get_text_config().vocab_size for n in range(3, 23)]
        self.rows = [
            Row(tuple(ids[:7]), tuple(ids[7:12])),
            Row(tuple(ids[:7]), tuple(ids[9:])),
            Row(tuple(ids[4:6]), tuple(ids[1:3])),
        ]
        self._base = base

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows)

    def collated(self, rows: list[Row]) -> Batch:
        """One line a row."""
        return collate(rows, self._base.pad_id, self._base.device)

    @torch.no_grad()
    def expect(self, plain: Callable[[Batch], Tensor]) -> None:
        """Takes the model's logits, one row after the other, for what every shortcut must give."""
        self._wanted = torch.cat([plain(self.collated([row])) for row in self.rows]).float()

    @torch.no_grad()
    def passes(self, shortcut: Callable[[list[Row]], Tensor]) -> bool:
        """Whether a shortcut gives the expected logits."""
        try:
            tried = shortcut(self.rows).float()
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return False
        exact = self._base.model.dtype in (torch.float32, torch.float64)
        return bool((tried - self._wanted).norm() <= (1e-4 if exact else 5e-2) * self._wanted.norm())
