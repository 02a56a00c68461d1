"""The training loop: one adapter per user, side by side over one frozen base. A single user is a fleet of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import slug
from persona_rlhf.config.training import DpoSettings, FleetSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.device import is_out_of_memory, release_cache, to_device
from persona_rlhf.models.model_split import HiddenStates
from persona_rlhf.models.multi_lora import fresh_adapter
from persona_rlhf.training import checkpoint
from persona_rlhf.training.cache import HiddenStateCache, Reference
from persona_rlhf.training.constraint import ConstraintFunctional, ConstraintSample
from persona_rlhf.training.memory import empty_slots, plan_slots, step_passes, step_tokens
from persona_rlhf.training.objective import StepLoss, detached, heldout_losses, in_order, joined, step_pieces, summed
from persona_rlhf.training.records import DualTrace
from persona_rlhf.training.user_state import UserSchedule, queue_order, user_generator

_QUICK = 0.1  # seconds of a write that delays no checkpoint


class TrainedUser(NamedTuple):
    """One finished user: the flat adapter (None if training failed), steps, seconds, pairs, and traces of the duals.

    With early stopping it is the adapter of the best check, while `steps` counts all steps taken.
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
    """The state every user begins with: an adapter, and dual variables in the order of the constraint's names."""

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


GradientRule = Callable[[StepLoss, Float[Tensor, "users params"]], Float[Tensor, "users params"]]
"""The gradient of a step from its loss and from the adapters that the loss was computed with."""


def total_gradient(loss: StepLoss, adapters: Float[Tensor, "users params"]) -> Float[Tensor, "users params"]:
    """The gradient of the total loss. Users share no parameter, so the sum over users gives each user's own."""
    [gradient] = torch.autograd.grad(loss.total.sum(), [adapters])
    return gradient


class Engine:
    """The training loop: all users of a run, some at once in slots.

    `reference` must hold the rows of `rows_ahead`. `state` is the folder of checkpoints; without it nothing is kept on
    disk. With a `start` every user begins there; `begin` gives a user another adapter, or None. Another `gradient` rule
    may combine the gradients of DPO loss and penalty in its own way. `pool` holds the rows of all labelled pairs, which
    users share. `count` is the number of slots of the whole run and `room` the most tokens of a pass (None: any); a
    resumed run keeps both.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        users: Sequence[UserRows],
        reference: Reference,
        constraint: ConstraintFunctional | None,
        dpo: DpoSettings,
        fleet: FleetSettings,
        seed: int,
        state: Path | None = None,
        start: WarmStart | None = None,
        gradient: GradientRule = total_gradient,
        pool: Sequence[Row] = (),
        begin: Callable[[str], Float[Tensor, " params"] | None] = lambda _: None,
    ) -> None:
        self.adapted, self.reference, self.constraint = adapted, reference, constraint
        self.dpo, self.fleet, self.seed, self.state = dpo, fleet, seed, state
        self.start, self.gradient, self.begin = start, gradient, begin
        queue = queue_order([UserSchedule(user, dpo, seed) for user in users if user.train])
        self.schedules = {schedule.rows.user_id: schedule for schedule in queue}
        self.queue = list(self.schedules)
        kept = self._kept()
        if kept is None:
            rows = [schedule.rows for schedule in queue]
            self.count, self.room = plan_slots(adapted, rows, constraint, dpo, fleet)
        else:
            self.count, self.room = kept[1].pop("slots"), kept[1].pop("room", None)
        self._next_save = 0.0
        self.pieces = 1 if kept is None else kept[1].pop("pieces", 1)
        self.together = self.count if kept is None else kept[1].pop("together")
        self.slots = empty_slots(adapted, self.count, constraint, dpo)
        memory, disk = fleet.trunk_cache * 2**20, fleet.trunk_disk * 2**20
        constraint_rows = constraint.rows() if constraint else []
        self.states = HiddenStateCache(adapted, reference, constraint_rows, self.count, memory, disk, state, pool)
        self.finished: list[str] = [] if kept is None else self._resume(*kept)

    def run(
        self,
        report: Callable[[Sequence[StepReport]], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[TrainedUser]:
        """Trains until queue and slots are empty; yields each user at the end of its training, those of a resumed run
        first.

        If a step runs out of memory, steps are taken in halves of their users from then on, and those of one user in
        halves of its pairs, with a notice to `say`. Raises InputError if a pair alone does not fit.
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
            stops = self._stops(moved)
            for place, user_id in enumerate(self.slots.users):
                assert user_id is not None
                if not moved[place]:
                    reason = f"the gradient of step {self.slots.steps[place]} is not finite, so training stopped there"
                    yield self._finish(place, user_id, reason)
                elif stops[place] or self.slots.steps[place] == self.schedules[user_id].steps:
                    yield self._finish(place, user_id, None)
            since_checkpoint += 1
            if since_checkpoint >= self.fleet.checkpoint_every and time.perf_counter() >= self._next_save:
                self._save()
                since_checkpoint = 0
        if since_checkpoint:
            self._save()

    def _fill(self) -> bool:
        """Gives free slots to the next users of the queue and closes the rest; False when no user is left."""
        for place, occupant in enumerate(self.slots.users):
            if occupant is None and self.queue:
                user_id = self.queue.pop(0)
                adapter, duals = self.begin(user_id), None if self.start is None else self.start.duals
                if adapter is None and self.start is not None:
                    adapter = self.start.adapter
                elif adapter is None:
                    generator = user_generator(self.seed, user_id, "init")
                    adapter = fresh_adapter(list(self.adapted.spans.values()), generator)
                self.slots.take(place, user_id, adapter, duals)
        self.slots.close_free()
        return bool(self.slots.users)

    def _step(self, say: Callable[[str], None]) -> tuple[list[StepReport], list[bool]]:
        """One optimizer step of every user in a slot; and by slot, whether its gradient was finite."""
        slots = self.slots
        users = [user for user in slots.users if user is not None]
        schedules = [self.schedules[user] for user in users]
        pairs = [schedule.pairs(step) for schedule, step in zip(schedules, slots.steps, strict=True)]
        samples: list[ConstraintSample] = []
        if self.constraint is not None:
            samples = [self.constraint.sample(*place) for place in zip(users, slots.steps, strict=True)]
        constraint_rows = [sample.rows for sample in samples] or [[]] * len(users)
        states = [
            self.states.of(user, schedule.rows.judged, user_pairs, rows)
            for user, schedule, user_pairs, rows in zip(users, schedules, pairs, constraint_rows, strict=True)
        ]
        gradient, loss = self._gradients(pairs, samples, states, say)
        each = [schedule.rate(step) for schedule, step in zip(schedules, slots.steps, strict=True)]
        [rates] = to_device([torch.tensor(each, dtype=torch.float64)], slots.flat.device)
        norms, moves = slots.optimizer.step(gradient, rates)
        if loss.violations is not None and loss.seen is not None:
            slots.duals.update(loss.violations, loss.seen, moves)
        slots.steps = [step + 1 for step in slots.steps]
        parts = [loss.dpo, loss.margin, loss.accuracy, norms, moves]
        if self.constraint is not None:
            parts += [slots.duals.violations.amax(1), slots.duals.values.amax(1)]
        columns = torch.stack([part.double() for part in parts]).tolist()  # at once: one wait for a GPU per step
        if self.constraint is None:
            columns += [[None] * len(users)] * 2
        *figures, moved, worst, strongest = columns
        totals = [schedule.steps for schedule in schedules]
        reports = zip(users, slots.steps, totals, *figures, worst, strongest, strict=True)
        return [StepReport(*report) for report in reports], [bool(value) for value in moved]

    def _gradients(
        self,
        pairs: Sequence[Sequence[PairRow]],
        samples: Sequence[ConstraintSample],
        states: Sequence[HiddenStates],
        say: Callable[[str], None],
    ) -> tuple[Float[Tensor, "users params"], StepLoss]:
        """Every user's gradient, and its loss without the graph; as many users at once as the device has room for."""
        lengths = [step_tokens(user, samples[n : n + 1]) for n, user in enumerate(pairs)]
        passes, gradients, losses, first = step_passes(lengths, self.room), [], list[StepLoss](), 0
        order = [user for users in passes for user in users]
        flat, duals, back = self.slots.flat, self.slots.duals.values, None
        if len(passes) > 1:
            there, back = to_device([torch.tensor(order), torch.tensor(order).argsort()], flat.device)
            flat, duals = flat.index_select(0, there), duals.index_select(0, there)
            pairs, states = [pairs[user] for user in order], [states[user] for user in order]
            samples = [samples[user] for user in order] if samples else []
        for last in accumulate(map(len, passes)):
            while first < last:
                part, fits = slice(first, min(last, first + self.together)), True
                learning = flat[part].detach().requires_grad_()
                try:
                    with self.adapted.using(learning):
                        inputs = pairs[part], samples[part], self.constraint, duals[part], self.dpo, states[part]
                        pieces = self.pieces if len(learning) == 1 else 1
                        of_pieces = step_pieces(pieces, self.adapted, self.reference, *inputs)
                        loss = next(of_pieces)
                        gradient, parts = self.gradient(loss, learning), [detached(loss)]
                        for loss in of_pieces:
                            gradient += self.gradient(loss, learning)
                            parts.append(detached(loss))
                    gradients.append(gradient)
                    losses.append(summed(parts))
                except Exception as fault:
                    if not is_out_of_memory(fault):
                        raise
                    fits = False  # the failed step's memory is released when this handler ends
                if fits:
                    first = part.stop
                else:
                    self._halve(len(pairs[part]), say)
        gradient, loss = torch.cat(gradients), joined(losses)
        return (gradient, loss) if back is None else (gradient.index_select(0, back), in_order(loss, back))

    def _halve(self, users: int, say: Callable[[str], None]) -> None:
        """Fewer users in a pass from now on, or fewer pairs of a lone user.

        Raises InputError if there was one pair only, or for a rule that needs the gradient of the whole step.
        """
        release_cache()
        if users == 1 and self.pieces < max(2, self.dpo.pairs_per_step) and self.gradient is total_gradient:
            self.pieces = min(2 * self.pieces, max(2, self.dpo.pairs_per_step))
            say(f"out of memory with one user in a step: its pairs are taken in {self.pieces} parts from now on")
            return
        if users == 1:
            sentence = "one user's step does not fit the device; lower dpo.pairs_per_step, or take a smaller base"
            raise InputError([Problem(self.adapted.base.name, None, "dpo.pairs_per_step", sentence)])
        self.together = users // 2
        say(f"out of memory with {users} users in a step: it is taken in parts of {self.together} from now on")

    def _stops(self, moved: Sequence[bool]) -> list[bool]:
        """By slot, whether early stopping ends the training of its user; never for a user without deciding pairs.

        On a CPU users are scored alone, so that no bit depends on others. A GPU scores all of them at once.
        """
        slots, due, stops = self.slots, list[int](), [False] * len(moved)
        schedules = [self.schedules[user] for user in slots.users if user is not None]
        for place, schedule in enumerate(schedules):
            if moved[place] and schedule.rows.deciding and slots.stopping.due(slots.steps[place], schedule.steps):
                due.append(place)
        alone = self.adapted.base.device.type == "cpu"
        for places in [[place] for place in due] if alone else [due] if due else []:
            started = time.perf_counter()
            with self.adapted.using(torch.stack([slots.flat[place] for place in places])):
                pairs = [schedules[place].rows.deciding for place in places]
                losses = heldout_losses(self.adapted, self.reference, pairs, self.dpo)
            for place, loss in zip(places, losses, strict=True):
                slots.seconds[place] += (time.perf_counter() - started) / len(places)
                stops[place] = slots.stopping.check(place, loss, slots.flat[place])
        return stops

    def _finish(self, place: int, user_id: str, fault: str | None) -> TrainedUser:
        """Frees the slot. The user's result is on disk before it is returned."""
        slots = self.slots
        names = self.constraint.names if self.constraint else ()
        user = TrainedUser(
            user_id,
            None if fault else slots.stopping.adapter(place, slots.flat[place]).detach().cpu().clone(),
            "failed" if fault else "trained",
            fault or "",
            slots.steps[place],
            slots.seconds[place],
            len(self.schedules[user_id].rows.judged),
            dict(zip(names, slots.duals.traces(place), strict=True)),
        )
        if self.state is not None:
            tensors = {} if user.adapter is None else {"adapter": user.adapter}
            notes = user._replace(adapter=None)._asdict()
            checkpoint.save(self._file(user_id), tensors, notes)
        slots.users[place] = None
        self.states.forget(user_id)
        return user

    def _save(self) -> None:
        """Writes a checkpoint, and sets the time of the next one: slow writes take a twentieth of the time at most."""
        started = time.perf_counter()
        if self.state is not None:
            self.reference.save()  # first: a resumed run must find the values that its steps were taken with
            sizes = {"slots": self.count, "together": self.together, "room": self.room, "pieces": self.pieces}
            notes = self.slots.notes() | {"waiting": self.queue} | sizes
            checkpoint.save(self.state / "slots.safetensors", self.slots.tensors(), notes)
        ended = time.perf_counter()
        self._next_save = ended + (20 * (ended - started) if ended - started > _QUICK else 0.0)

    def _kept(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint of the slots; None in a run that has just begun."""
        file = None if self.state is None else self.state / "slots.safetensors"
        return checkpoint.load(file, self.adapted.base.device) if file is not None and file.exists() else None

    def _resume(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> list[str]:
        """Restores slots and queue from the last checkpoint; returns the users that were done by then.

        A user that ended after the checkpoint trains its last steps again. So every step has the same users side by
        side, and so the tensor shapes and the bits, as in a run that was never killed. If the file of a finished user
        is missing, all users start over, for the same reason.
        """
        assert self.state is not None
        queue: list[str] = notes.pop("waiting")
        unfinished = {*queue, *notes["users"]}
        done = [user for user in self.schedules if user not in unfinished]
        if {slug(user) for user in done} - {stored.stem for stored in checkpoint.stored_files(self.state / "trained")}:
            return []
        self.queue = queue
        self.slots.restore(tensors, notes)
        return done

    def _stored(self, user_id: str) -> TrainedUser:
        """The stored result of a finished user."""
        assert self.state is not None
        tensors, notes = checkpoint.load(self._file(user_id), torch.device("cpu"))
        duals = {name: DualTrace(*trace) for name, trace in notes["duals"].items()}
        return TrainedUser(**notes | {"adapter": tensors.get("adapter"), "duals": duals})

    def _file(self, user_id: str) -> Path:
        assert self.state is not None
        return self.state / "trained" / f"{slug(user_id)}.safetensors"
