"""The fleet against TRL's DPOTrainer per user: same base, same pairs, same first weights and order, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from persona_rlhf.benchmarks import trl_baseline
from persona_rlhf.benchmarks.trl_baseline import PAIRS_AND_EPOCHS, SEED, Shape, Workload, make_workload
from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings, TopLayers
from persona_rlhf.data.tokenize import Row, UserRows, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.constraint import ConstraintData, constraint_of
from persona_rlhf.training.engine import Engine, TrainedUser
from persona_rlhf.training.losses import PairLogps, PairTokens, pair_losses
from persona_rlhf.training.user_state import UserSchedule

FLEET, ALONE = "persona-rlhf, fleet", "persona-rlhf, one user at a time"
PADDED = "persona-rlhf, fleet, rows padded and prompts not shared"
PLAIN = "persona-rlhf, fleet, norms and the like as the model has them"
CONSTRAINED = "persona-rlhf, fleet, constraint on"
UPPER = {top: f"persona-rlhf, fleet, upper {top:.0%} of the layers" for top in (0.5, 0.25)}
OTHER_MATHS = {CONSTRAINED, *UPPER.values()}
"""Contenders with another objective or other layers: their adapters cannot be compared with the fleet's."""


class BenchmarkRound(NamedTuple):
    """One round of one contender: seconds a user (CPU seconds on a CPU), and the trained adapters."""

    seconds: float
    adapters: dict[str, Float[Tensor, " params"]]


def bench(
    shape: str = "192x4",
    users: int = 8,
    pairs: int | None = None,
    epochs: int | None = None,
    rounds: int = 5,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times every contender once a round, in turns, and reports medians over the rounds; JSON-ready.

    `log` gets a line for every contender of every round before it begins. `ratio` is users per second of the fleet over
    that of TRL's best setting: CPU seconds of the process, on one thread, without a GPU; wall seconds on a GPU. `users`
    train in the fleet; the loops train one a round. A fixed shape is a Llama of random weights, `hidden x layers`, with
    1,536 tokens like the bundled base, and random pairs of 12 to 30 prompt tokens and 12 to 30 tokens a side. Raises
    InputError for an unknown shape.
    """
    if shape not in get_args(Shape):
        sentence = f"`{shape}` is no shape of the benchmark{did_you_mean(shape, get_args(Shape))}"
        raise InputError([Problem("bench", None, "--shape", sentence)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs, epochs = pairs or PAIRS_AND_EPOCHS[shape][0], epochs or PAIRS_AND_EPOCHS[shape][1]
    return {"shape": shape} | compare(make_workload(shape, users, pairs, epochs, device), rounds, log=log)


def compare(
    work: Workload,
    rounds: int,
    left_out: Collection[str] = (),
    log: Callable[[str], None] = lambda _: None,
    seconds: float = inf,
) -> dict[str, Any]:
    """Times every contender except those `left_out` on any workload; JSON-ready (see `bench`).

    No round begins that would end after so many `seconds`, by the longest one so far; the first one always does.
    """
    started, longest = perf_counter(), 0.0
    keep_large_blocks()
    threads, device, users = torch.get_num_threads(), work.base.device, len(work.users)
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        contenders: dict[str, Callable[[int], BenchmarkRound]] = {
            **{f"TRL, {setting}": _trl(work, setting) for setting in trl_baseline.TRL_SETTINGS},
            ALONE: lambda turn: _ours(work, [work.users[turn % users]]),
            FLEET: lambda _: _ours(work, work.users),
            PADDED: lambda _: _ours(work, work.users, packs=False),
            PLAIN: lambda _: _ours(work, work.users, quicker=False),
            CONSTRAINED: lambda _: _ours(work, work.users, bank=work.bank),
            **{name: lambda _, top=top: _ours(work, work.users, _upper(work, top)) for top, name in UPPER.items()},  # type: ignore[misc]
        }
        timings: dict[str, list[BenchmarkRound]] = {name: [] for name in contenders if name not in left_out}
        for turn in range(rounds):
            begun = perf_counter()
            if turn and begun + longest > started + seconds:
                break
            for name in _turned(list(timings), turn):
                log(f"round {turn + 1} of {rounds}: {name}")
                timings[name].append(contenders[name](turn))
            longest = max(longest, perf_counter() - begun)
        rows = _rows(work, timings)
    finally:
        torch.set_num_threads(threads)
    best = min((row for row in rows if row["contender"].startswith("TRL")), key=lambda row: row["seconds_per_user"])
    [fleet] = [row for row in rows if row["contender"] == FLEET]
    return {
        "ratio": best["seconds_per_user"] / fleet["seconds_per_user"],
        "best_trl": best["contender"],
        "seconds_are": "wall" if device.type == "cuda" else "CPU, one thread",
        "users": users,
        "pairs": len(work.users[0].train),
        "epochs": work.dpo.epochs,
        "rounds": len(next(iter(timings.values()))),
        "rows": rows,
    }


def render(result: dict[str, Any]) -> Table:
    """The result as a table for people."""
    title = (
        f"{result['shape']}: {result['ratio']:.2f}x the users per second of the best TRL setting "
        f"({result['users']} users, {result['pairs']} pairs, {result['epochs']} epochs, "
        f"{result['rounds']} rounds; seconds: {result['seconds_are']})"
    )
    table = Table(title=title)
    table.add_column("contender")
    for heading in (
        "seconds a user",
        "lowest to highest",
        "fleet is faster by",
        "final loss",
        "distance to the fleet's",
    ):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["contender"],
            f"{row['seconds_per_user']:.2f}",
            f"{min(row['rounds']):.2f} to {max(row['rounds']):.2f}",
            f"{row['times_fleet']:.2f}x",
            f"{row['final_loss']:.4f}",
            "-" if row["adapter_distance"] is None else f"{row['adapter_distance']:.1e}",
        )
    return table


def _turned(names: list[str], turn: int) -> list[str]:
    """The names rotated by the round, so that no contender always follows the same one."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _trl(work: Workload, setting: trl_baseline.TrlSetting) -> Callable[[int], BenchmarkRound]:
    tokenizer = work.base.tokenizer

    def train(turn: int) -> BenchmarkRound:
        user = work.users[turn % len(work.users)]
        seconds, reference = 0.0, None
        if setting == "shared reference columns":
            started = work.clock()
            adapted = AdaptedModel(work.base, work.lora)
            reference = Reference(adapted)
            reference.add(_pair_rows([user]))
            adapted.close()
            seconds = work.clock() - started
        with tempfile.TemporaryDirectory() as folder:
            run = trl_baseline.train_user(
                work.base,
                tokenizer,
                UserSchedule(user, work.dpo, SEED),
                work.spans,
                work.lora,
                work.dpo,
                SEED,
                setting,
                reference,
                Path(folder),
                work.clock,
            )
        return BenchmarkRound(seconds + run.seconds, {user.user_id: run.adapter})

    return train


def _upper(work: Workload, top: float) -> LoraSettings:
    return work.lora.model_copy(update={"layers": TopLayers(top=top)})


def _ours(
    work: Workload,
    users: Sequence[UserRows],
    lora: LoraSettings | None = None,
    packs: bool = True,
    quicker: bool = True,
    bank: ConstraintData | None = None,
) -> BenchmarkRound:
    started = work.clock()
    adapted = AdaptedModel(work.base, lora or work.lora)
    adapted.packs_rows = adapted.packs_rows and packs
    adapted.patch = adapted.patch if quicker else None
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, users, bank.rows() if bank else ()))
    constraint = None if bank is None else constraint_of(bank, ConstraintSettings(), SEED)
    engine = Engine(adapted, users, reference, constraint, work.dpo, FleetSettings(), SEED)
    trained: list[TrainedUser] = list(engine.run())
    adapted.close()
    seconds = (work.clock() - started) / len(users)
    return BenchmarkRound(seconds, {user.user_id: user.adapter for user in trained if user.adapter is not None})


def _pair_rows(users: Sequence[UserRows]) -> list[Row]:
    return both_rows(pair for user in users for pair in user.train)


def _rows(work: Workload, timings: dict[str, list[BenchmarkRound]]) -> list[dict[str, Any]]:
    """One row a contender: times of all rounds, and the distance of its adapters from the fleet's of the same users."""
    fleet = timings[FLEET][0].adapters
    fleet_seconds = median(timing.seconds for timing in timings[FLEET])
    settings = {name: _upper(work, top) for top, name in UPPER.items()}
    rows = []
    for name, rounds in timings.items():
        adapters = {user_id: adapter for timing in rounds for user_id, adapter in timing.adapters.items()}
        adapted = AdaptedModel(work.base, settings.get(name, work.lora))
        reference = Reference(adapted)
        reference.add(_pair_rows(work.users[:1]))
        seconds = median(timing.seconds for timing in rounds)
        distance = (
            None
            if name in OTHER_MATHS
            else max(float((adapter - fleet[u]).norm() / fleet[u].norm()) for u, adapter in adapters.items())
        )
        first = work.users[0]
        rows.append(
            {
                "contender": name,
                "seconds_per_user": seconds,
                "rounds": [timing.seconds for timing in rounds],
                "times_fleet": seconds / fleet_seconds,
                "final_loss": _loss(adapted, reference, first, adapters[first.user_id], work.dpo),
                "adapter_distance": distance,
            }
        )
        adapted.close()
    return rows


def _loss(adapted: AdaptedModel, reference: Reference, user: UserRows, flat: Tensor, dpo: DpoSettings) -> float:
    """Mean loss of a finished adapter over its user's pairs, computed alike for every contender."""
    with adapted.using(flat[None].to(adapted.base.device)):
        [chosen] = adapted.score([[pair.chosen for pair in user.train]])
        [rejected] = adapted.score([[pair.rejected for pair in user.train]])
    logps = PairLogps(
        torch.tensor([[score.logp for score in chosen]]),
        torch.tensor([[score.logp for score in rejected]]),
        torch.tensor([[reference[pair.chosen] for pair in user.train]]),
        torch.tensor([[reference[pair.rejected] for pair in user.train]]),
    )
    tokens = PairTokens(*(torch.tensor([[float(score.tokens) for score in side]]) for side in (chosen, rejected)))
    return float(pair_losses(dpo.loss, logps, tokens, dpo.beta, dpo.label_smoothing).losses.mean())
