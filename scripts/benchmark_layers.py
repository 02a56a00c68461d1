#!/usr/bin/env python3
"""What upper-layer adapters cost in accuracy and give in time; beside TRL's best setting.

python scripts/benchmark_layers.py                 # 12 clean users, all / upper half / upper quarter of the layers
python scripts/benchmark_layers.py --users 24 --json
python scripts/benchmark_layers.py --states       # states below the upper quarter: in memory, on disk, in every step
python scripts/benchmark_layers.py configs/smollm2.yaml --users 4 --slots 1 --trl "shared reference columns"

Every setting trains the same users from the same config (configs/quickstart.yaml unless another is named), without the
constraint (TRL has none) and with all layers, the upper half, and the upper quarter. Accuracy is against
noise-free labels on the held-out pairs, measured at equal shares of the steps, outside the clock. Seconds are CPU
seconds of this process on one thread. TRL's adapters are those of `all` to 1e-6 (see `persona-rlhf bench`), so its
accuracies are those of `all` at the same steps, and only its seconds are measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from persona_rlhf.benchmarks import trl_baseline
from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import DpoSettings, FleetSettings, LoraSettings, TopLayers
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.tokenize import UserRows, both_rows, tokenize
from persona_rlhf.evaluation.metrics import clean_accuracy, score_pairs, score_pairs_of_base
from persona_rlhf.evaluation.statistics import interval_over_users
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.simulation.users import read_utilities
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.engine import Engine, StepReport
from persona_rlhf.training.user_state import UserSchedule

SHARES: tuple[Literal["all"] | float, ...] = ("all", 0.5, 0.25)
STATES = {"in memory": (2048, 4096), "on disk": (0, 4096), "in every step": (0, 0)}
"""What keeps the states below the adapters: MiB of `fleet.trunk_cache` and of `fleet.trunk_disk`."""
CHECKS = 12
REACHED = 0.95


class Course(NamedTuple):
    """One setting: CPU seconds a user at each check, and the users' accuracies at it."""

    seconds: list[float]
    accuracies: list[list[float]]

    def gains(self) -> list[float]:
        return [fmean(own) - 0.5 for own in self.accuracies]


def train(base: Base, users: Sequence[UserRows], lora: LoraSettings, dpo: DpoSettings) -> Course:
    """Trains one fleet of users and looks at their accuracies on the way, with the clock stopped."""
    adapted = AdaptedModel(base, lora)
    base_scores = score_pairs_of_base(adapted, [user.heldout for user in users])
    started = time.process_time()
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, users))
    engine = Engine(adapted, users, reference, None, dpo, FleetSettings(slots=len(users)), 0)
    course = Course([], [])

    def look(reports: Sequence[StepReport]) -> None:
        nonlocal started
        step, steps = reports[0].step, reports[0].steps
        if step < (len(course.seconds) + 1) * steps / CHECKS:
            return
        now = time.process_time()
        course.seconds.append((now - started) / len(users))
        with torch.no_grad(), adapted.using(engine.slots.flat):
            scores = score_pairs(adapted, [by_id[report.user_id].heldout for report in reports])
        names = [report.user_id for report in reports]
        own = [clean_accuracy(by_id[name].heldout, known[name], s) for name, s in zip(names, scores, strict=True)]
        course.accuracies.append([accuracy.adapted for accuracy in own if accuracy is not None])
        started += time.process_time() - now

    by_id = {user.user_id: user for user in users}
    known = dict(zip(by_id, base_scores, strict=True))
    list(engine.run(look))
    adapted.close()
    return course


def joined(courses: Sequence[Course]) -> Course:
    """The courses of several fleets as one: mean seconds, all users' accuracies."""
    seconds = [fmean(column) for column in zip(*(course.seconds for course in courses), strict=True)]
    columns = zip(*(course.accuracies for course in courses), strict=True)
    return Course(seconds, [[value for own in column for value in own] for column in columns])


class TrlTime(NamedTuple):
    """CPU seconds of one TRL setting for one user: what it takes before the first step, and for all steps."""

    before: float
    steps: float


def trl_times(
    base: Base, user: UserRows, lora: LoraSettings, dpo: DpoSettings, settings: Sequence[trl_baseline.TrlSetting]
) -> dict[str, TrlTime]:
    """The times of TRL settings. A run of one epoch tells what is fixed from what grows with the steps."""
    times = {}
    for setting in settings:
        one, all_epochs = (
            _trl(base, user, lora, dpo.model_copy(update={"epochs": n}), setting) for n in (1, dpo.epochs)
        )
        each = (all_epochs - one) / (dpo.epochs - 1)
        times[setting] = TrlTime(one - each, each * dpo.epochs)
    return times


def _trl(base: Base, user: UserRows, lora: LoraSettings, dpo: DpoSettings, setting: trl_baseline.TrlSetting) -> float:
    adapted = AdaptedModel(base, lora)
    spans = list(adapted.spans.values())
    started = time.process_time()
    reference = Reference(adapted)
    reference.add(both_rows(user.train))
    charged = time.process_time() - started if setting == "shared reference columns" else 0.0
    adapted.close()
    with tempfile.TemporaryDirectory() as folder:
        schedule = UserSchedule(user, dpo, 0)
        run = trl_baseline.train_user(
            base, base.tokenizer, schedule, spans, lora, dpo, 0, setting, reference, Path(folder), time.process_time
        )
    return charged + run.seconds


def states(base: Base, users: Sequence[UserRows], dpo: DpoSettings, rounds: int = 5) -> dict[str, list[float]]:
    """CPU seconds a user of the upper quarter, in turns, by where the states below it are kept; the same adapters."""
    found: dict[str, list[float]] = {name: [] for name in STATES}
    norms = set()
    for _ in range(rounds):
        for name, (memory, disk) in STATES.items():
            adapted = AdaptedModel(base, LoraSettings(layers=TopLayers(top=0.25)))
            started = time.process_time()
            reference = Reference(adapted)
            reference.add(rows_ahead(adapted, users))
            fleet = FleetSettings(slots=len(users), trunk_cache=memory, trunk_disk=disk)
            trained = list(Engine(adapted, users, reference, None, dpo, fleet, 0).run())
            found[name].append((time.process_time() - started) / len(users))
            norms.add(round(sum(float(user.adapter.norm()) for user in trained if user.adapter is not None), 3))
            adapted.close()
    assert len(norms) == 1, "where states are kept changes nothing"
    return found


def reached(course: Course, goal: float) -> float | None:
    """Share of the steps after which the mean gain first is `goal`; None if never."""
    return next(((n + 1) / CHECKS for n, gain in enumerate(course.gains()) if gain >= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", help="base, users and settings")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the config")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--slots", type=int, default=8, help="users of a fleet")
    parser.add_argument("--trl", nargs="*", choices=trl_baseline.TRL_SETTINGS, help="settings of TRL; all by default")
    parser.add_argument("--states", action="store_true", help="time where the states below the adapters are kept")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()
    config = read_config(find(options.config), options.overrides)
    base = load_base(config.base)
    assert config.evaluation.utilities is not None, "the users need utilities, for labels without noise"
    tastes = read_utilities(config.evaluation.utilities)
    rows = tokenize(read_pairs(config.users.path, config.users.heldout), base.tokenizer, base.context)
    clean = [user for user in rows if not tastes[user.user_id].poisoned]
    users = clean[:: max(1, len(clean) // options.users)][: options.users]
    if options.states:
        kept = states(base, users[: options.slots], config.dpo)
        for name, times in kept.items():
            print(f"{name}: {median(times):.2f} ({min(times):.2f} to {max(times):.2f}) CPU seconds a user")
        return
    layers: dict[str, Literal["all"] | TopLayers] = {
        str(share): "all" if share == "all" else TopLayers(top=share) for share in SHARES
    }
    loras = {name: config.lora.model_copy(update={"layers": share}) for name, share in layers.items()}
    fleets = [users[n : n + options.slots] for n in range(0, len(users), options.slots)]
    courses = {name: joined([train(base, own, lora, config.dpo) for own in fleets]) for name, lora in loras.items()}
    full = courses["all"]
    goal = REACHED * full.gains()[-1]
    trl = trl_times(base, users[0], loras["all"], config.dpo, options.trl or trl_baseline.TRL_SETTINGS)
    best = min(trl, key=lambda name: sum(trl[name]))
    at = reached(full, goal)
    assert at is not None
    trl_to_goal = trl[best].before + at * trl[best].steps
    found = []
    for name, course in courses.items():
        lost = [b - a for a, b in zip(full.accuracies[-1], course.accuracies[-1], strict=True)]
        low, high = (None if name == "all" else interval_over_users(lost)) or (None, None)
        steps = reached(course, goal)
        seconds = None if steps is None else course.seconds[round(steps * CHECKS) - 1]
        found.append(
            {
                "layers": name,
                "seconds_per_user": course.seconds[-1],
                "accuracy": fmean(course.accuracies[-1]),
                "against_all": fmean(lost),
                "low": low,
                "high": high,
                "seconds_to_goal": seconds,
                "course": [round(gain, 4) for gain in course.gains()],
            }
        )
    result = {
        "users": len(users),
        "goal_gain": goal,
        "trl_best": best,
        "trl_seconds": trl,
        "trl_seconds_to_goal": trl_to_goal,
        "rows": found,
    }
    table = Table(title=f"{len(users)} users, CPU seconds a user; goal: a gain of {goal:.3f} in accuracy")
    for heading in ("layers", "seconds", "accuracy", "against all", "95%", "seconds to the goal", "TRL's over it"):
        table.add_column(heading, justify="right")
    for row in found:
        to = row["seconds_to_goal"]
        table.add_row(
            row["layers"],
            f"{row['seconds_per_user']:.2f}",
            f"{row['accuracy']:.3f}",
            f"{row['against_all']:+.3f}",
            "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
            "never" if to is None else f"{to:.2f}",
            "-" if to is None else f"{trl_to_goal / to:.2f}x",
        )
    table.add_row(f"TRL, {best}", f"{sum(trl[best]):.2f}", "as all", "", "", f"{trl_to_goal:.2f}", "1.00x")
    Console(stderr=True, width=150).print(table)
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
