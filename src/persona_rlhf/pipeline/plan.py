"""`plan`: time and memory of a run, extrapolated from a sample of its work, before anything is trained.

A plan takes about a tenth of the run. One user is screened as `train` does; of other users all pairs are
assumed to stay. Of many users the first thousand are read. One prompt in sixteen is
asked, of a slow base one in up to 64: of the base for its check and for the constraint data, and of two cohorts for the
gate and the measures. Decoding steps are timed apart, since a run has fewer of them than sixteen samples (see
`SampledTime`). A few training steps of three cohorts are timed on temporary adapters: the first of the queue, some of
its middle, and one user alone.

The time of judging depends on training: an answer that equals the base's needs one forward pass, any other is decoded
from there. Adapters without effect are judged, and the decoding of new answers is added. As in the bundled experiment,
a trained adapter is assumed to answer a third of the probes and every harmless prompt anew, and users to pass at the
gate's first test; a failed one is tested again, up to once per alpha.

The samples fill no pass of judging. So the memory of a full one is counted from a small one, and added to the peak.

Not counted are writing the run folder and the start of Python. With `dpo.early_stop`, no user is assumed to stop early.
Whether the base passes the gate is not tested: `evaluate --base` and the start of `train` do that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import ceil
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.table import Table

from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import DpoSettings
from persona_rlhf.data.tokenize import Row, UserRows, both_rows
from persona_rlhf.evaluation.data_curve import DataNeed
from persona_rlhf.evaluation.power import power
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.models.row_decoding import LayerTokens
from persona_rlhf.models.scores import greedy_scores, logps_and_greedy
from persona_rlhf.pipeline.data_need import planned_need
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, WorkCounter, silent, watched
from persona_rlhf.pipeline.plan_samples import (
    EVERY,
    MEASURED_USERS,
    base_answers_seconds,
    judging_seconds,
    sampled_constraint,
    sampled_every,
    screened,
    screens_seconds,
    with_stand_ins,
)
from persona_rlhf.pipeline.plan_steps import StepTime, fit
from persona_rlhf.pipeline.prepare import Prepared, check_prompts, prepare
from persona_rlhf.pipeline.shared_values import with_reference
from persona_rlhf.release.results import plain
from persona_rlhf.training.constraint import ConstraintData, constraint_of
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.memory import (
    choose_slots,
    held_by,
    largest_step,
    machine_bytes,
    most_held,
    pair_tokens,
    sample_tokens,
    step_passes,
    step_room,
    taken_by,
)
from persona_rlhf.training.user_state import UserSchedule, queue_order, waves

_STEPS = 3  # of a probed cohort, at most
_SHARE = 0.04  # of a run's steps, at most
_EXAMPLES = 8  # of a category, in the probe's constraint
_ROWS = 4  # of a pass whose memory is measured
_MIB = 1 << 20


class Memory(NamedTuple):
    """Memory in MiB: base weights, adapters in the slots, their two moments, activations of the largest step (with
    gradients), keys and values of the largest pass of judging, and the peak of the process (on a GPU, of tensors).

    The peak is no sum: not all parts are held at once, and Python and its libraries need memory too.
    """

    base: float
    adapters: float
    moments: float
    activations: float
    caches: float
    peak: float


class Seconds(NamedTuple):
    """Wall time in seconds: loading and screening; the constraint's bank and the reference; training; judging."""

    preparing: float
    reference: float
    training: float
    judging: float

    @property
    def total(self) -> float:
        return sum(self)


class Plan(NamedTuple):
    """Size of a run: users to train, users skipped, pairs, tokens without padding, steps of single users, slots.

    `notice` names layers of the base that cannot be adapted. `held_back`: the users that the gate would be expected to
    hold back at their first look, if all of them refused so much of what it asks (by that rate). `need`: the pairs that
    users need, by a reward fitted to their labels.
    """

    users: int
    skipped: int
    pairs: int
    tokens: int
    steps: int
    slots: int
    memory: Memory
    seconds: Seconds
    notice: str | None = None
    held_back: Mapping[str, float] = MappingProxyType({})
    need: DataNeed | None = None

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds._asdict() | {"total": self.seconds.total}
        parts = {"memory_mib": self.memory._asdict(), "seconds": seconds}
        counts = {key: value for key, value in self._asdict().items() if isinstance(value, int)}
        rounded = {part: {key: round(value, 1) for key, value in values.items()} for part, values in parts.items()}
        held_back = {rate: round(users, 2) for rate, users in self.held_back.items()}
        return {**counts, **rounded, "notice": self.notice, "expected_held_back": held_back, "need": plain(self.need)}


def plan(config: Config, inputs: RunInputs | None = None, on_progress: OnProgress = silent) -> Plan:
    """Measures parts of a run and extrapolates; writes nothing. Raises InputError with the problems of the inputs."""
    keep_large_blocks()
    begun = most_held(torch.device("cpu"))  # Python and its libraries
    clock = perf_counter()
    inputs = inputs or read_inputs(config)
    ready = prepare(config, inputs, check=False, on_progress=on_progress)
    check_prompts(ready)
    if config.gate.enabled:
        ready.examination.check_pool()
    preparing = perf_counter() - clock
    every = sampled_every(ready)
    with ready.watched(ProgressEvent("asking the base"), on_progress):
        preparing += screens_seconds(ready, every) + base_answers_seconds(ready, every)
        sampled = sampled_constraint(ready, every)
    seen = min(ready.pairs.users, MEASURED_USERS)
    of_all = ready.pairs.users / seen
    user_rows, screening = screened(ready, seen, on_progress)
    preparing += screening * of_all
    bank, adapted, device = sampled.data, ready.adapted, ready.adapted.base.device
    taught = with_stand_ins(config.basis, user_rows)
    queue = queue_order([UserSchedule(user, config.dpo, config.seed) for user in taught if user.train])
    rows = [schedule.rows for schedule in queue]
    base = held_by(list(adapted.base.model.parameters()))
    if not rows:
        seconds = Seconds(preparing, sampled.seconds, 0.0, 0.0)
        return Plan(
            0, ready.pairs.users, 0, 0, 0, 0, Memory(base / _MIB, 0, 0, 0, 0, most_held(device) / _MIB), seconds
        )
    constraint = None if bank is None else constraint_of(bank, config.constraint, config.seed)
    cost = largest_step(adapted, rows, constraint, config.dpo)
    machine = machine_bytes(device)
    slots = min(len(rows), choose_slots(config.fleet, cost, device.type, machine, base))
    room = None if device.type == "cpu" else step_room(config.fleet, cost, machine, base, slots)
    typical = rows[len(rows) // 2 :][:slots]

    walked = _walk(queue, slots, sample_tokens(constraint), adapted.pads_users, room)
    cohorts = list({tuple(user.user_id for user in one): one for one in (rows[:slots], typical, typical[:1])}.values())
    few = max(2, min(_STEPS, round(_SHARE * len(walked) / len(cohorts))))
    examples = max(1, _EXAMPLES * EVERY // every)
    steps, pass_each = _probe_steps(config, adapted, cohorts, bank, few, examples, on_progress)
    users = round(len(rows) * of_all)
    training = sum(steps.of(wave.computed) for wave in walked) + pass_each * _checked_tokens(queue, config.dpo)
    with ready.watched(ProgressEvent("judging"), on_progress):
        judging = judging_seconds(ready, inputs, rows[:1], typical, users, every)
    stack = slots * adapted.params_per_user * torch.promote_types(adapted.base.model.dtype, torch.float32).itemsize
    adapters = stack if config.dpo.early_stop is None else 2 * stack  # the best adapter of each user is kept too
    computed = max(min(wave.computed, room or wave.computed) for wave in walked)  # in one pass
    largest = computed / (slots * cost.tokens)  # of a wave of nothing but largest steps
    activations = (slots * cost.memory - adapters - 2 * stack) * min(1.0, largest)
    caches, judged = _judging_bytes(ready, slots)  # beside what the samples held: they fill no pass
    judged += _state_bytes(ready, rows[:slots])
    begun = 0 if device.type == "cuda" else begun
    return Plan(
        users=users,
        skipped=ready.pairs.users - users,
        pairs=round(of_all * sum(len(user.train) for user in rows)),
        tokens=round(of_all * sum(wave.tokens for wave in walked)),
        steps=round(of_all * sum(wave.users for wave in walked)),
        slots=slots,
        memory=Memory(
            base=base / _MIB,
            adapters=adapters / _MIB,
            moments=2 * stack / _MIB,
            activations=activations / _MIB,
            caches=caches / _MIB,
            peak=max(most_held(device) + judged, begun + base + adapters + 2 * stack + activations) / _MIB,
        ),
        seconds=Seconds(
            preparing=preparing,
            reference=sampled.seconds
            + pass_each * (_reference_tokens(rows, None) * of_all + _reference_tokens([], bank) / sampled.share),
            training=training * of_all,
            judging=judging,
        ),
        notice=" ".join(filter(None, (adapted.notice, sampled.notice))) or None,
        held_back=_held_back(ready, users),
        need=planned_need(user_rows, ready.basis),
    )


def _held_back(ready: Prepared, users: int) -> dict[str, float]:
    """The expected number of users held back at a first look, by their refusal rate; empty where the gate is off."""
    if not ready.examination.gate.enabled:
        return {}
    [first] = power(ready.examination.demands, ready.policy.probes("certify"), looks=[1], recalls=[])
    return {rate: users * (1 - chance) for rate, chance in first.chances.items()}


class CohortStep(NamedTuple):
    """A step of a cohort: its users, their tokens, and the computed tokens, with padding."""

    users: int
    tokens: int
    computed: int


def _walk(
    queue: Sequence[UserSchedule], slots: int, constraint_tokens: int, pads: bool, room: int | None = None
) -> list[CohortStep]:
    """All steps of a run, as the engine takes them; with `pads`, each user is padded to the longest one of its pass."""
    walked = []
    for seated in waves(queue, slots):
        sizes = [constraint_tokens + sum(map(pair_tokens, schedule.pairs(step))) for schedule, step in seated]
        padded = sum(len(users) * max(sizes[user] for user in users) for users in step_passes(sizes, room))
        walked.append(CohortStep(len(sizes), sum(sizes), padded if pads else sum(sizes)))
    return walked


def _probe_steps(
    config: Config,
    adapted: AdaptedModel,
    cohorts: Sequence[Sequence[UserRows]],
    bank: ConstraintData | None,
    steps: int = _STEPS,
    examples: int = _EXAMPLES,
    on_progress: OnProgress = silent,
) -> tuple[StepTime, float]:
    """Time of a step, and seconds per token of a reference pass without gradients, measured on the first pairs of a few
    users and the first constraint `examples` of every category, in up to `steps` steps of a cohort."""
    few = steps * config.dpo.pairs_per_step
    thin = bank and ConstraintData(
        bank.categories, bank.limits, [of_category[:examples] for of_category in bank.examples], bank.requirements
    )
    constraint = None if thin is None else constraint_of(thin, config.constraint, config.seed)
    dpo = config.dpo.model_copy(update={"epochs": 1, "early_stop": None})
    probed = [
        [user._replace(train=user.train[:few], deciding=(), labelled=(), ties=()) for user in cohort]
        for cohort in cohorts
    ]
    users = [user for cohort in probed for user in cohort]
    clock = perf_counter()
    with watched([adapted], ProgressEvent("reference"), on_progress):
        reference = with_reference(adapted, users, thin)
        reference.add(both_rows(pair for user in users for pair in user.train))
    each = (perf_counter() - clock) / max(1, _reference_tokens(users, thin))
    sizes, seconds = list[int](), list[float]()
    counter = WorkCounter(ProgressEvent("timing steps"), on_progress, steps * len(cohorts))
    for cohort in probed:
        fleet = config.fleet.model_copy(update={"slots": len(cohort)})
        queue = queue_order([UserSchedule(user, dpo, config.seed) for user in cohort])
        engine = Engine(adapted, cohort, reference, constraint, dpo, fleet, config.seed)
        ends = [perf_counter()]

        def taken(_: object, ends: list[float] = ends) -> None:
            ends.append(perf_counter())
            counter(1)

        for _ in engine.run(taken):
            pass
        sizes += [wave.computed for wave in _walk(queue, len(cohort), sample_tokens(constraint), adapted.pads_users)]
        seconds += [end - start for start, end in pairwise(ends)]
    warm = min(1, len(sizes) - 1)  # the first step of all warms up
    return fit(sizes[warm:], seconds[warm:]), each


def _reference_tokens(users: Iterable[UserRows], bank: ConstraintData | None) -> int:
    """Tokens of the distinct rows that the reference scores."""
    rows = set(both_rows(pair for user in users for pair in (*user.train, *user.deciding)))
    return sum(row.length for row in rows.union(bank.rows() if bank else []))


def _checked_tokens(queue: Sequence[UserSchedule], dpo: DpoSettings) -> int:
    """Tokens of all checks for early stopping."""
    if dpo.early_stop is None:
        return 0
    return sum(
        ceil(schedule.steps / dpo.early_stop.every) * (row.chosen.length + row.rejected.length)
        for schedule in queue
        for row in schedule.rows.deciding
    )


def _judging_bytes(ready: Prepared, slots: int) -> tuple[int, int]:
    """Keys and values of the largest pass of judging, and all bytes of judging at once.

    The cache of a decoding is copied as it grows. Or beside it a pass of the next rows is scored: the bytes of one of a
    few rows, by tokens.
    """
    adapted, prompts = ready.examination.adapted, ready.examination.probes
    if not prompts:
        return 0, 0
    rows = [Row(prompt, prompt) for prompt in prompts[:_ROWS]]
    passed, tokens = list[LayerTokens](), sum(row.length for row in rows)
    answers = slots * len(prompts)

    def scored() -> None:
        batch = adapted.batch(rows, 1)
        greedy_scores(batch, rows, *adapted.by_token(batch, logps_and_greedy, (), passed))

    with torch.no_grad(), adapted.using(None):
        one_pass = taken_by(scored, adapted.base.device) / tokens
        cache = adapted.base.model(input_ids=torch.tensor([prompts[0]], device=adapted.base.device), use_cache=True)
    layers = cache.past_key_values.layers
    token = held_by([part for layer in layers for part in (layer.keys, layer.values)]) // len(prompts[0])
    longest = max(map(len, prompts)) + ready.examination.gate.max_new_tokens
    caches = token * min(adapted.tokens_per_generation, answers * longest)
    return caches, caches + max(caches, round(one_pass * min(adapted.tokens_per_pass, answers * tokens // len(rows))))


def _state_bytes(ready: Prepared, users: Sequence[UserRows]) -> int:
    """Hidden states that are kept: of the pairs of the users in the slots, and of the base's answers."""
    training = ready.adapted.prefix_bytes(both_rows(pair for user in users for pair in user.train))
    examination = ready.examination
    answered = [Row(prompt, prompt) for prompt in (*examination.probes, *examination.harmless)]
    return min(training, ready.config.fleet.trunk_cache * _MIB // 2) + examination.adapted.prefix_bytes(answered)


def render(plan: Plan) -> Table:
    """The plan as a table."""
    table = Table(show_header=False, caption=plan.notice, caption_justify="left")
    for name in ("users", "skipped", "pairs", "tokens", "steps", "slots"):
        table.add_row(name, f"{getattr(plan, name):,}", end_section=name == "slots")
    for name, mib in plan.memory._asdict().items():
        table.add_row(f"memory: {name}", f"{mib:,.1f} MiB", end_section=name == "peak")
    for name, seconds in (*plan.seconds._asdict().items(), ("total", plan.seconds.total)):
        show = f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.1f} min"
        table.add_row(f"time: {name}", show, end_section=name == "total")
    for rate, held in plan.held_back.items():
        table.add_row(f"held back at first, if all refuse {float(rate):.1%}", f"{held:,.1f} users")
    if plan.need is not None:
        table.add_row("pairs of a user", plan.need.sentence())
    return table
