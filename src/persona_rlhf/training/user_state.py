"""State of each user in training: schedule, AdamW, dual variables, early stopping, and the slots that hold it.

Users share nothing: each has its own step count, gradient clip, learning rate and dual variables. Memory is bounded by
the number of slots, whatever the number of users.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_rlhf.config.training import DpoSettings, EarlyStopSettings
from persona_rlhf.data.tokenize import PairRow, UserRows
from persona_rlhf.training.records import DualTrace

DUAL_SMOOTHING = 0.9
"""Share of the old estimate in a smoothed violation; a step has one probe per category."""
DUAL_CEILING = 10.0
"""Largest value of a dual variable."""


class Duals:
    """Integral control of `lambda >= 0` (Stooke et al. 2020, "Responsive safety by PID Lagrangian", the I term).

    The violation is smoothed first, because a step has one probe per category. Duals start at 0 and the loss is not
    divided by their sum: a stiffer start costs accuracy on the user's preferences.
    """

    def __init__(
        self, users: int, categories: int, gain: float, smoothing: float, ceiling: float, device: torch.device
    ) -> None:
        self.gain, self.smoothing, self.ceiling = gain, smoothing, ceiling
        self.values, self.violations, self.peaks, self.sums = torch.zeros(4, users, categories, device=device)
        self.updates = torch.zeros(users, device=device)

    def reset(self, user: int) -> None:
        """Resets row `user` for a new user."""
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


class FleetAdamW:
    """Decoupled Adam (Loshchilov & Hutter 2019, algorithm 2), one row a user; the formulas are torch.optim.AdamW's.

    torch's own optimizer has one step counter per tensor; users that start at different times need one each. A user
    that does not move in a step keeps its moments too.
    """

    def __init__(
        self,
        params: Float[Tensor, "users params"],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.params = params
        self.first = torch.zeros_like(params)
        self.second = torch.zeros_like(params)
        self.steps: Int[Tensor, " users"] = torch.zeros(params.shape[0], dtype=torch.int64, device=params.device)
        self.betas, self.epsilon = betas, epsilon
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm

    def reset(self, user: int) -> None:
        """Resets row `user` for a new user."""
        self.first[user].zero_()
        self.second[user].zero_()
        self.steps[user] = 0

    @torch.no_grad()
    def step(
        self, grads: Float[Tensor, "users params"], rates: Float[Tensor, " users"]
    ) -> tuple[Float[Tensor, " users"], Bool[Tensor, " users"]]:
        """One step at each user's learning rate; a user whose gradient is not finite does not move.

        Returns each user's gradient norm before the clip, and whether it moved.
        """
        norms = torch.linalg.vector_norm(grads, dim=1)
        moves = torch.isfinite(norms)
        clip = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        grads = torch.where(moves[:, None], grads * clip[:, None], 0.0)
        self.steps += moves
        beta1, beta2 = self.betas
        # 1 - beta is rounded once, from fp64: 1 - 0.999 in fp32 is wrong in the fifth digit.
        new1, new2 = ((moves.double() * (1 - beta))[:, None] for beta in self.betas)
        self.first.lerp_(grads, new1.to(grads.dtype))
        self.second.mul_((1 - new2).to(grads.dtype)).addcmul_(grads * grads, new2.to(grads.dtype))
        count = self.steps.clamp(min=1).to(torch.float64)
        correction1 = (1 - beta1**count).to(grads.dtype)[:, None]
        correction2 = (1 - beta2**count).to(grads.dtype)[:, None]
        rates = torch.where(moves, rates, 0.0).to(grads.dtype)[:, None]
        if self.weight_decay:
            self.params.mul_(1 - rates * self.weight_decay)
        denominator = (self.second / correction2).sqrt_().add_(self.epsilon)
        self.params.addcdiv_(self.first * (-rates / correction1), denominator)
        return norms, moves


def user_generator(seed: int, user_id: str, purpose: str) -> torch.Generator:
    """The random stream of one user and one purpose; it depends on no slot and no other user."""
    text = f"{seed}\x1f{purpose}\x1f{user_id}".encode("utf-8", "surrogatepass")
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


class UserSchedule:
    """One user's passes over its pairs: `steps` steps of up to `pairs_per_step` pairs, shuffled each epoch.

    Every epoch holds all pairs that the user judged, and an equal part of the labelled ones, each seen once.
    """

    def __init__(self, rows: UserRows, settings: DpoSettings, seed: int) -> None:
        self.rows, self.settings = rows, settings
        generator = user_generator(seed, rows.user_id, "order")
        self._taught = rows.taught
        self._orders = [self._shuffled(epoch, generator) for epoch in range(settings.epochs)]
        size = settings.pairs_per_step
        self._steps = [order[at : at + size] for order in self._orders for at in range(0, len(order), size)]
        self.steps = len(self._steps)

    def _shuffled(self, epoch: int, generator: torch.Generator) -> list[int]:
        """The places of an epoch's pairs in `UserRows.taught`."""
        real, labelled = len(self.rows.judged), len(self.rows.labelled)
        first, last = (real + labelled * turn // self.settings.epochs for turn in (epoch, epoch + 1))
        places = [*range(real), *range(first, last)]
        return [places[n] for n in torch.randperm(len(places), generator=generator).tolist()]

    def pairs(self, step: int) -> Sequence[PairRow]:
        """The pairs of optimizer step `step` (from 0); the last step of an epoch may be short."""
        return [self._taught[n] for n in self._steps[step]]

    def rate(self, step: int) -> float:
        """Learning rate at `step`: linear warm-up, then as `dpo.schedule` says; transformers' own formulas."""
        warm = math.ceil(self.settings.warmup * self.steps)
        if step < warm:
            return self.settings.learning_rate * step / warm
        done = (step - warm) / max(1, self.steps - warm)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.settings.learning_rate * factor[self.settings.schedule]


def queue_order(schedules: Sequence[UserSchedule]) -> list[UserSchedule]:
    """Longest first, so that the slots end together; ties by user id, so that the order depends on the data alone."""
    return sorted(schedules, key=lambda schedule: (-schedule.steps, schedule.rows.user_id))


def waves(queue: Sequence[UserSchedule], slots: int) -> Iterator[list[tuple[UserSchedule, int]]]:
    """The users side by side in each step of a run, each with its own step number, as the engine fills its slots."""
    waiting = iter(queue)
    wave = [(schedule, 0) for schedule in islice(waiting, slots)]
    while wave:
        yield wave
        wave = [(schedule, step + 1) for schedule, step in wave if step + 1 < schedule.steps]
        wave += [(schedule, 0) for schedule in islice(waiting, slots - len(wave))]


class Stopping:
    """Early stopping, one row a user: the lowest held-out loss of all checks, its adapter, and the checks since.

    Without settings no user stops early, and nothing is kept.
    """

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
        # On the CPU, where they are read: a GPU would be waited for.
        self.losses: Float[Tensor, " users"] = torch.full((users,), inf, dtype=torch.float64)
        self.waited: Int[Tensor, " users"] = torch.zeros(users, dtype=torch.int64)

    def reset(self, user: int) -> None:
        """Resets row `user` for a new user."""
        self.best[user].zero_()
        self.losses[user], self.waited[user] = inf, 0

    def due(self, step: int, steps: int) -> bool:
        """Whether a user is checked after `step` of `steps`: at every interval of the settings, and at the end."""
        return self.settings is not None and (step % self.settings.every == 0 or step == steps)

    def check(self, user: int, loss: float, adapter: Float[Tensor, " params"]) -> bool:
        """Records a check; True if the user's patience is exhausted. A loss that is not a number is no improvement."""
        assert self.settings is not None
        if loss < self.losses[user]:
            self.losses[user], self.waited[user] = loss, 0
            self.best[user] = adapter
            return False
        self.waited[user] += 1
        return bool(self.waited[user] >= self.settings.patience)

    def adapter(self, user: int, last: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """The adapter of the best check, or the `last` one if there was no check."""
        return self.best[user] if self.losses[user] < inf else last


class Slots:
    """Adapters `[slots, params]` with moments, duals and best checks; and the user, step and seconds of each slot."""

    def __init__(
        self,
        count: int,
        params: int,
        categories: int,
        dpo: DpoSettings,
        gain: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.flat: Float[Tensor, "slots params"] = torch.zeros(count, params, device=device, dtype=dtype)
        self.optimizer = FleetAdamW(self.flat, weight_decay=dpo.weight_decay, max_grad_norm=dpo.max_grad_norm)
        self.duals = Duals(count, categories, gain, DUAL_SMOOTHING, DUAL_CEILING, device)
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
        """Puts a new user into a free slot; nothing of the last one stays. Dual variables begin at 0, or at `duals`."""
        assert self.users[place] is None
        self.flat[place] = adapter.to(self.flat)
        self.optimizer.reset(place)
        self.duals.reset(place)
        if duals is not None:
            self.duals.values[place] = duals.to(self.duals.values)
        self.stopping.reset(place)
        self.users[place], self.steps[place], self.seconds[place] = user_id, 0, 0.0

    def close_free(self) -> None:
        """Removes the free slots from the stack, so that no step is spent on them."""
        kept = [place for place, user in enumerate(self.users) if user is not None]
        if len(kept) == len(self.users):
            return
        rows = torch.tensor(kept, dtype=torch.int64, device=self.flat.device)
        for owner in self._owners().values():
            for name, value in vars(owner).items():
                if isinstance(value, Tensor):
                    setattr(owner, name, value.index_select(0, rows.to(value.device)))
        self.flat = self.optimizer.params
        self.users = [self.users[place] for place in kept]
        self.steps = [self.steps[place] for place in kept]
        self.seconds = [self.seconds[place] for place in kept]

    def spend(self, seconds: float) -> None:
        """Charges a step's wall time (seconds) to the users in it, in equal shares."""
        self.seconds = [spent + seconds / len(self.users) for spent in self.seconds]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, for a checkpoint."""
        return {
            f"{title}.{name}": value
            for title, owner in self._owners().items()
            for name, value in vars(owner).items()
            if isinstance(value, Tensor)
        }

    def _owners(self) -> dict[str, FleetAdamW | Duals | Stopping]:
        return {"optimizer": self.optimizer, "duals": self.duals, "stopping": self.stopping}

    def notes(self) -> dict[str, Any]:
        """User, step and seconds of each slot, for a checkpoint."""
        return {"users": self.users, "steps": self.steps, "seconds": self.seconds}

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Restores the result of `tensors` and `notes`."""
        for key, value in tensors.items():
            title, name = key.split(".")
            owner = self._owners()[title]
            setattr(owner, name, value.to(getattr(owner, name).device))
        self.flat = self.optimizer.params
        self.users, self.steps, self.seconds = notes["users"], notes["steps"], notes["seconds"]
