"""Dual variables: how hard the constraint pulls, one a user and category, moved by what was measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class DualTrace(NamedTuple):
    """A dual variable over a user's training: its last, largest and mean value."""

    final: float
    peak: float
    mean: float


class Duals:
    """Integral control of `lambda >= 0` (Stooke et al. 2020, "Responsive safety by PID Lagrangian", the I term).

    The violation is smoothed first, because a step sees one probe a category. Duals start at 0 and the loss is not
    divided by their sum: a stiffer start costs the user his taste.
    """

    def __init__(
        self, users: int, categories: int, gain: float, smoothing: float, ceiling: float, device: torch.device
    ) -> None:
        self.gain, self.smoothing, self.ceiling = gain, smoothing, ceiling
        self.values, self.violations, self.peaks, self.sums = torch.zeros(4, users, categories, device=device)
        self.updates = torch.zeros(users, device=device)

    def reset(self, user: int) -> None:
        """Makes row `user` as new."""
        for state in (self.values, self.violations, self.peaks, self.sums):
            state[user].zero_()
        self.updates[user] = 0

    @torch.no_grad()
    def update(
        self,
        violations: Float[Tensor, "users categories"],
        seen: Bool[Tensor, "users categories"],
        moves: Bool[Tensor, " users"],
    ) -> None:
        """`violation <- s violation + (1 - s) new` where a category was seen, `lambda <- lambda + gain violation`."""
        seen = seen & moves[:, None] & torch.isfinite(violations)
        mixed = self.smoothing * self.violations + (1 - self.smoothing) * violations
        self.violations = torch.where(seen, mixed, self.violations)
        raised = (self.values + self.gain * self.violations).clamp(0, self.ceiling)
        self.values = torch.where(moves[:, None], raised, self.values)
        self.peaks = torch.maximum(self.peaks, self.values)
        self.sums = torch.where(moves[:, None], self.sums + self.values, self.sums)
        self.updates = self.updates + moves

    def traces(self, user: int) -> list[DualTrace]:
        """One trace a category."""
        mean = self.sums[user] / self.updates[user].clamp(min=1)
        columns = zip(self.values[user].tolist(), self.peaks[user].tolist(), mean.tolist(), strict=True)
        return [DualTrace(*column) for column in columns]
