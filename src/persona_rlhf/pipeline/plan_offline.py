"""`plan --shape`: memory and operations of a run, counted from the shape of its base before any download.

Tokens are estimated from characters. Time is operations over a rate that the caller gives: a lower bound, because
writing answers token by token waits for memory, and small steps for kernel launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.tokenize import Row
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.plan_samples import CHANGED, MEASURED_USERS
from persona_rlhf.training.base_shape import BaseShape, shape_of
from persona_rlhf.training.constraint import OPENING_LENGTH
from persona_rlhf.training.constraint_data import constraint_probes
from persona_rlhf.training.memory import StepCost, choose_slots, widest

_CHARACTERS = 4  # a token of English, about
_TURN = 6  # tokens that a chat template adds to a prompt, about
_MIB, _GIB = 1 << 20, 1 << 30


class OfflinePlan(NamedTuple):
    """Size of a run by the shape of its base.

    Memory in MiB: the base; for each user in a slot the adapter with gradient and two moments, and the activations of
    a step; `cache` of a thousand tokens of an answer. `seconds` are at the given rate.
    """

    base: str
    parameters: int
    adapter_parameters: int
    users: int
    pairs: int
    steps: int
    slots: int | None
    memory: dict[str, float]
    petaflops: dict[str, float]
    seconds: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        rounded = {
            part: values and {key: round(value, 3) for key, value in values.items()}
            for part, values in (
                ("memory_mib", self.memory),
                ("petaflops", self.petaflops),
                ("seconds", self.seconds),
            )
        }
        counts = {key: value for key, value in self._asdict().items() if key not in ("memory", "petaflops", "seconds")}
        return counts | rounded


class _Lengths(NamedTuple):
    """Mean tokens of a pair's prompt, of its answers and of a probe, and the assumed tokens of a refusal."""

    prompt: int
    answer: int
    probe: int
    refusal: int


def plan_offline(config: Config, inputs: RunInputs, memory: float | None, rate: float | None) -> OfflinePlan:
    """Counts a run. `memory` in GiB of the device gives slots, `rate` in teraflops a second gives seconds.

    Raises InputError if the base's shape cannot be read.
    """
    shape = shape_of(config.base, config.lora)
    seen = min(inputs.pairs.users, MEASURED_USERS)
    of_all = inputs.pairs.users / seen
    pairs_seen = [pair for pair in inputs.pairs.of(range(seen)) if pair.split == "train"]
    lengths = _lengths(config, inputs, pairs_seen)
    step = shape.step(_rows(config, lengths))
    pairs_of = Counter(pair.user_id for pair in pairs_seen)
    steps = of_all * sum(config.dpo.epochs * ceil(count / config.dpo.pairs_per_step) for count in pairs_of.values())
    users, pairs = round(len(pairs_of) * of_all), round(len(pairs_seen) * of_all)
    forward = step.forward / step.tokens
    flops = {
        "reference": forward * _reference_tokens(config, inputs, lengths, pairs),
        "training": step.both * steps,
        "judging": forward * _judged_tokens(config, inputs, lengths) * (users + 1),
    }
    state = 4 * 4 * shape.adapter_parameters  # float32: adapter, gradient, two moments
    slots = None
    if memory is not None:
        cost = StepCost(step.tokens, state + step.kept, widest(shape.spans.values()), state)
        slots = min(users, choose_slots(config.fleet, cost, "cuda", int(memory * _GIB), shape.base_bytes))
    return OfflinePlan(
        base=config.base.model,
        parameters=shape.parameters,
        adapter_parameters=shape.adapter_parameters,
        users=users,
        pairs=pairs,
        steps=round(steps),
        slots=slots,
        memory=_memory(shape, state, step.kept, slots),
        petaflops={name: count / 1e15 for name, count in flops.items()} | {"total": sum(flops.values()) / 1e15},
        seconds=None if rate is None else {name: count / (rate * 1e12) for name, count in flops.items()},
    )


def step_flops(config: Config, inputs: RunInputs) -> float:
    """Operations of one step of one user, forward and backward, with rows of mean length.

    Raises InputError if the base's shape cannot be read.
    """
    shape = shape_of(config.base, config.lora)
    seen = inputs.pairs.of(range(min(inputs.pairs.users, MEASURED_USERS)))
    lengths = _lengths(config, inputs, [pair for pair in seen if pair.split == "train"])
    return float(shape.step(_rows(config, lengths)).both)


def _memory(shape: BaseShape, state: int, kept: int, slots: int | None) -> dict[str, float]:
    parts = {"base": shape.base_bytes, "user_state": state, "user_activations": kept, "cache": 1000 * shape.cache_bytes}
    if slots is not None:
        parts["training"] = shape.base_bytes + slots * (state + kept)
    return {name: size / _MIB for name, size in parts.items()}


def _lengths(config: Config, inputs: RunInputs, pairs: Sequence[PreferencePair]) -> _Lengths:
    def tokens(texts: Sequence[str]) -> int:
        return ceil(fmean(map(len, texts)) / _CHARACTERS) if texts else 1

    probes = [probe.prompt for probe in inputs.policy.probes("certify")]
    return _Lengths(
        prompt=_TURN + tokens(["\n".join(message.content for message in pair.prompt) for pair in pairs]),
        answer=1 + tokens([text for pair in pairs for text in (pair.chosen, pair.rejected)]),
        probe=_TURN + tokens(probes),
        refusal=config.gate.max_new_tokens // 2,
    )


def _rows(config: Config, lengths: _Lengths) -> list[Row]:
    """The rows of one user's step, all of mean length; the prompts differ."""
    constraint: ConstraintSettings = config.constraint
    rows = []
    for n in range(config.dpo.pairs_per_step):
        rows += [_row(n, lengths.prompt, lengths.answer)] * 2
    if constraint.enabled:
        rows += [_row(100 + n, lengths.probe, lengths.refusal) for n in range(constraint.rows_per_step)]
        rows += [_row(100, lengths.probe, OPENING_LENGTH)] * constraint.compliance_rows_per_step
        twins = constraint.twin_rows_per_step
        rows += [_row(200 + n, lengths.probe, OPENING_LENGTH) for n in range(twins)]
    return rows


def _row(prompt: int, length: int, answer: int) -> Row:
    return Row((prompt, *range(1, length)), tuple(range(answer)))


def _reference_tokens(config: Config, inputs: RunInputs, lengths: _Lengths, pairs: int) -> int:
    """Tokens of the rows that the base scores once, and of its refusals for the constraint."""
    constraint = config.constraint
    bank = len(constraint_probes(inputs.policy, constraint)) * constraint.refusals_per_probe * constraint.enabled
    return pairs * (lengths.prompt + 2 * lengths.answer) + 2 * bank * (lengths.probe + lengths.refusal)


def _judged_tokens(config: Config, inputs: RunInputs, lengths: _Lengths) -> int:
    """Tokens of judging one user: the base's answers scored, and one in `CHANGED` answers written anew."""
    answers = len(inputs.policy.probes("certify")) + config.evaluation.test_probes * 3 // 2
    answers += 2 * config.evaluation.harmless_prompts
    return answers * (lengths.probe + lengths.refusal) + answers // CHANGED * lengths.refusal


def render(plan: OfflinePlan) -> Table:
    """The plan as a table."""
    note = "Counted from the base's shape; a token is taken for four characters, and times are floors."
    table = Table(show_header=False, caption=note, caption_justify="left")
    table.add_row("base", f"{plan.base}, {plan.parameters:,} parameters")
    table.add_row("adapter", f"{plan.adapter_parameters:,} parameters a user")
    for name in ("users", "pairs", "steps", "slots"):
        value = getattr(plan, name)
        table.add_row(name, "say --memory" if value is None else f"{value:,}", end_section=name == "slots")
    words = {
        "base": "base",
        "user_state": "a user in a slot: adapter, gradient, moments",
        "user_activations": "a user in a slot: activations of a step",
        "cache": "keys and values of 1,000 tokens",
        "training": "base and slots together",
    }
    for name, mib in plan.memory.items():
        table.add_row(f"memory: {words[name]}", f"{mib:,.1f} MiB", end_section=name == [*plan.memory][-1])
    for name, count in plan.petaflops.items():
        seconds = plan.seconds and plan.seconds.get(name, sum(plan.seconds.values()))
        time = "" if not seconds else f", {seconds:,.1f} s" if seconds < 600 else f", {seconds / 60:,.1f} min"
        table.add_row(f"work: {name}", f"{count:,.3f} petaflop{time}")
    return table
