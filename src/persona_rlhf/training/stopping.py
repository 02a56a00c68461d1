"""When a user's training ends early: his best adapter so far, and how long no check was better."""

from __future__ import annotations

from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.training.settings import EarlyStopSettings


class Stopping:
    """One row a user: the lowest held-out loss of all checks, its adapter, and the checks since. Without settings
    nobody stops, and nothing is kept."""

    def __init__(
        self,
        users: int,
        params: int,
        settings: EarlyStopSettings | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = settings
        kept = params if settings is not None else 0
        self.best: Float[Tensor, "users kept"] = torch.zeros(users, kept, device=device, dtype=dtype)
        self.losses: Float[Tensor, " users"] = torch.full((users,), inf, dtype=torch.float64, device=device)
        self.waited: Int[Tensor, " users"] = torch.zeros(users, dtype=torch.int64, device=device)

    def reset(self, user: int) -> None:
        """Makes row `user` as new."""
        self.best[user].zero_()
        self.losses[user], self.waited[user] = inf, 0

    def due(self, step: int, steps: int) -> bool:
        """Whether a user is checked after `step` of his `steps`: now and then, and at his end."""
        return self.settings is not None and (step % self.settings.every == 0 or step == steps)

    def check(self, user: int, loss: float, adapter: Float[Tensor, " params"]) -> bool:
        """Takes in a check; True where the user's patience is at its end. A loss that is not a number is no better."""
        assert self.settings is not None
        if loss < self.losses[user]:
            self.losses[user], self.waited[user] = loss, 0
            self.best[user] = adapter
            return False
        self.waited[user] += 1
        return bool(self.waited[user] >= self.settings.patience)

    def adapter(self, user: int, last: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """The adapter to keep: that of the best check, or the `last` one where there was none."""
        return self.best[user] if self.losses[user] < inf else last
