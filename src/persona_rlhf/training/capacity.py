"""How many users fit side by side: what the largest step of one user takes, against what the device has."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from typing import NamedTuple

import torch

from persona_rlhf.preferences.tokens import PairRow, Row, UserRows
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.constraint import Draw
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.memory import held_by, machine_bytes, taken_by
from persona_rlhf.training.objective import step_loss
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.settings import ConstraintSettings, DpoSettings, FleetSettings
from persona_rlhf.training.slots import Slots

_CPU_SLOTS = 8  # more gains nothing on any shape: what users share on a CPU is the overhead of a step, no more
_TOKENS_PER_STEP = {"cpu": 16_384, "cuda": 65_536}  # more does not fill the device any better
_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the memory; the rest is for judging, and a CPU's is everybody's


class StepCost(NamedTuple):
    """One user's largest step: its `tokens`, and the `memory` (bytes) of his adapter, moments and activations in it."""

    tokens: int
    memory: int


def choose_slots(fleet: FleetSettings, cost: StepCost, device: str, machine: int, base: int) -> int:
    """Users in memory at once: `fleet.slots`, or what memory and the token budget allow; at least 1.

    `machine` is all memory of the device, `base` what the base takes of it; both in bytes.
    """
    if fleet.slots != "auto":
        return fleet.slots
    budget = _TOKENS_PER_STEP[device] if fleet.tokens_per_step == "auto" else fleet.tokens_per_step
    fits = min(budget // cost.tokens, int(machine * _SHARE[device] - base) // cost.memory)
    return max(1, min(fits, _CPU_SLOTS) if device == "cpu" else fits)


def slots_of(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    bank: ConstraintBank | None,
    dpo: DpoSettings,
    constraint: ConstraintSettings,
    fleet: FleetSettings,
) -> int:
    """The slots of a run; where they are `auto`, one step is tried on an adapter that is thrown away.

    Nothing in it depends on what else the machine does just now, so the same machine chooses the same number.
    """
    if fleet.slots != "auto":
        return fleet.slots
    device = adapted.base.device
    cost = largest_step(adapted, users, bank, dpo, constraint)
    base = held_by(list(adapted.base.model.parameters()))
    return choose_slots(fleet, cost, device.type, machine_bytes(device), base)


def pair_tokens(pair: PairRow) -> int:
    """Tokens that a pair adds to a step: its prompt once, and both answers."""
    return len(pair.chosen.prompt) + len(pair.chosen.completion) + len(pair.rejected.completion)


def draw_tokens(draw: Draw) -> int:
    """Tokens that a user's constraint rows add to a step."""
    return sum(row.length for row in draw.rows)


def largest_step(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    bank: ConstraintBank | None,
    dpo: DpoSettings,
    constraint: ConstraintSettings,
) -> StepCost:
    """The cost of a step of the run's longest pairs, of whomever they are, with the longest rows of the constraint.

    No step of any user is larger.
    """
    pairs = nlargest(dpo.pairs_per_step, (pair for user in users for pair in user.train), key=pair_tokens)
    draws = [] if bank is None else [_longest(bank, constraint)]
    tokens = sum(map(pair_tokens, pairs)) + sum(map(draw_tokens, draws))
    reference = _Unread()
    device, dtype = adapted.base.device, torch.promote_types(adapted.base.model.dtype, torch.float32)

    def step() -> None:
        slots = Slots(1, adapted.params_per_user, len(bank.names) if bank else 0, dpo, constraint, device, dtype)
        learning, duals = slots.flat.detach().requires_grad_(), slots.duals.values
        with adapted.using(learning):
            step_loss(adapted, reference, [pairs], draws, bank, duals, dpo, constraint).total.sum().backward()
        assert learning.grad is not None
        slots.optimizer.step(learning.grad, torch.zeros(1, dtype=torch.float64, device=device))

    return StepCost(tokens, taken_by(step, device))


class _Unread(Reference):
    """Stands in for the base's log-probabilities: what a step takes does not depend on their values."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, row: Row) -> float:
        return 0.0


def _longest(bank: ConstraintBank, settings: ConstraintSettings) -> Draw:
    """As many rows of each kind as a user sees in a step, the longest ones of the bank."""
    anchors = [(anchor, category) for category, own in enumerate(bank.anchors) for anchor in own]
    refusals = nlargest(
        settings.rows_per_step,
        ((row, category) for anchor, category in anchors for row in anchor.refusals),
        key=lambda found: found[0].length,
    )
    compliances = (anchor.compliance for anchor, _ in anchors if anchor.compliance is not None)
    overrefusals = [anchor.overrefusal for anchor, _ in anchors if anchor.overrefusal is not None]
    elsewhere = [row for own in bank.lessons for row in own.elsewhere]
    taught = settings.lesson_rows_per_step if bank.lessons else 0
    lessons = nlargest(
        taught,
        ((row, kind) for kind, own in enumerate(bank.lessons) for row in own.turns),
        key=lambda found: found[0].length,
    )
    return Draw(
        [row for row, _ in refusals],
        [category for _, category in refusals],
        nlargest(settings.compliance_rows_per_step, compliances, key=lambda row: row.length),
        [
            *nlargest(settings.twin_rows_per_step, overrefusals, key=lambda row: row.length),
            *nlargest(taught, elsewhere, key=lambda row: row.length),
        ],
        [row for row, _ in lessons],
        [kind for _, kind in lessons],
    )
