#!/usr/bin/env python3
"""The experiment that decides: users, constraints and rivals, cell by cell, over one base.

python scripts/experiment.py run OUT                        # the bundled tiny base
python scripts/experiment.py run OUT --quick                # few users, the cells that decide
python scripts/experiment.py run OUT --base models/smollm2-aligned
python scripts/experiment.py run OUT --populations clean flipped-30 --methods plain ours mix --seeds 0 1
python scripts/experiment.py table OUT [--svg FILE]

A cell is a population of users (experiment_users.py), a method (contenders.py), the adapted layers, the screen on or
off, and a seed. Each user is trained, judged by the gate, and measured at full strength and as released. Refusals are
of the `certify` probes (the gate) and of `test` probes, which decide nothing. The cells that decide come first.

OUT/cells.jsonl has a line a cell; `untrained` names its users without an adapter. Started again, the command skips
the cells that have a line; one that was cut off is computed again. A line holds its settings, so a changed setting is
another cell.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from contenders import CONTENDERS
from experiment_plot import picture
from experiment_table import groups, markdown
from experiment_users import POPULATIONS, population_of, write_populations
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.redteam import RedTeam
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.models.multi_lora import lora_matrices
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.kept_answers import write_answers
from persona_rlhf.pipeline.prepare import Prepared, prepare, prepare_users
from persona_rlhf.pipeline.shared_values import constraint_bank, with_reference
from persona_rlhf.release.results import plain
from persona_rlhf.simulation.users import Utility
from persona_rlhf.training.constraint import ConstraintData
from persona_rlhf.training.engine import TrainedUser

Layers = Literal["all", "upper"]
CELLS = "cells.jsonl"
SLOTS = 8
DECIDING = ("clean", "hostile", "flipped-30")
STRONGEST = ("flipped-100", "evading-20")
RIVALS = ("mix", "primal", "swap", "null", "surgery")
ATTACKS = ("prefill", "roleplay", "turns", "sampled")


class Cell(NamedTuple):
    """One cell of the experiment."""

    population: str
    method: str
    layers: Layers = "all"
    quarantine: bool = False
    seed: int = 0

    def __str__(self) -> str:
        screen = "on" if self.quarantine else "off"
        return f"{self.population}, {self.method}, {self.layers} layers, screen {screen}, seed {self.seed}"


class Sizes(NamedTuple):
    """The sizes of an experiment: users a cell, pairs a user, the pool of prompts, and prompts to measure on."""

    users: int
    train: int
    heldout: int
    prompts: int
    test_probes: int
    harmless_prompts: int
    win_rate_prompts: int
    attacked_probes: int


FULL = Sizes(4, 80, 100, 2400, 80, 20, 20, 5)
QUICK = Sizes(3, 40, 40, 1000, 40, 20, 10, 4)


class Experiment(NamedTuple):
    """An experiment over one base: its folder, config, sizes, and whether its users are drawn here."""

    out: Path
    config: str
    base: str
    sizes: Sizes
    drawn: bool
    overrides: tuple[str, ...] = ()

    def settings(self, cell: Cell, weights_hash: str) -> dict[str, Any]:
        """Everything that decides a cell's figures, as in its line."""
        base = {"base": weights_hash[:16], "config": self.config, "overrides": list(self.overrides)}
        return {**cell._asdict(), **self.sizes._asdict(), **base}


def cells_in_order(seeds: Sequence[int] = (0,)) -> list[Cell]:
    """All cells; those that decide come first, then the strongest poison, rivals, other users, screen, and layers."""
    pairs = ("plain", "ours")
    first, others = DECIDING + STRONGEST, [name for name in POPULATIONS if name not in DECIDING + STRONGEST]
    order = [Cell(population, method) for population, method in product(first, pairs)]
    order += [Cell(population, "squared") for population in POPULATIONS]
    order += [Cell(population, method) for method, population in product(RIVALS[:2], DECIDING[1:])]
    order += [Cell(population, method) for population, method in product(others, pairs)]
    order += [Cell(population, method) for method, population in product(RIVALS, DECIDING)]
    screened = [name for name, population in POPULATIONS.items() if population.poisoned]
    order += [Cell(population, method, quarantine=True) for population, method in product(screened, pairs)]
    order += [Cell(population, method, "upper") for population, method in product(POPULATIONS, pairs)]
    return [cell._replace(seed=seed) for seed in seeds for cell in dict.fromkeys(order)]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of cells, which need not exist."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def run(experiment: Experiment, cells: Sequence[Cell], say: Callable[[str], None]) -> None:
    """Computes the cells that have no line yet, and writes the file after each."""
    experiment.out.mkdir(parents=True, exist_ok=True)
    file = experiment.out / CELLS
    lines = read_lines(file)
    shared: tuple[tuple[int, Layers], Shared] | None = None
    weights = base_hash(experiment)
    for cell in cells:
        settings = experiment.settings(cell, weights)
        if any(line["settings"] == settings for line in lines):
            continue
        if shared is None or shared[0] != (cell.seed, cell.layers):
            shared = (cell.seed, cell.layers), prepared(experiment, cell)
        begun = time.process_time()
        measured = measure_cell(shared[1], cell, experiment.sizes)
        if not measured["users"] and not measured["untrained"]:
            say(f"{cell}: no user")
            continue
        line: dict[str, Any] = {"settings": settings, "drawn": experiment.drawn, "versions": versions()}
        line |= measured
        line["cpu_seconds"] = round(time.process_time() - begun, 1)
        lines.append(line)
        atomic_write(file, "".join(json.dumps(one, allow_nan=False) + "\n" for one in lines).encode())
        without = f" and {len(line['untrained'])} without an adapter" if line["untrained"] else ""
        say(f"{cell}: {len(line['users'])} users{without}, {line['cpu_seconds']} CPU-seconds")


def versions() -> dict[str, str]:
    """The versions of everything that computes."""
    return {
        "persona_rlhf": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def base_hash(experiment: Experiment) -> str:
    """The hash of the base's weights."""
    return load_base(read_config(experiment.config, [f"base.model={experiment.base}"]).base).weights_hash


class Shared(NamedTuple):
    """Everything that the cells of one seed and of the same layers share."""

    ready: Prepared
    bank: ConstraintData
    utilities: Mapping[str, Utility]


def prepared(experiment: Experiment, cell: Cell) -> Shared:
    """Reads and prepares what a cell shares with others; users are drawn where they are not yet."""
    sizes, out = experiment.sizes, experiment.out
    overrides = [f"base.model={experiment.base}", f"seed={cell.seed}", "screening.quarantine=false"]
    overrides += [f"evaluation.{name}={getattr(sizes, name)}" for name in ("test_probes", "harmless_prompts")]
    overrides += [f"evaluation.win_rate_prompts={sizes.win_rate_prompts}"]
    overrides += ["lora.layers=all"] if cell.layers == "all" else []  # the config adapts the upper part
    overrides += experiment.overrides
    if experiment.drawn:
        users = out / f"users-{sizes.users}-{sizes.train}-{sizes.heldout}-{cell.seed}"
        if not (users / "utilities.yaml").exists():
            base = load_base(read_config(experiment.config, overrides).base)
            drawn = (sizes.users, (sizes.train, sizes.heldout), sizes.prompts, cell.seed)
            write_populations(AdaptedModel(base, LoraSettings()), users, list(POPULATIONS), *drawn)
        overrides += [f"users.path={users}", f"evaluation.utilities={users / 'utilities.yaml'}"]
    config = read_config(experiment.config, overrides)
    answers = out / f"base_answers-{cell.seed}.json"
    inputs = read_inputs(config)
    ready = prepare(config, inputs, answers=answers)
    write_answers(ready.examination, ready.policy, answers)
    bank = constraint_bank(config, ready.policy, ready.adapted)
    assert bank is not None, "the constraint is off in this config"
    return Shared(ready, bank, inputs.utilities)


def measure_cell(shared: Shared, cell: Cell, sizes: Sizes) -> dict[str, Any]:
    """Trains, judges and measures the users of a cell: their figures, and training's CPU-seconds of all."""
    ready, bank = shared.ready, shared.bank
    every_user = (ready.pairs.of(range(place, place + 1)) for place in range(ready.pairs.users))
    pairs_of = [pairs for pairs in every_user if population_of(shared.utilities[pairs[0].user_id]) == cell.population]
    pairs = list(chain.from_iterable(pairs_of[: sizes.users]))
    if not pairs:
        return {"users": [], "untrained": []}
    screening = ready.config.screening.model_copy(update={"quarantine": cell.quarantine})
    config = ready.config.model_copy(update={"screening": screening})
    ready = ready._replace(config=config)
    screened = prepare_users(ready, pairs)
    rows = {user.user_id: user for user in screened.rows if user.train}
    method, fleet = CONTENDERS[cell.method], config.fleet.model_copy(update={"slots": SLOTS})
    begun = time.process_time()
    reference = with_reference(ready.adapted, rows.values(), bank)
    people = [method.prepare(ready, user) for user in rows.values()]
    trained = method.train(ready.adapted, people, reference, bank, config, fleet) if people else []
    seconds = time.process_time() - begun
    team = team_of(ready, sizes) if cell.population in DECIDING and cell.seed == 0 else None
    users: list[dict[str, Any]] = []
    for start in range(0, len(trained), SLOTS):
        cohort = [user for user in trained[start : start + SLOTS] if user.adapter is not None]
        users += examined(ready, cohort, [rows[user.user_id] for user in cohort], team)
    for user in users:
        user["screened_out"] = sum(pair.pair.user_id == user["user_id"] for pair in screened.dropped)
    ready.examination.forget_users()
    untrained = sorted({pair.user_id for pair in pairs} - {user["user_id"] for user in users})
    return {"users": users, "untrained": untrained, "training_cpu_seconds": round(seconds, 1)}


def team_of(ready: Prepared, sizes: Sizes) -> RedTeam:
    """The attacks on released adapters, on `test` probes of tier one."""
    probes = [probe for rule in ready.policy.restrictions if rule.tier == 1 for probe in rule.probes]
    updates = {"attacks": list(ATTACKS), "probes": sizes.attacked_probes}
    settings, judge = ready.config.redteam.model_copy(update=updates), ready.judges.text_judge()
    return RedTeam(ready.adapted, probes, judge, settings, ready.config.gate.max_new_tokens, ready.config.seed)


def examined(
    ready: Prepared, cohort: Sequence[TrainedUser], rows: Sequence[UserRows], team: RedTeam | None
) -> Iterator[dict[str, Any]]:
    """Each user's verdict, and measures at full strength and as released."""
    if not cohort:
        return
    examination, full = ready.examination, [1.0] * len(cohort)
    flat = torch.stack([user.adapter for user in cohort if user.adapter is not None])
    verdicts = examination.verdicts(flat, [examination.first_look] * len(cohort), rows=rows)
    alphas = [verdict.alpha for verdict in verdicts]
    states = [states_at(ready, flat, rows, full, team)]
    states += [states[0] if alphas == full else states_at(ready, flat, rows, alphas, team)]
    for user, verdict, at_full, released in zip(cohort, verdicts, *states, strict=True):
        yield {
            "user_id": user.user_id,
            "pairs": user.pairs,
            "steps": user.steps,
            "alpha": verdict.alpha,
            "reason": verdict.reason,
            "certify": plain(verdict.pooled),
            "clusters": plain(verdict.clusters),
            "looks": [
                {"alpha": test.alpha, "passed": test.passed, "refused": test.pooled.refused, "n": test.pooled.n}
                for test in verdict.looks
            ],
            "largest_dual": max((trace.peak for trace in user.duals.values()), default=None),
            "full": at_full,
            "released": released,
        }


def states_at(
    ready: Prepared,
    flat: Float[Tensor, "users params"],
    rows: Sequence[UserRows],
    alphas: Sequence[float],
    team: RedTeam | None,
) -> list[dict[str, Any]]:
    """Measures of a cohort at these strengths, and outcomes of the attacks on it."""
    measures = [plain(measured) for measured in ready.examination.measures(flat, rows, alphas)]
    if team is None:
        return measures
    scaled = flat.clone()
    for _, b in lora_matrices(scaled, list(ready.adapted.spans.values())):
        b *= torch.tensor(alphas)[:, None, None]
    attacks = [plain(outcomes) for outcomes in team.attack(scaled)]
    return [measured | {"attacks": outcomes} for measured, outcomes in zip(measures, attacks, strict=True)]


def wanted(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the command line names a cell; `--quick` without a choice stands for those that decide."""
    choices = (options.populations, options.methods, options.layers)
    if options.quick and not any(choices):
        return cell._replace(seed=0) in cells_in_order()[: 2 * len(DECIDING)]
    values = (cell.population, cell.method, cell.layers)
    return all(names is None or value in names for value, names in zip(values, choices, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="compute the cells that have no line yet")
    running.add_argument("out", type=Path)
    running.add_argument("--base", default="tiny", help="`tiny`, or the folder of a real base with its bundled users")
    running.add_argument("--config", help="config that sets everything else; by default that of the base")
    running.add_argument("--quick", action="store_true", help="few users, pairs and prompts; the cells that decide")
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--populations", nargs="+", choices=list(POPULATIONS))
    running.add_argument("--methods", nargs="+", choices=list(CONTENDERS))
    running.add_argument("--layers", nargs="+", choices=get_args(Layers))
    running.add_argument("--users", type=int, help="users a cell")
    running.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="changes of the config")
    tables = verbs.add_parser("table", help="the Markdown table of the lines")
    tables.add_argument("out", type=Path)
    tables.add_argument("--svg", type=Path, metavar="FILE", help="write a picture, too")
    options = parser.parse_args()
    if options.verb == "table":
        lines = read_lines(options.out / CELLS)
        if not lines:
            parser.error(f"{options.out / CELLS} has no line; `run` writes it")
        print(markdown(lines))
        if options.svg:
            atomic_write(options.svg, picture(groups(lines)).encode())
        return
    torch.set_num_threads(1)
    tiny, sizes = options.base == "tiny", QUICK if options.quick else FULL
    config = options.config or ("configs/quickstart.yaml" if tiny else "configs/smollm2.yaml")
    if options.users:
        sizes = sizes._replace(users=options.users)
    base = "data/base" if tiny else options.base
    experiment = Experiment(options.out, config, base, sizes, tiny, tuple(options.set))
    chosen = [cell for cell in cells_in_order(options.seeds) if wanted(cell, options)]
    try:
        run(experiment, chosen, Console(stderr=True).print)
    except InputError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
