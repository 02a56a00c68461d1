"""Memory model: bytes of a machine and of a step, and the number of users that fit side by side.

The largest step of one user is measured, or counted from the shape of a base (see `base_shape`). Its bytes and tokens,
against those of the device, give the number of slots.
"""

from __future__ import annotations

import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persona_rlhf.config.training import DpoSettings, FleetSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.device import is_out_of_memory
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintFunctional, ConstraintSample
from persona_rlhf.training.objective import step_loss
from persona_rlhf.training.user_state import Slots

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes(device: torch.device) -> int:
    """All memory of a device: a GPU's own, or the machine's (of a container: its limit). Memory in use by others is not
    subtracted, so that the same machine always gives the same number."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [file.read_text().strip() for name in _CONTAINER_LIMITS if (file := Path(name)).is_file()]
    return min([installed, *(int(limit) for limit in limits if limit.isdigit())])


def most_held(device: torch.device) -> int:
    """The peak memory of this process in bytes: of tensors on a GPU, else its resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_by(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; shared storage is counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def taken_by(work: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of tensors that `work` adds to those held before it.

    A GPU's allocator keeps count. On a CPU the tensors themselves are counted, because a process's memory depends on
    its past; scratch memory of kernels is not counted there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _Counter()
    with counter:
        work()
    return counter.most


class _Counter(TorchDispatchMode):
    """Counter of the storage that operations create, until it is freed; `most` is the largest sum, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._watch(leaf.untyped_storage())
        return results

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, freed), storage.nbytes())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)


_CPU_SLOTS = 8  # more gains nothing on any shape: on a CPU users share only the overhead of a step
_CPU_NUMBERS = 1 << 21
"""Numbers in the widest tensor of a CPU's step, 8 MiB in float32. Larger tensors fall out of the cache between two
operations, which costs more than the shared overhead saves (measured: docs/explanation/performance.md)."""
_GPU_TOKENS = 65_536  # in a step; more does not fill the device any better
_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the memory; the rest is for judging, and on a CPU for other programs


class StepCost(NamedTuple):
    """One user's largest step: its `tokens`, the `memory` (bytes) of adapter, moments and activations in it, and the
    `width` of the widest adapted layer (numbers a token).

    state: bytes of the memory that do not depend on the tokens
    mean: tokens of a step of mean lengths; 0 where that is the largest
    """

    tokens: int
    memory: int
    width: int
    state: int = 0
    mean: int = 0

    @property
    def typical(self) -> int:
        """Tokens of a step of mean lengths."""
        return self.mean or self.tokens

    @property
    def per_token(self) -> float:
        """Bytes of activations of a token."""
        return (self.memory - self.state) / self.tokens


def choose_slots(fleet: FleetSettings, cost: StepCost, device: str, machine: int, base: int) -> int:
    """Users in memory at once: `fleet.slots`, or as many as memory and the token budget allow; at least 1.

    On a CPU they do at their largest steps, on a GPU at steps of mean lengths; see `step_room`. `machine` is all memory
    of the device, `base` what the base takes of it; both in bytes.
    """
    if fleet.slots != "auto":
        return fleet.slots
    each = cost.memory if device == "cpu" else cost.state + cost.typical * cost.per_token
    in_memory = int((machine * _SHARE[device] - base) // each)
    tokens = cost.tokens if device == "cpu" else cost.typical
    return max(1, min(in_memory, _most_slots(fleet, tokens, cost.width, device)))


def step_room(fleet: FleetSettings, cost: StepCost, machine: int, base: int, slots: int) -> int:
    """Tokens, with padding, of one pass of a step on a GPU: the token budget, or less where memory is short."""
    in_memory = (machine * _SHARE["cuda"] - base - slots * cost.state) / max(1.0, cost.per_token)
    return max(1, min(int(in_memory), _GPU_TOKENS if fleet.tokens_per_step == "auto" else fleet.tokens_per_step))


def step_passes(lengths: Sequence[int], room: int | None) -> list[list[int]]:
    """The users of a step in passes of at most `room` tokens, by number; each is padded to the longest of its pass.

    Where one pass has too little room for all, users of like `lengths` (tokens) go together, none shorter than two
    thirds of the longest: a pass for each length would be launches for few tokens.
    """
    users = list(range(len(lengths)))
    if room is None or len(users) * max(lengths) <= room:
        return [users]
    passes = list[list[int]]()
    for user in sorted(users, key=lambda user: -lengths[user]):
        longest = lengths[passes[-1][0]] if passes else 0
        if passes and (len(passes[-1]) + 1) * longest <= room and 3 * lengths[user] >= 2 * longest:
            passes[-1].append(user)
        else:
            passes.append([user])
    return passes


def _most_slots(fleet: FleetSettings, tokens: int, width: int, device: str) -> int:
    """Users whose largest steps, of so many `tokens` each, keep to the token budget; perhaps 0."""
    best = _CPU_NUMBERS // width if device == "cpu" else _GPU_TOKENS
    fits = (best if fleet.tokens_per_step == "auto" else fleet.tokens_per_step) // tokens
    return min(fits, _CPU_SLOTS) if device == "cpu" else fits


class SlotPlan(NamedTuple):
    """The number of slots of a run, and the tokens of one pass of a step (see `step_room`); None: all in one."""

    slots: int
    room: int | None


def plan_slots(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    constraint: ConstraintFunctional | None,
    dpo: DpoSettings,
    fleet: FleetSettings,
) -> SlotPlan:
    """The slots of a run. For `auto`, one step is measured on an adapter that is thrown away; not on a CPU whose token
    budget leaves room for one user only.

    It does not depend on other programs, so the same machine always chooses the same number.
    """
    if fleet.slots != "auto" or not users:
        return SlotPlan(len(users) if fleet.slots == "auto" else min(fleet.slots, len(users)), None)
    device, tokens = adapted.base.device, step_tokens(*_largest(users, constraint, dpo))
    on_cpu = device.type == "cpu"
    if on_cpu and _most_slots(fleet, tokens, widest(adapted.spans.values()), device.type) <= 1:
        return SlotPlan(1, None)
    try:
        cost = largest_step(adapted, users, constraint, dpo)
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        return SlotPlan(1, None)  # the engine takes such a step in parts
    machine, base = machine_bytes(device), held_by(list(adapted.base.model.parameters()))
    slots = min(len(users), choose_slots(fleet, cost, device.type, machine, base))
    return SlotPlan(slots, None if on_cpu else step_room(fleet, cost, machine, base, slots))


def empty_slots(adapted: AdaptedModel, count: int, constraint: ConstraintFunctional | None, dpo: DpoSettings) -> Slots:
    """The state of `count` users at once, in fp32 at least, with a dual variable per name of the constraint."""
    names, gain = (constraint.names, constraint.gain) if constraint else ((), 0.0)
    dtype = torch.promote_types(adapted.base.model.dtype, torch.float32)
    return Slots(count, adapted.params_per_user, len(names), dpo, gain, adapted.base.device, dtype)


def pair_tokens(pair: PairRow) -> int:
    """The tokens that a pair adds to a step: its prompt once, and both answers."""
    return len(pair.chosen.prompt) + len(pair.chosen.completion) + len(pair.rejected.completion)


def largest_step(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    constraint: ConstraintFunctional | None,
    dpo: DpoSettings,
) -> StepCost:
    """The cost of a step of the run's longest pairs, whichever users they belong to, with the constraint's largest
    sample. No step of any user is larger."""
    pairs, samples = _largest(users, constraint, dpo)
    reference, device = _Unread(), adapted.base.device
    steps = sum(ceil(len(user.train) / dpo.pairs_per_step) for user in users)
    mean = round(sum(pair_tokens(pair) for user in users for pair in user.train) / max(1, steps))

    def step() -> None:
        slots = empty_slots(adapted, 1, constraint, dpo)
        learning, duals = slots.flat.detach().requires_grad_(), slots.duals.values
        with adapted.using(learning):
            step_loss(adapted, reference, [pairs], samples, constraint, duals, dpo).total.sum().backward()
        assert learning.grad is not None
        slots.optimizer.step(learning.grad, torch.zeros(1, dtype=torch.float64, device=device))

    numbers = adapted.params_per_user * (5 if dpo.early_stop else 4)  # adapter, gradient, moments, the best adapter
    state = numbers * torch.promote_types(adapted.base.model.dtype, torch.float32).itemsize
    tokens, memory = step_tokens(pairs, samples), taken_by(step, device)
    typical = min(tokens, mean + sample_tokens(constraint))
    return StepCost(tokens, memory, widest(adapted.spans.values()), min(state, memory), typical)


def _largest(
    users: Sequence[UserRows], constraint: ConstraintFunctional | None, dpo: DpoSettings
) -> tuple[list[PairRow], list[ConstraintSample]]:
    """The pairs and the constraint's sample of the largest step."""
    pairs = nlargest(dpo.pairs_per_step, (pair for user in users for pair in user.taught), key=pair_tokens)
    return pairs, [] if constraint is None else [constraint.largest()]


def sample_tokens(constraint: ConstraintFunctional | None) -> int:
    """Tokens of a user's constraint rows in a step, on average."""
    if constraint is None:
        return 0
    return round(fmean(sum(row.length for row in constraint.sample("", step).rows) for step in range(32)))


def step_tokens(pairs: Sequence[PairRow], samples: Sequence[ConstraintSample]) -> int:
    """Tokens of one user's step."""
    return sum(map(pair_tokens, pairs)) + sum(row.length for sample in samples for row in sample.rows)


def widest(spans: Iterable[LayerSpan]) -> int:
    """Most inputs or outputs of any adapted layer."""
    return max(max(span.inputs, span.outputs) for span in spans)


class _Unread(Reference):
    """A reference of zeros: the memory of a step does not depend on the values."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, row: Row) -> float:
        return 0.0
