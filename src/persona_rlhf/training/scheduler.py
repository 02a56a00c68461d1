"""What a user trains on, step by step: his order, his learning rate, and the queue of users for the slots."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from persona_rlhf.preferences.tokens import PairRow, UserRows
from persona_rlhf.training.settings import DpoSettings


def user_generator(seed: int, user_id: str, purpose: str) -> torch.Generator:
    """A random stream that belongs to one user and one purpose: never to a slot, so the fleet cannot change it."""
    text = f"{seed}\x1f{purpose}\x1f{user_id}".encode("utf-8", "surrogatepass")
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)


class UserSchedule:
    """One user's passes over his pairs: `steps` steps of up to `pairs_per_step` pairs, shuffled each epoch."""

    def __init__(self, rows: UserRows, settings: DpoSettings, seed: int) -> None:
        self.rows, self.settings = rows, settings
        generator = user_generator(seed, rows.user_id, "order")
        self._orders = [torch.randperm(len(rows.train), generator=generator).tolist() for _ in range(settings.epochs)]
        self._steps_per_epoch = math.ceil(len(rows.train) / settings.pairs_per_step)
        self.steps = settings.epochs * self._steps_per_epoch

    def pairs(self, step: int) -> Sequence[PairRow]:
        """The pairs of optimizer step `step` (from 0); the last step of an epoch may be short."""
        epoch, place = divmod(step, self._steps_per_epoch)
        size = self.settings.pairs_per_step
        return [self.rows.train[n] for n in self._orders[epoch][place * size : (place + 1) * size]]

    def rate(self, step: int) -> float:
        """Learning rate at `step`: linear warm-up, then as `dpo.schedule` says; transformers' own formulas."""
        warm = math.ceil(self.settings.warmup * self.steps)
        if step < warm:
            return self.settings.learning_rate * step / warm
        done = (step - warm) / max(1, self.steps - warm)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.settings.learning_rate * factor[self.settings.schedule]


def queue_order(schedules: Sequence[UserSchedule]) -> list[UserSchedule]:
    """Longest first, so that the slots run dry together; ties by user id, so that the order is the data's alone."""
    return sorted(schedules, key=lambda schedule: (-schedule.steps, schedule.rows.user_id))


def waves(queue: Sequence[UserSchedule], slots: int) -> Iterator[list[tuple[UserSchedule, int]]]:
    """Who takes which of his steps side by side, from the first wave to the last, as the engine fills its slots."""
    waiting = iter(queue)
    seated = [(schedule, 0) for schedule in islice(waiting, slots)]
    while seated:
        yield seated
        seated = [(schedule, step + 1) for schedule, step in seated if step + 1 < schedule.steps]
        seated += [(schedule, 0) for schedule in islice(waiting, slots - len(seated))]
