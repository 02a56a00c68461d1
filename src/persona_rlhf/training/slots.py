"""The places in the stack: the flat state of the users who train now, so that memory is bounded by slots, not users."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.training.duals import Duals
from persona_rlhf.training.optimizer import FleetAdamW
from persona_rlhf.training.settings import ConstraintSettings, DpoSettings
from persona_rlhf.training.stopping import Stopping


class Slots:
    """Adapters `[slots, params]`, their moments, duals and best selves, with who sits where and how far he is."""

    def __init__(
        self,
        count: int,
        params: int,
        categories: int,
        dpo: DpoSettings,
        constraint: ConstraintSettings,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.flat: Float[Tensor, "slots params"] = torch.zeros(count, params, device=device, dtype=dtype)
        self.optimizer = FleetAdamW(self.flat, weight_decay=dpo.weight_decay, max_grad_norm=dpo.max_grad_norm)
        self.duals = Duals(count, categories, constraint.gain, constraint.smoothing, constraint.ceiling, device)
        self.stopping = Stopping(count, params, dpo.early_stop, device, dtype)
        self.users: list[str | None] = [None] * count
        self.steps = [0] * count
        self.seconds = [0.0] * count

    def take(
        self,
        place: int,
        user_id: str,
        adapter: Float[Tensor, " params"],
        duals: Float[Tensor, " names"] | None = None,
    ) -> None:
        """A new user in a free place: nothing of the last one stays. His dual variables begin at 0, or at `duals`."""
        assert self.users[place] is None
        self.flat[place] = adapter.to(self.flat)
        self.optimizer.reset(place)
        self.duals.reset(place)
        if duals is not None:
            self.duals.values[place] = duals.to(self.duals.values)
        self.stopping.reset(place)
        self.users[place], self.steps[place], self.seconds[place] = user_id, 0, 0.0

    def close_free(self) -> None:
        """Takes the free places out of the stack, so that no step is spent on them."""
        kept = [place for place, user in enumerate(self.users) if user is not None]
        if len(kept) == len(self.users):
            return
        rows = torch.tensor(kept, dtype=torch.int64, device=self.flat.device)
        for owner in self._owners().values():
            for name, value in vars(owner).items():
                if isinstance(value, Tensor):
                    setattr(owner, name, value.index_select(0, rows))
        self.flat = self.optimizer.params
        self.users = [self.users[place] for place in kept]
        self.steps = [self.steps[place] for place in kept]
        self.seconds = [self.seconds[place] for place in kept]

    def spend(self, seconds: float) -> None:
        """Charges a step's wall time (seconds) to the users in it, in equal shares."""
        self.seconds = [spent + seconds / len(self.users) for spent in self.seconds]

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint."""
        return {
            f"{title}.{name}": value
            for title, owner in self._owners().items()
            for name, value in vars(owner).items()
            if isinstance(value, Tensor)
        }

    def _owners(self) -> dict[str, FleetAdamW | Duals | Stopping]:
        return {"optimizer": self.optimizer, "duals": self.duals, "stopping": self.stopping}

    def notes(self) -> dict[str, Any]:
        """Who sits where, for a checkpoint."""
        return {"users": self.users, "steps": self.steps, "seconds": self.seconds}

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Takes over what `tensors` and `notes` gave."""
        for key, value in tensors.items():
            title, name = key.split(".")
            setattr(self._owners()[title], name, value)
        self.flat = self.optimizer.params
        self.users, self.steps, self.seconds = notes["users"], notes["steps"], notes["seconds"]
