"""The fleet: one adapter per user, trained side by side over one frozen base. A user alone is a fleet of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import slug
from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings
from persona_rlhf.data.tokenize import PairRow, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel, release_cache
from persona_rlhf.models.model_split import HiddenStates
from persona_rlhf.models.multi_lora import fresh_adapter
from persona_rlhf.training import checkpoint
from persona_rlhf.training.cache import HiddenStateCache, Reference
from persona_rlhf.training.constraint import ConstraintBank, ConstraintSample, ConstraintSampler
from persona_rlhf.training.memory import slots_of
from persona_rlhf.training.objective import StepLoss, detached, heldout_loss, joined, step_loss
from persona_rlhf.training.records import DualTrace
from persona_rlhf.training.user_state import Slots, UserSchedule, queue_order, user_generator


class TrainedUser(NamedTuple):
    """One finished user: the flat adapter (None where training failed), what it took, and the course of his duals.

    With early stopping it is the adapter of his best check, and `steps` are those taken, that check or not.
    """

    user_id: str
    adapter: Float[Tensor, " params"] | None
    status: Literal["trained", "failed"]
    reason: str
    steps: int
    seconds: float
    pairs: int
    duals: dict[str, DualTrace]


class WarmStart(NamedTuple):
    """What every user begins with: an adapter, and dual variables in the order of the bank's names."""

    adapter: Float[Tensor, " params"]
    duals: Float[Tensor, " names"]


class StepReport(NamedTuple):
    """One step of one user: loss, reward margin and accuracy over its pairs, the gradient's norm before the clip, the
    largest smoothed violation (nats over the limit) and the largest dual variable."""

    user_id: str
    step: int
    steps: int
    loss: float
    margin: float
    accuracy: float
    grad_norm: float
    violation: float | None
    dual: float | None


class Engine:
    """Trains users through the slots; `state` is the folder of checkpoints, without which nothing is kept on disk.

    The reference must know the rows of `rows_ahead`. With a `start`, every user begins there. `count` is the
    number of slots of the whole run: a resumed one keeps it, whatever the machine would allow now.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        users: Sequence[UserRows],
        reference: Reference,
        bank: ConstraintBank | None,
        dpo: DpoSettings,
        constraint: ConstraintSettings,
        fleet: FleetSettings,
        seed: int,
        state: Path | None = None,
        start: WarmStart | None = None,
    ) -> None:
        self.start = start
        self.adapted, self.reference, self.bank = adapted, reference, bank
        self.dpo, self.constraint, self.fleet, self.seed, self.state = dpo, constraint, fleet, seed, state
        queue = queue_order([UserSchedule(user, dpo, seed) for user in users if user.train])
        self.schedules = {schedule.rows.user_id: schedule for schedule in queue}
        self.draws: dict[str, ConstraintSampler] = {}
        self.queue = list(self.schedules)
        kept = self._kept()
        if kept is None:
            rows = [schedule.rows for schedule in queue]
            chosen = slots_of(adapted, rows, bank, dpo, constraint, fleet) if rows else 0
            self.count = min(chosen, len(queue))
        else:
            self.count = kept[1].pop("slots")
        self.together = self.count if kept is None else kept[1].pop("together")
        names = len(bank.names) if bank else 0
        device, dtype = adapted.base.device, torch.promote_types(adapted.base.model.dtype, torch.float32)
        self.slots = Slots(self.count, adapted.params_per_user, names, dpo, constraint, device, dtype)
        memory, disk = fleet.trunk_cache * 2**20, fleet.trunk_disk * 2**20
        self.ground = HiddenStateCache(adapted, reference, bank, self.count, memory, disk, state)
        self.finished: list[str] = [] if kept is None else self._resume(*kept)

    def run(
        self,
        report: Callable[[Sequence[StepReport]], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[TrainedUser]:
        """Trains until the queue and the slots are empty; yields each user as he ends, those of a resumed run first.

        A step that the device has no memory for is taken in halves of its users from then on, and `say` tells of it.
        Raises InputError where one user alone is too much.
        """
        if not (self.finished or any(self.slots.users)):
            self._save()  # so that a resumed run has these slots, wherever it was killed
        yield from map(self._stored, self.finished)
        since_checkpoint = 0
        while self._fill():
            started = time.perf_counter()
            reports, moved = self._step(say)
            self.slots.spend(time.perf_counter() - started)
            report(reports)
            for place, user_id in enumerate(self.slots.users):
                assert user_id is not None
                if not moved[place]:
                    reason = f"the gradient of step {self.slots.steps[place]} is not finite, so training stopped there"
                    yield self._finish(place, user_id, reason)
                elif self._stops(place, user_id) or self.slots.steps[place] == self.schedules[user_id].steps:
                    yield self._finish(place, user_id, None)
            since_checkpoint += 1
            if since_checkpoint >= self.fleet.checkpoint_every:
                self._save()
                since_checkpoint = 0
        if since_checkpoint:
            self._save()

    def _fill(self) -> bool:
        """Gives free slots to the next users of the queue, and closes those that stay free. False when none is left."""
        for place, user_id in enumerate(self.slots.users):
            if user_id is None and self.queue:
                waiting = self.queue.pop(0)
                if self.start is None:
                    generator = user_generator(self.seed, waiting, "init")
                    self.slots.take(place, waiting, fresh_adapter(list(self.adapted.spans.values()), generator))
                else:
                    self.slots.take(place, waiting, *self.start)
        self.slots.close_free()
        return bool(self.slots.users)

    def _step(self, say: Callable[[str], None]) -> tuple[list[StepReport], list[bool]]:
        """One optimizer step of every user in a slot, and whose gradient was finite."""
        slots = self.slots
        users = [user for user in slots.users if user is not None]
        schedules = [self.schedules[user] for user in users]
        pairs = [schedule.pairs(step) for schedule, step in zip(schedules, slots.steps, strict=True)]
        draws: list[ConstraintSample] = []
        if self.bank is not None:
            for user, step in zip(users, slots.steps, strict=True):
                if user not in self.draws:
                    self.draws[user] = self.bank.walk(self.constraint, self.seed, user)
                draws.append(self.draws[user].at(step))
        drawn: Sequence[ConstraintSample | None] = draws or [None] * len(users)
        states = [
            self.ground.of(user, schedule.rows.train, own, draw)
            for user, schedule, own, draw in zip(users, schedules, pairs, drawn, strict=True)
        ]
        gradient, loss = self._gradients(pairs, draws, states, say)
        device = slots.flat.device
        rates = [schedule.rate(step) for schedule, step in zip(schedules, slots.steps, strict=True)]
        norms, moves = slots.optimizer.step(gradient, torch.tensor(rates, dtype=torch.float64, device=device))
        if loss.violations is not None and loss.seen is not None:
            slots.duals.update(loss.violations, loss.seen, moves)
        slots.steps = [step + 1 for step in slots.steps]
        parts = [loss.dpo, loss.margin, loss.accuracy, norms, moves]
        if self.bank is not None:
            parts += [slots.duals.violations.amax(1), slots.duals.values.amax(1)]
        found = torch.stack([part.double() for part in parts]).tolist()  # at once: a GPU is waited for one time a step
        *figures, moved, worst, strongest = found if self.bank is not None else [*found, *[[None] * len(users)] * 2]
        totals = [schedule.steps for schedule in schedules]
        columns = zip(users, slots.steps, totals, *figures, worst, strongest, strict=True)
        return [StepReport(*column) for column in columns], [bool(own) for own in moved]

    def _gradients(
        self,
        pairs: Sequence[Sequence[PairRow]],
        draws: Sequence[ConstraintSample],
        states: Sequence[HiddenStates],
        say: Callable[[str], None],
    ) -> tuple[Float[Tensor, "users params"], StepLoss]:
        """Every user's gradient, and his loss without its graph; as many users at once as the device has room for."""
        gradients, losses, first = [], list[StepLoss](), 0
        while first < len(pairs):
            part, fits = slice(first, first + self.together), True
            learning = self.slots.flat[part].detach().requires_grad_()
            try:
                with self.adapted.using(learning):
                    duals = self.slots.duals.values[part]
                    some = pairs[part], draws[part], self.bank, duals, self.dpo, self.constraint, states[part]
                    loss = step_loss(self.adapted, self.reference, *some)
                    gradients.append(self._gradient(loss, learning))
                    losses.append(detached(loss))
            except torch.OutOfMemoryError:
                fits = False  # what failed is let go of when this handler is left
            if fits:
                first += len(pairs[part])
            else:
                self._halve(len(pairs[part]), say)
        return torch.cat(gradients), joined(losses)

    def _halve(self, users: int, say: Callable[[str], None]) -> None:
        """Fewer users in a pass from now on. Raises InputError where there was one only."""
        release_cache()
        if users == 1:
            sentence = "one user's step does not fit the device; lower dpo.pairs_per_step, or take a smaller base"
            raise InputError([Problem(self.adapted.base.name, None, "dpo.pairs_per_step", sentence)])
        self.together = users // 2
        say(f"out of memory with {users} users in a step: it is taken in parts of {self.together} from now on")

    def _gradient(self, loss: StepLoss, learning: Float[Tensor, "users params"]) -> Float[Tensor, "users params"]:
        """Of what each user minimises; users share no parameter, so the sum over users gives each his own."""
        [gradient] = torch.autograd.grad(loss.total.sum(), [learning])
        return gradient

    def _stops(self, place: int, user_id: str) -> bool:
        """Whether the user's held-out loss says that he had enough; asked of nobody without deciding pairs."""
        slots, schedule = self.slots, self.schedules[user_id]
        pairs = schedule.rows.deciding
        if not pairs or not slots.stopping.due(slots.steps[place], schedule.steps):
            return False
        started = time.perf_counter()
        with self.adapted.using(slots.flat[place : place + 1]):
            loss = heldout_loss(self.adapted, self.reference, pairs, self.dpo)
        slots.seconds[place] += time.perf_counter() - started
        return slots.stopping.check(place, loss, slots.flat[place])

    def _finish(self, place: int, user_id: str, fault: str | None) -> TrainedUser:
        """Frees the slot; the user's result is on disk before anyone sees it."""
        slots = self.slots
        names = self.bank.names if self.bank else ()
        user = TrainedUser(
            user_id,
            None if fault else slots.stopping.adapter(place, slots.flat[place]).detach().cpu().clone(),
            "failed" if fault else "trained",
            fault or "",
            slots.steps[place],
            slots.seconds[place],
            len(self.schedules[user_id].rows.train),
            dict(zip(names, slots.duals.traces(place), strict=True)),
        )
        if self.state is not None:
            tensors = {} if user.adapter is None else {"adapter": user.adapter}
            notes = user._replace(adapter=None)._asdict()
            checkpoint.save(self._file(user_id), tensors, notes)
        slots.users[place] = None
        self.draws.pop(user_id, None)
        self.ground.forget(user_id)
        return user

    def _save(self) -> None:
        if self.state is not None:
            self.reference.save()  # first: a resumed run has no value of its own for what its steps were taken with
            notes = self.slots.notes() | {"waiting": self.queue, "slots": self.count, "together": self.together}
            checkpoint.save(self.state / "slots.safetensors", self.slots.tensors(), notes)

    def _kept(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The slots as they last were on disk; None in a run that has just begun."""
        file = None if self.state is None else self.state / "slots.safetensors"
        return checkpoint.load(file, self.adapted.base.device) if file is not None and file.exists() else None

    def _resume(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> list[str]:
        """Takes up the slots and the queue as they last were on disk; returns the users who were done by then.

        A user who ended after that checkpoint trains its last steps again, so that every step has the neighbours, and
        so the tensor shapes and the bits, of a run that was never killed. Where the file of a user who was done has
        gone since, all begin anew, for the same reason.
        """
        assert self.state is not None
        queue: list[str] = notes.pop("waiting")
        underway = {*queue, *notes["users"]}
        done = [user for user in self.schedules if user not in underway]
        if {slug(user) for user in done} - {stored.stem for stored in checkpoint.stored_files(self.state / "trained")}:
            return []
        self.queue = queue
        self.slots.restore(tensors, notes)
        return done

    def _stored(self, user_id: str) -> TrainedUser:
        """A user as he was when he was done."""
        assert self.state is not None
        tensors, notes = checkpoint.load(self._file(user_id), torch.device("cpu"))
        duals = {name: DualTrace(*trace) for name, trace in notes["duals"].items()}
        return TrainedUser(**notes | {"adapter": tensors.get("adapter"), "duals": duals})

    def _file(self, user_id: str) -> Path:
        assert self.state is not None
        return self.state / "trained" / f"{slug(user_id)}.safetensors"
